"""The artifact's manifest, `tunesmith.json`: written last, and only if absent; its SHA-256 is the artifact's digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.api.finetunejob_status import EvaluationStatus, ServableStatus
from tunesmith.api.model import StatusModel
from tunesmith.contracts.location import ARTIFACT_MANIFEST, MERGED_MANIFEST
from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith.contracts.strict_json import parse_model, parse_object

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_MANIFEST_BYTES = 1024 * 1024
MAX_FILES = 64
_MANIFEST_VALUES = 65_536
ALLOWED_SUFFIXES = frozenset({".json", ".jsonl", ".jinja", ".txt", ".model", ".md", ".csv", ".png"})
"""Files that an artifact may contain besides its weights: none that executes code when it is loaded."""


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
    parity_gap: float | None = Field(
        default=None,
        description="Greatest difference of log-probabilities between adapter and base, in nats, over the answers of "
        "the parity files.",
    )


class Ancestor(StatusModel):
    """Adapter that a later one was trained from."""

    uri: str
    digest: str
    dataset_digest: str | None = None


class ImportedFrom(StatusModel):
    """Adapter of another trainer that an artifact was made from."""

    uri: str
    layout: str = Field(description="Layout of its files, such as PEFT.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of its weights.")
    changes: list[str] = Field(default_factory=list, description="What was converted, as sentences.")


class ArtifactManifest(StatusModel):
    """`tunesmith.json`."""

    schema_version: Literal[1] = 1
    files: dict[str, ArtifactFile]
    base: ArtifactBase
    adapter: ArtifactAdapter
    dataset_digest: str | None = Field(
        default=None, description="SHA-256 over the training and held-out rows. Absent: another trainer had them."
    )
    spec_digest: str | None = Field(
        default=None, description="SHA-256 of the fields of the job's spec that determine the result."
    )
    continued_from: list[Ancestor] | None = Field(
        default=None,
        description="Adapters that training started from, the newest first. Absent: it started from a new adapter.",
    )
    merged_sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of `merged.json` in the folder `merged` beside the artifact. Absent: nothing was merged.",
    )
    imported_from: ImportedFrom | None = Field(
        default=None, description="Adapter of another trainer. Absent: Tunesmith trained it."
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


def parse_manifest(document: bytes) -> ArtifactManifest:
    """Return the content of a `tunesmith.json`, which may be untrusted.

    Raises:
        ValueError: it is malformed; the text names the first problem.
    """
    return parse_model(
        ArtifactManifest, document, ARTIFACT_MANIFEST, max_bytes=MAX_MANIFEST_BYTES, max_values=_MANIFEST_VALUES
    )


def merged_files(document: bytes) -> dict[str, str]:
    """Return the SHA-256 of each file of a merged model, in hex, from its `merged.json`.

    Raises:
        ValueError: it is malformed.
    """
    files = parse_object(document, max_bytes=MAX_MANIFEST_BYTES, max_values=_MANIFEST_VALUES).get("files")
    if not isinstance(files, dict) or not all(isinstance(sha256, str) for sha256 in files.values()):
        raise ValueError(f"{MERGED_MANIFEST} is malformed: files is not an object of hashes")
    return dict(files)


def check_files(files: Mapping[str, ArtifactFile]) -> None:
    """Check the names of an adapter's files.

    Raises:
        ValueError: there are too many, one may execute code or is not a plain name, or a required one is missing.
    """
    if len(files) > MAX_FILES:
        raise ValueError(f"{ARTIFACT_MANIFEST} lists {len(files)} files, more than {MAX_FILES}")
    for name in files:
        if name != PurePosixPath(name).name or name.startswith(".") or name == ARTIFACT_MANIFEST:
            raise ValueError(f"{ARTIFACT_MANIFEST} lists {name[:80]!a}, which is not a plain file name")
        if name != ADAPTER_WEIGHTS and PurePosixPath(name).suffix not in ALLOWED_SUFFIXES:
            raise ValueError(
                f"{ARTIFACT_MANIFEST} lists {name[:80]!a}; the only file with weights is "
                f"{ADAPTER_WEIGHTS}, and code and pickle files are refused"
            )
    if missing := {ADAPTER_CONFIG, ADAPTER_WEIGHTS} - set(files):
        raise ValueError(f"the artifact has no {' and no '.join(sorted(missing))}")


def digest_of(data: bytes) -> str:
    """Return the digest `sha256:<64 hex>` of the bytes of `tunesmith.json`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
