"""The installation key: a Secret of the operator's namespace that tokens are derived from."""

from __future__ import annotations

import base64
import secrets
from typing import TYPE_CHECKING

from tunesmith.cluster.errors import AlreadyExistsError

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster

SECRET_NAME = "tunesmith-installation-key"  # noqa: S105 - a name, not a secret
SECRET_KEY = "key"  # noqa: S105 - a name, not a secret


async def installation_key(cluster: Cluster, namespace: str) -> bytes:
    """The key as the gateway reads it from its file; created when it is absent, never changed.

    The value is base64 text of 32 random bytes, and is used as that text.
    """
    secret = await cluster.find("Secret", SECRET_NAME, namespace)
    if secret is None:
        text = base64.b64encode(secrets.token_bytes(32))
        manifest = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": SECRET_NAME,
                "namespace": namespace,
                "labels": {"app.kubernetes.io/managed-by": "tunesmith"},
            },
            "type": "Opaque",
            "data": {SECRET_KEY: base64.b64encode(text).decode()},
        }
        try:
            secret = await cluster.create(manifest)
        except AlreadyExistsError:
            secret = await cluster.get("Secret", SECRET_NAME, namespace)
    return base64.b64decode(secret["data"][SECRET_KEY]).strip()
