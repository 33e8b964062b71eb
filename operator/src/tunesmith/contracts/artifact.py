"""The artifact's manifest, `tunesmith.json`: written last, and only if absent; its SHA-256 is the artifact's digest."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from tunesmith.api.finetunejob_status import EvaluationStatus, ServableStatus
from tunesmith.api.model import StatusModel


class ArtifactFile(StatusModel):
    """File of the artifact, by its name in the folder."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class ArtifactBase(StatusModel):
    """Base model that the adapter belongs to."""

    fingerprint: str
    uri: str
    revision: str | None = None


class ArtifactAdapter(StatusModel):
    """Properties of the adapter that the engine must support."""

    method: str = Field(description="Name of the method in the manifest, such as lora.")
    rank: int | None = Field(
        default=None, ge=1, description="Rank of the saved adapter; absent for methods without a rank."
    )
    alpha: float | None = None
    target_modules: list[str]
    relative_logit_error: float | None = Field(
        default=None,
        description="Relative error of the saved adapter's logits, at the serving precision on the original base "
        "model, compared with the trained model.",
    )


class ArtifactManifest(StatusModel):
    """`tunesmith.json`."""

    schema_version: Literal[1] = 1
    files: dict[str, ArtifactFile]
    base: ArtifactBase
    adapter: ArtifactAdapter
    dataset_digest: str
    spec_digest: str | None = Field(
        default=None, description="SHA-256 of the fields of the job's spec that determine the result."
    )
    hyperparameters: dict[str, Any]
    versions: dict[str, str]
    evaluation: EvaluationStatus | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    servable: ServableStatus

    def to_bytes(self) -> bytes:
        """Return the canonical form: sorted keys, UTF-8, one newline at the end."""
        document = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return (json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def digest_of(data: bytes) -> str:
    """Return the digest `sha256:<64 hex>` of the bytes of `tunesmith.json`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
