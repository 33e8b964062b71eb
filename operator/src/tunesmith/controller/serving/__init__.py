"""Reconcilers of ServingPools and AdapterDeployments, and the streams that they read."""
