"""Kinds that Tunesmith reads and writes, with their API paths."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import quote

from tunesmith.api.model import GROUP, VERSION
from tunesmith.cluster.errors import InvalidError

Object = dict[str, Any]
"""A Kubernetes object, as parsed JSON."""
Objects = list[Object]


class Resource(NamedTuple):
    """A kind, with its API group, version and path."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """API version: `group/version`, or `v1` for the core group."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """Return the URL path of the collection, of an object or of its subresource.

        Raises:
            InvalidError: the name would be the path of something else.
        """
        parts = ["/apis/" + self.api_version if self.group else "/api/" + self.version]
        if namespace is not None and self.namespaced:
            parts += ["namespaces", _segment("Namespace", namespace)]
        parts.append(self.plural)
        if name is not None:
            parts.append(_segment(self.kind, name))
        if subresource is not None:
            parts.append(subresource)
        return "/".join(parts)


def _segment(kind: str, name: str) -> str:
    # The API server decodes the path before it splits it, so an escaped slash is a slash.
    if name in {"", ".", ".."} or not {"/", "%"}.isdisjoint(name):
        raise InvalidError(f"{name!r} cannot be the name of a {kind}: use the name that a list of them shows")
    return quote(name, safe="")


_RESOURCES = (
    Resource(GROUP, VERSION, "finetunejobs", "FineTuneJob"),
    Resource(GROUP, VERSION, "servingpools", "ServingPool"),
    Resource(GROUP, VERSION, "adapterdeployments", "AdapterDeployment"),
    Resource("", "v1", "namespaces", "Namespace", namespaced=False),
    Resource("", "v1", "nodes", "Node", namespaced=False),
    Resource("", "v1", "pods", "Pod"),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "configmaps", "ConfigMap"),
    Resource("", "v1", "services", "Service"),
    Resource("", "v1", "serviceaccounts", "ServiceAccount"),
    Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
    Resource("", "v1", "events", "Event"),
    Resource("", "v1", "resourcequotas", "ResourceQuota"),
    Resource("apps", "v1", "deployments", "Deployment"),
    Resource("batch", "v1", "jobs", "Job"),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget"),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
    Resource("coordination.k8s.io", "v1", "leases", "Lease"),
    Resource("kueue.x-k8s.io", "v1beta1", "workloads", "Workload"),
    Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False),
)
BY_KIND = {resource.kind: resource for resource in _RESOURCES}


def resource_of(kind: str) -> Resource:
    """Return the resource of a kind, such as `Job`.

    Raises:
        KeyError: Tunesmith does not use that kind.
    """
    return BY_KIND[kind]


def named(item: Object, resource: Resource) -> Object:
    """Return the object with kind and apiVersion, which items of a list lack, and without managedFields.

    managedFields are half of an object's bytes, are never read, and must be absent from an applied object.
    """
    item.setdefault("kind", resource.kind)
    item.setdefault("apiVersion", resource.api_version)
    item["metadata"].pop("managedFields", None)
    return item
