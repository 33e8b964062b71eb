"""Memory of the GPUs that a job may get, from the node labels of GPU feature discovery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.contracts.scheduling import tolerates

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunesmith.api.finetunejob import FineTuneJob

Object = dict[str, Any]
_MIB = 2**20
_CONDITION_TAINT_PREFIX = "node.kubernetes.io/"
_EXCLUDING_EFFECTS = frozenset({"NoSchedule", "NoExecute"})


def gpu_memory_bytes(job: FineTuneJob, nodes: Iterable[Object]) -> int | None:
    """Return the memory, in bytes, of the smallest GPU among the nodes that may run the job's pods; None if unknown.

    It is read from the label `<resources.gpuResource>.memory`, in MiB: `nvidia.com/gpu.memory`, or a MIG profile's. A
    node without the label, or with GPUs shared among pods (`….replicas` above 1), makes the result unknown.

    Args:
        job: the FineTuneJob, whose resources and scheduling determine the nodes that may run it.
        nodes: nodes of the cluster.
    """
    resource = job.spec.resources.gpu_resource
    found = [_memory(node, resource) for node in nodes if job.spec.resources.gpus and _may_run(job, node)]
    known = [memory for memory in found if memory is not None]
    return min(known) if found and len(known) == len(found) else None


def _memory(node: Object, resource: str) -> int | None:
    labels = node["metadata"].get("labels") or {}
    mebibytes, replicas = labels.get(f"{resource}.memory", ""), labels.get(f"{resource}.replicas", "1")
    return int(mebibytes) * _MIB if mebibytes.isdecimal() and int(mebibytes) and replicas in {"0", "1"} else None


def _may_run(job: FineTuneJob, node: Object) -> bool:
    wanted, labels = job.spec.scheduling, node["metadata"].get("labels") or {}
    if any(labels.get(key) != value for key, value in (wanted.node_selector or {}).items()):
        return False
    # The API server's ExtendedResourceToleration adds a toleration for taints named after the resource.
    resource = job.spec.resources.gpu_resource
    # Kubernetes' own taints describe a node's current condition, not its GPU.
    taints = [
        taint
        for taint in node.get("spec", {}).get("taints") or ()
        if taint["key"] != resource and not taint["key"].startswith(_CONDITION_TAINT_PREFIX)
    ]
    if any(
        not tolerates(taint, wanted.tolerations or []) for taint in taints if taint.get("effect") in _EXCLUDING_EFFECTS
    ):
        return False
    allocatable = str(node.get("status", {}).get("allocatable", {}).get(resource, "0"))
    return allocatable.isdecimal() and int(allocatable) >= job.spec.resources.gpus
