"""The operator process: kopf watches, caches, one work queue, leader election, metrics, probes.

How a kind is added (all names are in `reconciler`, `context` and `cache`):

1. Write a class that satisfies `reconciler.Reconciler`: its `kind`, the `watches` on secondary kinds (each maps an
   object to the keys to reconcile), `reconcile(key)` and `run()`, which is a task that lives while this process leads
   (streams, polls; `await asyncio.Event().wait()` where there is nothing to do).
2. Its constructor takes the `context.Context`: `caches["Pod"].get(namespace, name)`, `.list(namespace)`, `.owned(uid)`;
   writes go through `context.create | apply | replace_status | delete`, which put the answer into the cache;
   `context.queue.add(key)` from a background task; `context.recorder.event(...)`; `context.epoch` (rises with each
   leader), `context.installation_keys`, `context.settings`, `context.now()`.
3. Add it to the list in `main.reconcilers`.

`reconcile` is called with every cache synced, never twice at once for one key, and only while this process leads. It is
level-triggered: read the caches, decide in a pure function, write. A raised `ClusterError` or any other exception puts
the key back with exponential backoff; `Result(requeue_after=seconds)` asks to be called again.
An object that was deleted is reconciled once more: `caches[kind].get(...)` is None then.
"""
