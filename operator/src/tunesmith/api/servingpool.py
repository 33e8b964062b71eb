"""ServingPool: a base model on vLLM pods that many adapters share."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field

from tunesmith.api import engine_arguments
from tunesmith.api.autoscaling import PoolAutoscaling, replicas_or_autoscaling
from tunesmith.api.conditions import Condition
from tunesmith.api.model import (
    API_VERSION,
    MAX_NAME,
    ApiModel,
    ObjectMeta,
    Rule,
    StatusModel,
    StringPattern,
)
from tunesmith.api.placement import Resources, Scheduling, quantity_value
from tunesmith.api.pool_base_model import (
    BaseModelArtifact,
    BaseModelCache,
    CacheSize,
    PodBaseModel,
    PoolBaseModel,
    cache_rule,
)
from tunesmith.api.selector import LabelSelector

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_MODEL_NAME = 63
MAX_DESIRED_ADAPTERS = 1024
"""Highest number of desired revisions of one pod."""
MAX_LISTED_PODS = 100
_DEFAULT_MAX_ADAPTERS = 64
_HOLD_MARGIN_SECONDS = 15.0
_MAX_HOLD_SECONDS = 600.0
ModelName = Annotated[
    str,
    Field(min_length=1, max_length=MAX_MODEL_NAME),
    StringPattern(
        r"^[a-zA-Z0-9]([-a-zA-Z0-9._]*[a-zA-Z0-9])?$",
        "a model name has letters, digits, '-', '.' and '_', and begins and ends with a letter or digit",
    ),
]
Fingerprint = Annotated[
    str,
    Field(max_length=71),
    StringPattern(
        r"^sha256:[0-9a-f]{64}$",
        "a fingerprint is sha256: and 64 hex digits, as in status.baseModelFingerprint of a ServingPool",
    ),
]


class EnvironmentVariable(ApiModel):
    """A variable of the engine's container."""

    name: str = Field(
        min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Name of the variable."
    )
    value: str = Field(default="", max_length=4096, description="Value of the variable. Not for secrets.")


class Engine(ApiModel):
    """Settings of the vLLM server."""

    # For stored pools that violate these rules the operator sets a condition, by `serving.render.reserved`.
    rules = (
        Rule(
            engine_arguments.ARGUMENTS_CEL,
            "engine.args must not contain reserved arguments or abbreviations of them: remove them; docs/requests.md "
            "lists them with the reasons, and there are fields for most, such as engine.maxLoras",
            message_cel=engine_arguments.ARGUMENTS_MESSAGE_CEL,
        ),
        Rule(
            engine_arguments.VALUES_CEL,
            "engine.args has an element that is neither an argument nor the value of one, or a space in the name of an "
            "argument: write --name=value, or --name and its value as two elements",
        ),
        Rule(
            engine_arguments.SHORT_CEL,
            "engine.args must not contain short forms: write the long name of each argument",
        ),
        Rule(
            engine_arguments.VARIABLES_CEL,
            "engine.env must not contain reserved variables: remove them; reserved are "
            + ", ".join(engine_arguments.RESERVED_VARIABLES),
        ),
        Rule(
            "!has(self.maxAdapters) || self.maxAdapters >= self.maxLoras",
            "engine.maxAdapters must not be below engine.maxLoras: an adapter in a slot is registered too",
            lambda self: self.max_adapters is None or self.max_adapters >= self.max_loras,
        ),
    )

    image: str | None = Field(
        default=None, min_length=1, max_length=512, description="Image of vLLM. Absent: the installation's default."
    )
    max_loras: int = Field(
        default=8,
        ge=1,
        le=256,
        description="Number of adapter slots per pod: adapters that compute at the same time (vLLM's --max-loras). "
        "Each takes GPU memory for the largest adapter. Requests of further adapters wait for a slot.",
    )
    max_adapters: int | None = Field(
        default=None,
        ge=1,
        le=MAX_DESIRED_ADAPTERS,
        description="Maximum number of registered adapters per pod. The engine swaps them between its cache in main "
        "memory and the slots. Absent: 64, or maxLoras if that is higher.",
    )
    adapter_memory: CacheSize | None = Field(
        default=None,
        description="Size of the engine's cache of registered adapters in main memory, part of resources.memory. An "
        "adapter that is not in the cache is read from the pod's disk when it is used. Absent: a quarter of "
        "resources.memory.",
    )
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(
        default=64, description="Maximum rank of an adapter (vLLM's --max-lora-rank)."
    )
    max_model_length: int | None = Field(
        default=None,
        ge=16,
        le=10_000_000,
        description="Maximum length of a request with its answer, in tokens. Absent: the model's limit.",
    )
    data_type: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="Data type of the weights."
    )
    kv_cache_memory: CacheSize | None = Field(
        default=None,
        description="Size of the KV cache. Absent: chosen by vLLM. Required on a CPU.",
    )
    args: list[Annotated[str, Field(max_length=1024)]] | None = Field(
        default=None, max_length=64, description="Additional arguments of `vllm serve`."
    )
    env: list[EnvironmentVariable] | None = Field(
        default=None, max_length=64, description="Additional environment variables of the engine's container."
    )

    @property
    def adapter_capacity(self) -> int:
        """Maximum number of registered adapters per pod."""
        return max(_DEFAULT_MAX_ADAPTERS, self.max_loras) if self.max_adapters is None else self.max_adapters


