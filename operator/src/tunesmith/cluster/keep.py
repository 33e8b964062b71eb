"""Fields of objects that the operator and the gateway read. They keep no others, whose size users choose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tunesmith.cluster.resources import Object

_METADATA = ("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")
_OWNER = ("apiVersion", "kind", "name", "uid", "controller")
_LABELS = ("app.kubernetes.io/", "tunesmith.dev/", "batch.kubernetes.io/", "kueue.x-k8s.io/", "pod-template-hash")
_ANNOTATIONS = ("tunesmith.dev/", "controller.kubernetes.io/pod-deletion-cost")
_CONDITION = ("type", "status", "reason", "message", "lastTransitionTime", "observedGeneration")
_CONTAINER = ("name", "image", "ready", "restartCount", "state", "lastState")
PAGE_SIZE = 10
"""Objects per request when all are listed; each may have 1.5 MB."""
_MAX_LENGTH = 4096
_MAX_ENTRIES = 32
"""Highest number of entries of a list or mapping; no object that the operator creates has more."""


def kept(item: Object) -> Object:
    """Return a copy of the object with only those fields that the operator and the gateway read."""
    reduce = _BY_KIND.get(item.get("kind", ""))
    return item if reduce is None else {**reduce(item), "metadata": _metadata(item["metadata"])}


def _metadata(metadata: Mapping[str, Any]) -> Object:
    found = _fields(metadata, _METADATA)
    for name, prefixes in (("labels", _LABELS), ("annotations", _ANNOTATIONS)):
        entries = {
            key: value
            for key, value in (metadata.get(name) or {}).items()
            if key.startswith(prefixes) and len(value) <= _MAX_LENGTH
        }
        if entries:
            found[name] = dict(list(entries.items())[:_MAX_ENTRIES])
    owners = metadata.get("ownerReferences")
    if owners is not None:
        found["ownerReferences"] = [_fields(owner, _OWNER) for owner in owners[:_MAX_ENTRIES]]
    return found


def _resource(item: Object) -> Object:
    """Return a custom resource without other fields; its schema bounds spec and status."""
    return _fields(item, ("apiVersion", "kind", "spec", "status"))


def _pod(item: Object) -> Object:
    status = item.get("status") or {}
    found = _fields(status, ("phase", "reason", "message", "podIP", "startTime"))
    found["conditions"] = _conditions(status)
    for name in ("initContainerStatuses", "containerStatuses"):
        found[name] = [_bounded(_fields(entry, _CONTAINER)) for entry in (status.get(name) or ())[:_MAX_ENTRIES]]
    return _reduced(item, _fields(item.get("spec") or {}, ("nodeName",)), found)


def _job(item: Object) -> Object:
    status = item.get("status") or {}
    found = _fields(status, ("active", "ready", "succeeded", "failed", "startTime", "completionTime"))
    spec = _fields(item.get("spec") or {}, ("parallelism", "completions", "suspend"))
    return _reduced(item, spec, {**found, "conditions": _conditions(status)})


def _deployment(item: Object) -> Object:
    status = item.get("status") or {}
    found = {name: value for name, value in status.items() if isinstance(value, int)}
    spec = _fields(item.get("spec") or {}, ("replicas", "strategy", "paused"))
    return _reduced(item, spec, {**found, "conditions": _conditions(status)})


_BY_KIND: dict[str, Callable[[Object], Object]] = {
    "FineTuneJob": _resource,
    "ServingPool": _resource,
    "AdapterDeployment": _resource,
    "Pod": _pod,
    "Job": _job,
    "Deployment": _deployment,
}


def _reduced(item: Object, spec: Object, status: Object) -> Object:
    parts = {"spec": spec, "status": status}
    return {**_fields(item, ("apiVersion", "kind")), **{name: part for name, part in parts.items() if name in item}}


def _fields(mapping: Mapping[str, Any], names: tuple[str, ...]) -> Object:
    return {name: mapping[name] for name in names if name in mapping}


def _conditions(status: Mapping[str, Any]) -> list[Object]:
    return [_bounded(_fields(entry, _CONDITION)) for entry in (status.get("conditions") or ())[:_MAX_ENTRIES]]


def _bounded(entry: Object) -> Object:
    return {
        name: value[:_MAX_LENGTH] if isinstance(value, str) else _bounded(value) if isinstance(value, dict) else value
        for name, value in entry.items()
    }
