"""The operator process: kopf entry, caches, work queue, leader election, metrics."""
