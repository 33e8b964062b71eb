"""Manifests of Tunesmith's kinds, and functions that wait for their status, for the scenarios."""

from __future__ import annotations

from typing import TYPE_CHECKING

from e2e.installation import DEMO, Object, condition, get, items, until

if TYPE_CHECKING:
    from collections.abc import Callable

API_VERSION = "tunesmith.dev/v1alpha1"
TRAINED_SECONDS = 600
READY_SECONDS = 300


def job_manifest(name: str, spec: Object, namespace: str = DEMO) -> Object:
    """Return the manifest of a FineTuneJob."""
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": API_VERSION, "kind": "FineTuneJob", "metadata": metadata, "spec": spec}


def adapter_manifest(name: str, job: str, pool: str | None = None, namespace: str = DEMO, **spec: object) -> Object:
    """Return the manifest of an AdapterDeployment."""
    metadata = {"name": name, "namespace": namespace}
    source: Object = {"adapterFrom": {"fineTuneJob": {"name": job}}}
    if pool is not None:
        source["pool"] = {"name": pool}
    return {"apiVersion": API_VERSION, "kind": "AdapterDeployment", "metadata": metadata, "spec": source | spec}


def finished_job(
    name: str, namespace: str = DEMO, while_waiting: Callable[[Object | None], None] | None = None
) -> Object:
    """Wait until a FineTuneJob is Complete or Failed and return it; `while_waiting` gets each observed state."""

    def finished() -> Object | None:
        job = get("finetunejob", name, namespace)
        if any(condition(job, kind)["status"] == "True" for kind in ("Complete", "Failed")):
            return job
        if while_waiting is not None:
            while_waiting(job)
        return None

    job: Object = until(f"FineTuneJob {namespace}/{name} finishes", finished, TRAINED_SECONDS)
    return job


def ready_adapter(name: str, replicas: int = 1, seconds: float = READY_SECONDS) -> Object:
    """Wait until an AdapterDeployment is ready on exactly that many pods and return it."""

    def ready() -> Object | None:
        adapter = get("adapterdeployment", name, DEMO)
        ready_replicas = ((adapter or {}).get("status") or {}).get("readyReplicas")
        return adapter if condition(adapter, "Ready")["status"] == "True" and ready_replicas == replicas else None

    adapter: Object = until(f"AdapterDeployment {name} ready on {replicas} pods", ready, seconds)
    return adapter


def engine_name(adapter: Object) -> str:
    """Return the name of the newest revision in the engine, which replies contain."""
    return str(adapter["status"]["revisions"][0]["engineName"])


def pool_pods(pool: str) -> list[Object]:
    """Return the pods of the demo's pool that are not being deleted."""
    pods = items("pods", DEMO, f"tunesmith.dev/pool={pool}")
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
