"""NetworkPolicies of pools and jobs: the peers that may connect to the pods that the operator creates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Manifest = dict[str, Any]
_PEERS = {"namespaceSelector", "podSelector", "ipBlock"}


@dataclass(frozen=True)
class NetworkPolicySettings:
    """Peers and settings of the installation for NetworkPolicies."""

    namespace: str
    """Namespace of the operator and the gateways."""
    instance: str
    """Name of the release, which is the label app.kubernetes.io/instance of their pods."""
    policies: bool = True
    """True if the operator creates a NetworkPolicy beside each pool and job."""
    metrics_from: tuple[Manifest, ...] = ()
    """NetworkPolicy peers that may read metrics."""

    def component(self, name: str) -> Manifest:
        """Return the peer that selects a component's pods, `operator` or `gateway`."""
        return {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.namespace}},
            "podSelector": {"matchLabels": component_labels(self.instance, name)},
        }

    def admit(self, port: int, *components: str) -> Manifest:
        """Return the rule that lets components and the readers of metrics connect to a port."""
        peers = [*map(self.component, components), *self.metrics_from]
        return {"from": peers, "ports": [{"port": port, "protocol": "TCP"}]}


def component_labels(instance: str, name: str) -> dict[str, str]:
    """Return the labels that distinguish a component's pods from all others in their namespace.

    The component alone is not enough: other charts label pods with component=gateway too.
    """
    return {
        "app.kubernetes.io/name": "tunesmith",
        "app.kubernetes.io/instance": instance,
        "app.kubernetes.io/component": name,
    }


def parse_peers(text: str) -> tuple[Manifest, ...]:
    """Return the NetworkPolicy peers in an option's JSON list.

    Raises:
        ValueError: it is not a list of peers.
    """
    try:
        peers = json.loads(text or "[]")
    except ValueError:
        peers = None
    if not isinstance(peers, list) or any(not isinstance(peer, dict) or not peer.keys() <= _PEERS for peer in peers):
        raise ValueError(f"{text} is not a JSON list of NetworkPolicy peers, each with {', '.join(sorted(_PEERS))}")
    return tuple(peers)


def network_policy(metadata: Manifest, pods: Mapping[str, str], ingress: Iterable[Manifest]) -> Manifest:
    """Return a policy that allows ingress to the pods by the rules and denies all other ingress.

    Egress is not restricted: base models, data and stores are wherever users keep them.

    Args:
        metadata: metadata of the policy.
        pods: labels of the pods.
        ingress: ingress rules.
    """
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": {
            "podSelector": {"matchLabels": dict(pods)},
            "policyTypes": ["Ingress"],
            "ingress": list(ingress),
        },
    }