class Requests(ApiModel):
    """Limits on requests to the shared engine. Other requests are rejected with status 400 and an explanation."""

    allow_prompt_logprobs: bool = Field(
        default=False,
        description="Accept prompt_logprobs, and echo with logprobs: they take memory for the prompt's length "
        "times the vocabulary. Always rejected on CPUs.",
    )
    allow_media_urls: bool = Field(
        default=False,
        description="Allow the engine to download images, audio and video from http:// and https:// URLs of clients "
        "at public addresses, without a proxy. data: URLs are always accepted.",
    )
    allow_chat_template: bool = Field(
        default=False,
        description="Accept chat_template, a program that runs in the shared engine, and any chat_template_kwargs. "
        "Otherwise chat_template_kwargs accepts at most 16 plain values for the model's own template, such as "
        "enable_thinking.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Maximum number of tokens of an answer, also for requests without a limit. Absent: the model's "
        "length.",
    )
    max_choices: int = Field(
        default=16, ge=1, le=1024, description="Maximum number of sequences per request: n or beams, times prompts."
    )


class RollingUpdate(ApiModel):
    """Replacement of the pods when their template changes, by a new spec or a new release of the installation."""

    max_surge: Literal[0, 1] | None = Field(
        default=None,
        description="Number of additional pods during an update. 1: a pod stops after its replacement is ready and has "
        "loaded the adapters; 0 is used if no node has room for 60 s. 0: a pod stops before its replacement starts. "
        "Absent: 1 for a pool of one pod or if a node has room, otherwise 0.",
    )
    on_failure: Literal["Wait", "RollBack"] = Field(
        default="Wait",
        description="Reaction to a new pod that does not become ready after a change of the spec. Wait: the pods with "
        "the previous settings keep running, and the new pod stays, with its problem in the status. RollBack: after a "
        "minute the pods get the last settings with which all of them served, until the spec changes. A failed update "
        "of the installation is never rolled back.",
    )


class AllowedNamespaces(ApiModel):
    """Namespaces that may attach adapters and call the base."""

    rules = (
        Rule(
            "(has(self.from) && self.from == 'Selector') == has(self.selector)",
            "allowedNamespaces.selector and from: Selector require each other: set both, or remove the selector",
            lambda self: (self.from_ == "Selector") == (self.selector is not None),
        ),
    )

    from_: Literal["Same", "All", "Selector"] = Field(
        default="Same",
        alias="from",
        description="Namespaces that are allowed. Same: the pool's own. All: every namespace. Selector: the pool's "
        "own, and those whose labels match selector.",
    )
    selector: LabelSelector | None = Field(
        default=None, description="Label selector of namespaces, for from: Selector."
    )

    def admits(self, own: str, namespace: str, labels: Mapping[str, str] | None) -> bool:
        """Return True if a namespace may attach adapters and call the base.

        Args:
            own: the pool's namespace, which is always allowed.
            namespace: the namespace to check.
            labels: its labels; None: unknown, so no selector matches.
        """
        if namespace == own or self.from_ == "All":
            return True
        return self.selector is not None and labels is not None and self.selector.matches(labels)


