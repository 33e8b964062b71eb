"""The installation key, from which all keys and tokens are derived, and the Secrets of gateways and Prometheus."""

from __future__ import annotations

import base64
import secrets
from typing import TYPE_CHECKING

from tunesmith.cluster.errors import AlreadyExistsError, ClusterError
from tunesmith.contracts.agent import gateway_keys, keys_file, metrics_tokens, parse_keys

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object
    from tunesmith.contracts.agent import Keys

SECRET_NAME = "tunesmith-installation-key"  # noqa: S105 - a name, not a secret
GATEWAY_SECRET_NAME = "tunesmith-gateway-key"  # noqa: S105 - a name, not a secret
METRICS_SECRET_NAME = "tunesmith-metrics-token"  # noqa: S105 - a name, not a secret
_CURRENT = "key"
_PREVIOUS = "previous"


class InstallationKeyError(ClusterError):
    """The Secret of the installation key cannot be used."""

    label = "installation_key"


async def installation_keys(cluster: Cluster, namespace: str) -> Keys:
    """Return the installation key and, during a rotation, its predecessor. A missing Secret is created.

    `key` is base64 text of 32 random bytes, and is used as that text. `previous` is the key before it, for as long as
    tokens derived from it must be accepted.

    Raises:
        InstallationKeyError: the Secret contains no usable key.
    """
    secret = await cluster.find("Secret", SECRET_NAME, namespace)
    if secret is None:
        text = base64.b64encode(secrets.token_bytes(32))
        try:
            secret = await cluster.create(_secret(SECRET_NAME, namespace, text))
        except AlreadyExistsError:
            secret = await cluster.get("Secret", SECRET_NAME, namespace)
    data = secret.get("data") or {}
    try:
        values = [base64.b64decode(data[field]).strip() for field in (_CURRENT, _PREVIOUS) if data.get(field)]
        if not data.get(_CURRENT):
            raise ValueError(f"it has no entry `{_CURRENT}`")  # noqa: TRY301 - reported like decoding errors
        return parse_keys(b"\n".join(values))
    except ValueError as error:
        raise InstallationKeyError(
            f"the Secret {namespace}/{SECRET_NAME} cannot be used: {error}; put 32 random bytes as base64 text into "
            f"its entry `{_CURRENT}`"
        ) from None


def gateway_key_secret(keys: Keys, namespace: str) -> Object:
    """Build the Secret that the gateways mount, with the keys from which they derive tokens."""
    return _secret(GATEWAY_SECRET_NAME, namespace, keys_file(gateway_keys(keys)))


def metrics_token_secret(keys: Keys, namespace: str) -> Object:
    """Build the Secret whose token Prometheus presents to read /metrics."""
    return _secret(METRICS_SECRET_NAME, namespace, metrics_tokens(gateway_keys(keys))[0].encode(), entry="token")


def _secret(name: str, namespace: str, content: bytes, *, entry: str = _CURRENT) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/managed-by": "tunesmith"}},
        "type": "Opaque",
        "data": {entry: base64.b64encode(content).decode()},
    }
