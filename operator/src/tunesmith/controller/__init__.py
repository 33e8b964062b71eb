"""The operator process: kopf watches, caches, one work queue, leader election, metrics, probes.

To add a kind (all names are in `reconciler`, `context` and `cache`):

1. Write a class that satisfies `reconciler.Reconciler`: its `kind`, the `watches` on secondary kinds (each maps an
   object to the keys to reconcile), `reconcile(key)` and `run()`, which is a task that runs while this process leads
   (streams, polls; `await asyncio.Event().wait()` if there is nothing to do).
2. Its constructor takes the `context.Context`: `caches["Pod"].get(namespace, name)`, `.list(namespace)`, `.owned(uid)`;
   writes go through `context.create | apply | replace_status | delete`, which put the response into the cache;
   `context.queue.add(key)` from a background task; `context.recorder.event(...)`; `context.epoch` (rises with each
   leader), `context.installation_keys`, `context.settings`, `context.now()`.
3. Add it to the list in `main.reconcilers`.

`reconcile` is called once every cache is synced, never concurrently for the same key, and only while this process
leads. It is level-triggered: read the caches, decide in a pure function, write. Any exception requeues the key with
exponential backoff; `Result(requeue_after=seconds)` requeues it after a delay.
A deleted object is reconciled once more: `caches[kind].get(...)` then returns None.
"""
