"""Secrets that users create: their names, their label, and references to them."""

from __future__ import annotations

from pydantic import Field

from tunesmith.api.model import ApiModel, ResourceName
from tunesmith.storage.schemes import SCHEMES, Scheme

STORE_SECRET = "tunesmith-store"  # noqa: S105 - a name, not a secret
"""Secret of each namespace that trains or serves, with the credentials of the installation's store."""
REPORTING_SECRET = "tunesmith-reporting"  # noqa: S105 - a name, not a secret
"""Secret of a job's namespace with the addresses and keys of trackers."""
CREDENTIALS_LABEL = "tunesmith.dev/credentials"
"""Label of a Secret that a secretRef may name; its value is `true`. The chart's admission policies check it."""


def _keys(scheme: Scheme) -> str:
    required = ", or ".join(" and ".join(keys) for keys in scheme.credentials)
    optional = f" (optional: {', '.join(scheme.optional)})" if scheme.optional else ""
    return f"{scheme.name}://: {required}{optional}."


class SecretReference(ApiModel):
    """Reference to a Secret in the namespace of the resource."""

    name: ResourceName = Field(
        description=f"Name of the Secret. It must have the label {CREDENTIALS_LABEL}=true. Its keys are the "
        f"environment variables of the store's client. "
        f"{' '.join(_keys(scheme) for scheme in SCHEMES if scheme.credentials)} See docs/reference/stores.md."
    )
