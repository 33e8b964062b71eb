"""Settings of the agent's commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from tunesmith.api.servingpool import MAX_DESIRED_ADAPTERS
from tunesmith.contracts.agent import AGENT_PORT, ENGINE_PORT
from tunesmith.contracts.environment import (
    AGENT_KEYS_FOLDER,
    AGENT_STATE_FOLDER,
    CONTROL_KEY,
    EVENTS_KEY,
    METRICS_DIGEST,
    POD_UID,
)
from tunesmith.contracts.settings import COMMA_SEPARATED, DEFAULT_MAX_ADAPTER_RATIO, Internal, NetworkAddress
from tunesmith.settings import ProgramSettings
from tunesmith_server.guard import CANARY_SECONDS, HANG_SECONDS, STALL_SECONDS

_KEYS = Path(AGENT_KEYS_FOLDER)
_POD = Internal("the operator sets it in the pods of a pool")
_SIZE = Internal("the operator sets it from serving.adapterStorage")
_DEFAULT_FITS = Internal("the default fits the pods of a pool")
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _StoreReaderSettings(ProgramSettings):
    """Settings of commands that read from a store."""

    secret: Annotated[Path, _POD]
    """Folder of the mounted Secret with the credentials."""
    allowed_addresses: Annotated[
        tuple[NetworkAddress, ...], COMMA_SEPARATED, Internal("the operator sets it from trainer.allowedAddresses")
    ] = ()
    """Networks that may be reached besides public addresses, such as 10.0.0.7/32,fd00::/8."""


class FetchBaseSettings(_StoreReaderSettings):
    """Settings of `fetch-base`."""

    program: ClassVar[str] = "tunesmith-agent fetch-base"
    description: ClassVar[str] = "Download a base model."
    example: ClassVar[str] = (
        "--uri hf://org/name --target /models/base --secret /etc/tunesmith/secrets/hub --storage 500000000000"
    )

    uri: Annotated[str, _POD]
    """Location of the base model."""
    revision: Annotated[str | None, _POD] = None
    """Commit, tag or branch of an hf:// model; absent: the repository's default branch."""
    artifact_digest: Annotated[str | None, Field(pattern=r"^sha256:[0-9a-f]{64}$"), _POD] = None
    """Digest of the artifact whose whole model is at the uri: every file must have its published hash."""
    target: Annotated[Path, _POD]
    """Folder to fill."""
    cache: Annotated[Path | None, _POD] = None
    """Volume with the models that pods share; absent: the target's parent, for this pod only."""
    storage: Annotated[
        int | None,
        Field(ge=1),
        Internal("the operator sets it from serving.baseModelStorage or baseModelCache.maxSize"),
    ] = None
    """Highest number of bytes of all models on the volume; absent: its size."""
    gpus: Annotated[int, Field(ge=1), _POD] = 1
    """Number of GPUs among which the engine divides the base model."""
    fingerprint_file: Annotated[Path | None, _POD] = None
    """File for the fingerprint; absent: the target's name with the suffix .fingerprint."""


class ServeSettings(_StoreReaderSettings):
    """Settings of `serve`."""

    program: ClassVar[str] = "tunesmith-agent serve"
    description: ClassVar[str] = "Keep the engine's adapters equal to the operator's list."
    example: ClassVar[str] = (
        "--pod-uid 1234 --store s3://bucket/store --secret /etc/tunesmith/secrets/tunesmith-store"
        " --storage 20000000000 --max-lora-rank 16 --max-adapters 64"
    )

    pod_uid: Annotated[str, Field(min_length=1), Internal(f"the pod's metadata.uid, as {POD_UID}")]
    """UID of this pod, from which its clients' tokens are derived."""
    engine_url: Annotated[str, _POD] = f"http://127.0.0.1:{ENGINE_PORT}"
    """URL of the engine."""
    port: Annotated[int, Field(ge=0, le=65535), _POD] = AGENT_PORT
    """Port of the agent's API."""
    control_key_file: Annotated[Path, _POD] = _KEYS / CONTROL_KEY
    """File with the pool's control key."""
    events_key_file: Annotated[Path, _POD] = _KEYS / EVENTS_KEY
    """File with the pool's events key."""
    metrics_digest_file: Annotated[Path, _POD] = _KEYS / METRICS_DIGEST
    """File with the digests of the tokens of /metrics."""
    state: Annotated[Path, _POD] = Path(AGENT_STATE_FOLDER)
    """Folder that the agent shares with the engine."""
    adapters: Annotated[Path, _POD] = Path("/adapters")
    """Folder of adapters, which the engine reads."""
    base_model: Annotated[Path, _POD] = Path("/models/base")
    """Folder of the base model."""
    gpus: Annotated[int, Field(ge=1), _POD] = 1
    """Number of GPUs among which the engine divides the base model."""
    base_fingerprint_file: Annotated[Path, _POD] = Path("/models/base.fingerprint")
    """File with the base model's fingerprint; it is computed if the file does not exist."""
    base_artifact: Annotated[str | None, Field(pattern=r"^sha256:[0-9a-f]{64}$"), _POD] = None
    """Digest of the artifact whose whole model is the base model; absent: it is not a FineTuneJob's."""
    equivalent_to: Annotated[str | None, Field(pattern=r"^sha256:[0-9a-f]{64}$"), _POD] = None
    """Fingerprint of the base model that the pool's one stands for: adapters of both are accepted."""
    base_model_lock: Annotated[Path, _POD] = Path("/models/base.lock")
    """Link to the file that is locked while the pod uses a base model of a cache; the link may be missing."""
    store: Annotated[str, Internal("the operator sets it from store")]
    """URI of the store; artifacts outside it are refused."""
    storage: Annotated[int, Field(ge=1), _SIZE]
    """Highest number of bytes of all adapters."""
    max_adapter_ratio: Annotated[
        float, Field(gt=0, allow_inf_nan=False), Internal("the operator sets it from serving.maxAdapterRatio")
    ] = DEFAULT_MAX_ADAPTER_RATIO
    """Highest norm of an adapter's change to a module, relative to the norm of the base model's weights."""
    max_lora_rank: Annotated[int, Field(ge=1), _POD]
    """Highest rank of an adapter."""
    max_adapters: Annotated[int, Field(ge=1, le=MAX_DESIRED_ADAPTERS), _POD]
    """Number of adapters that may be registered at once."""
    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False), _POD] = 60
    """Seconds that /drain waits for running requests."""
    canary_seconds: Annotated[_Seconds, _DEFAULT_FITS] = CANARY_SECONDS
    """Seconds between two checks of an idle engine's answers."""
    hang_seconds: Annotated[_Seconds, _POD] = HANG_SECONDS
    """Seconds without a token after which an engine counts as hung."""
    stall_seconds: Annotated[_Seconds, _POD] = STALL_SECONDS
    """Seconds without a token after which an engine receives no requests."""