class ServingPoolSpec(ApiModel):
    """A base model on vLLM pods."""

    rules = (
        Rule(
            "self.baseModel == oldSelf.baseModel",
            "baseModel is immutable, because adapters belong to it: create another ServingPool",
        ),
        Rule(
            "self.modelName == oldSelf.modelName",
            "modelName is immutable, because clients use it: create another ServingPool",
        ),
        replicas_or_autoscaling,
        Rule(
            "!has(self.engine.adapterMemory) || !isQuantity(string(self.resources.memory)) || "
            "quantity(self.engine.adapterMemory).compareTo(quantity(string(self.resources.memory))) < 0",
            "engine.adapterMemory must be below resources.memory, of which it is a part",
            lambda self: (
                self.engine.adapter_memory is None
                or quantity_value(self.engine.adapter_memory) < quantity_value(self.resources.memory)
            ),
        ),
        cache_rule,
    )

    model_name: ModelName = Field(description="Model name of the base model in clients' requests.")
    base_model: PoolBaseModel = Field(description="Base model of the pool.")
    equivalent_to: Fingerprint | None = Field(
        default=None,
        description="Fingerprint of the base model that this base model replaces, for example the original of a "
        "quantised model: status.baseModelFingerprint of a pool with that base model. Adapters of the original may "
        "attach, and their parity check shows how far the engine's answers are from the trained ones. Absent: no other "
        "adapters attach.",
    )
    base_model_cache: BaseModelCache | None = Field(
        default=None, description="Cache of downloaded base models. Absent: every pod downloads the base model."
    )
    engine: Engine = Field(default_factory=Engine, description="Settings of the vLLM server.")
    resources: Resources = Field(default_factory=Resources, description="Resources of each engine container.")
    scheduling: Scheduling = Field(default_factory=Scheduling, description="Scheduling constraints of the pods.")
    replicas: int = Field(default=1, ge=0, le=1000, description="Number of pods. Immutable while autoscaling is set.")
    autoscaling: PoolAutoscaling | None = Field(
        default=None, description="Autoscaling of the pods. Absent: replicas is used."
    )
    drain_seconds: int = Field(
        default=60, ge=0, le=3600, description="Seconds for which a terminating pod waits for its running requests."
    )
    hold_seconds: int | None = Field(
        default=None,
        ge=0,
        le=3600,
        description="Seconds for which the gateway keeps a request that no pod can serve yet, such as while an engine "
        "starts again after a crash. Absent: one and a half times status.engineStartSeconds plus 15, at most 600.",
    )
    rolling_update: RollingUpdate = Field(
        default_factory=RollingUpdate, description="Replacement of the pods when their template changes."
    )
    allowed_namespaces: AllowedNamespaces = Field(
        default_factory=AllowedNamespaces, description="Namespaces that may attach adapters and call the base model."
    )
    requests: Requests = Field(default_factory=Requests, description="Limits on clients' requests.")


class PoolPhase(StrEnum):
    """Summary of the conditions, for people."""

    PENDING = "Pending"
    AVAILABLE = "Available"
    DEGRADED = "Degraded"


class PodUsage(StatusModel):
    """Adapters of one pod, and the disk and memory that they occupy."""

    name: str = Field(max_length=253, description="Name of the pod.")
    registered: int = Field(default=0, description="Number of adapters that its engine has registered.")
    active: int = Field(default=0, description="Number of adapters with requests in its engine.")
    waiting: int = Field(default=0, description="Number of adapters whose requests wait for a slot of its engine.")
    disk_bytes: int = Field(default=0, description="Size of the adapters' files on its disk.")
    disk_limit_bytes: int = Field(default=0, description="Highest size of those files: serving.adapterStorage.")
    memory_bytes: int = Field(default=0, description="Size of its engine's cache of adapters in main memory.")
    memory_limit_bytes: int | None = Field(
        default=None, description="Highest size of that cache: engine.adapterMemory. Absent: unknown."
    )
    reloads: int = Field(
        default=0,
        description="Number of times that its engine read an adapter's files again, since its start, because the cache "
        "no longer had the adapter.",
    )


class PoolRollback(StatusModel):
    """Record of the last good spec, with rollingUpdate.onFailure: RollBack."""

    good_spec: str = Field(
        max_length=2**18, description="Last spec with which all pods served, as JSON without the fields of scaling."
    )
    rejected_spec: str | None = Field(
        default=None, max_length=64, description="Digest of the spec that failed; until it changes, goodSpec is used."
    )
    reason: str | None = Field(default=None, max_length=1024, description="Failure of the rejected spec.")


class EngineCrashStatus(StatusModel):
    """A crash of an engine."""

    pod: str = Field(max_length=253, description="Name of the pod.")
    time: datetime = Field(description="Time of the crash.")
    message: str = Field(max_length=1024, description="Reason and last error line of the engine.")


class RefusedRequest(StatusModel):
    """A request that gateways refuse because it was in flight at several crashes."""

    digest: str = Field(max_length=64, description="First digits of its digest, which the client's error contains too.")
    model: str = Field(max_length=256, description="Revision or base model that it was sent to.")
    crashes: int = Field(description="Number of crashes.")
    until: datetime = Field(description="Time until which it is refused.")


class ServingPoolStatus(StatusModel):
    """Observed state of a ServingPool."""

    phase: PoolPhase | None = Field(
        default=None,
        description="Summary of the conditions. Pending: no pod is ready. Available: at least one pod is ready. "
        "Degraded: a problem needs action; see reason.",
    )
    reason: str | None = Field(
        default=None, max_length=64, description="Reason of the condition that the phase is derived from."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Conditions: Available, Progressing, Degraded, Updated, with baseModel.from Resolved, and with "
        "autoscaling ScalingActive.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    observed_generation: int | None = Field(default=None, description="Observed metadata.generation.")
    base_model_fingerprint: str | None = Field(
        default=None, max_length=128, description="Content fingerprint of the base model, as reported by the pods."
    )
    base_model: PodBaseModel | None = Field(
        default=None, description="Arrival of the base model on the newest pod that has it. Absent for mounted models."
    )
    base_model_artifact: BaseModelArtifact | None = Field(
        default=None,
        description="With baseModel.from: the artifact that the pods get. It stays while the FineTuneJob is missing, "
        "or runs again.",
    )
    desired_replicas: int | None = Field(default=None, description="Desired number of pods.")
    desired_reason: str | None = Field(default=None, max_length=1024, description="Reason for desiredReplicas.")
    replicas: int | None = Field(default=None, description="Number of pods.")
    ready_replicas: int | None = Field(default=None, description="Number of ready pods.")
    adapters: int | None = Field(default=None, description="Number of attached AdapterDeployments.")
    ready: str | None = Field(default=None, max_length=16, description="Ready and desired pods, such as 2/3.")
    registered_adapters: int | None = Field(
        default=None, description="Number of adapters on the pods; an adapter on two pods counts twice."
    )
    adapter_capacity: int | None = Field(
        default=None, description="Highest number of adapters on the pods: engine.maxAdapters of each."
    )
    active_adapters: int | None = Field(
        default=None, description="Number of adapters with requests in the engines, as of at most 10 s ago."
    )
    adapter_slots: int | None = Field(default=None, description="Number of adapter slots: engine.maxLoras of each pod.")
    pods: list[PodUsage] = Field(
        default_factory=list,
        max_length=MAX_LISTED_PODS,
        description=f"Use of the pods by adapters, as of at most 10 s ago; of the first {MAX_LISTED_PODS} pods.",
    )
    selector: str | None = Field(default=None, max_length=256, description="Label selector for the scale subresource.")
    rollback: PoolRollback | None = Field(
        default=None, description="Record of the last good spec, with rollingUpdate.onFailure: RollBack."
    )
    engine_start_seconds: int | None = Field(
        default=None,
        ge=0,
        description="Seconds from the start of an engine's process until it accepted adapters: the longest of the "
        "pods' latest starts.",
    )
    engine_crashes: int | None = Field(
        default=None, description="Number of crashes of the current pods' engines in the past hour."
    )
    latest_crash: EngineCrashStatus | None = Field(default=None, description="The latest of these crashes.")
    refused_requests: list[RefusedRequest] | None = Field(
        default=None,
        max_length=32,
        description="Requests that were in flight at two or more crashes, which gateways refuse for an hour.",
    )


class ServingPool(ApiModel):
    """A base model on vLLM pods that many adapters share."""

    model_config = ConfigDict(extra="ignore")
    rules = (
        Rule(
            "size(self.metadata.name) <= 40",
            "metadata.name must have at most 40 characters, because it is part of the names of pods",
            lambda self: len(self.metadata.name) <= MAX_NAME,
        ),
    )

    api_version: Literal["tunesmith.dev/v1alpha1"] = API_VERSION
    kind: Literal["ServingPool"] = "ServingPool"
    metadata: ObjectMeta
    spec: ServingPoolSpec
    status: ServingPoolStatus = Field(default_factory=ServingPoolStatus)

    def admits(self, namespace: str, labels: Mapping[str, str] | None) -> bool:
        """Return True if a namespace with these labels may attach adapters; see `AllowedNamespaces.admits`."""
        return self.spec.allowed_namespaces.admits(self.metadata.namespace, namespace, labels)

    def serves(self, fingerprint: str) -> bool:
        """Return True if adapters that were trained on the base model with this fingerprint may attach."""
        return fingerprint in {self.status.base_model_fingerprint, self.spec.equivalent_to}

    @property
    def hold_seconds(self) -> float | None:
        """Time for which a gateway keeps a request that no pod can serve yet; None if no start was measured."""
        if self.spec.hold_seconds is not None:
            return self.spec.hold_seconds
        start = self.status.engine_start_seconds
        return None if start is None else min(_MAX_HOLD_SECONDS, 1.5 * start + _HOLD_MARGIN_SECONDS)

    @property
    def base_job(self) -> tuple[str, str] | None:
        """Namespace and name of the FineTuneJob whose whole model is the base; None for a base with a uri."""
        if self.spec.base_model.from_ is None:
            return None
        job = self.spec.base_model.from_.fine_tune_job
        return job.namespace or self.metadata.namespace, job.name

    @property
    def model(self) -> str:
        """Global ID of the base, `<namespace>/<modelName>`."""
        return f"{self.metadata.namespace}/{self.spec.model_name}"
