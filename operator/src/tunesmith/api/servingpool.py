"""ServingPool: a base model on vLLM pods that many adapters share."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field

from tunesmith.api import engine_arguments
from tunesmith.api.conditions import Condition
from tunesmith.api.finetunejob import BaseModelSource
from tunesmith.api.model import API_VERSION, MAX_NAME, ApiModel, ObjectMeta, Rule, StatusModel, StringPattern
from tunesmith.api.placement import Resources, Scheduling
from tunesmith.api.selector import LabelSelector

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_MODEL_NAME = 63
ModelName = Annotated[
    str,
    Field(min_length=1, max_length=MAX_MODEL_NAME),
    StringPattern(
        r"^[a-zA-Z0-9]([-a-zA-Z0-9._]*[a-zA-Z0-9])?$",
        "a model name has letters, digits, '-', '.' and '_', and begins and ends with a letter or digit",
    ),
]
CacheSize = Annotated[
    str,
    Field(max_length=32),
    StringPattern(r"^[0-9]+(Mi|Gi)$", "a cache size is a whole number with the unit Mi or Gi, such as 512Mi"),
]

min_below_max = Rule(
    "self.minReplicas <= self.maxReplicas",
    "autoscaling.minReplicas must not be above autoscaling.maxReplicas",
    lambda self: self.min_replicas <= self.max_replicas,
)
replicas_or_autoscaling = Rule(
    # While autoscaling is set, replicas does not change; when autoscaling is added, replicas is the default or
    # unchanged.
    "!has(self.autoscaling) || (oldSelf.hasValue() && self.replicas == oldSelf.value().replicas) || "
    "(self.replicas == 1 && !(oldSelf.hasValue() && has(oldSelf.value().autoscaling)))",
    "replicas is decided by autoscaling: remove autoscaling first",
    old=True,
)


class EnvironmentVariable(ApiModel):
    """A variable of the engine's container."""

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Name.")
    value: str = Field(default="", max_length=4096, description="Value. Not for secrets.")


class Engine(ApiModel):
    """Settings of the vLLM server."""

    # For stored pools that violate these rules the operator sets a condition, by `serving.render.reserved`.
    rules = (
        Rule(
            engine_arguments.ARGUMENTS_CEL,
            "engine.args must not hold reserved arguments nor abbreviations of them: remove them; docs/requests.md "
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
            "engine.args must not hold short forms: write the long name of each argument",
        ),
        Rule(
            engine_arguments.VARIABLES_CEL,
            "engine.env must not hold what the pool sets, loads code or opens the engine: remove it; reserved are "
            + ", ".join(engine_arguments.RESERVED_VARIABLES),
        ),
    )

    image: str | None = Field(
        default=None, min_length=1, max_length=512, description="vLLM's image. Absent: the installation's default."
    )
    max_loras: int = Field(
        default=8, ge=1, le=256, description="Adapters that one pod keeps resident (vLLM's --max-loras)."
    )
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(
        default=64, description="Highest rank that is accepted (vLLM's --max-lora-rank)."
    )
    max_model_length: int | None = Field(
        default=None, ge=16, le=10_000_000, description="Longest request, in tokens. Absent: the model's own limit."
    )
    data_type: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="Precision of the weights."
    )
    kv_cache_memory: CacheSize | None = Field(
        default=None,
        description="KV cache size. Absent: decided by vLLM; needed on a CPU.",
    )
    args: list[Annotated[str, Field(max_length=1024)]] | None = Field(
        default=None, max_length=64, description="More arguments of `vllm serve`."
    )
    env: list[EnvironmentVariable] | None = Field(
        default=None, max_length=64, description="More variables of the engine's container."
    )


class PoolAutoscaling(ApiModel):
    """Bounds and target for the number of pods."""

    rules = (min_below_max,)

    min_replicas: int = Field(default=1, ge=1, le=1000, description="Fewest pods.")
    max_replicas: int = Field(ge=1, le=1000, description="Most pods.")
    target_concurrency: int = Field(
        default=16,
        ge=1,
        le=10000,
        description="Requests, of all adapters and the base, that one pod should handle at once.",
    )
    scale_down_delay_seconds: int = Field(
        default=120, ge=0, le=86400, description="Seconds that fewer pods must be enough before one is removed."
    )


class Requests(ApiModel):
    """Limits on requests to the shared engine. Other requests are refused with 400 and an explanation."""

    allow_prompt_logprobs: bool = Field(
        default=False,
        description="Accept prompt_logprobs, and echo with logprobs: a long prompt takes memory for its whole length "
        "times the vocabulary. Refused on CPUs in any case.",
    )
    allow_media_urls: bool = Field(
        default=False,
        description="Let the engine fetch http:// and https:// images, sounds and videos that clients name; it can "
        "reach what the pod can reach. data: URLs are always accepted.",
    )
    allow_chat_template: bool = Field(
        default=False,
        description="Accept chat_template, which is a program that the engine runs for all clients, and any "
        "chat_template_kwargs. Otherwise chat_template_kwargs takes at most 16 plain values: they are data for the "
        "model's own template, such as enable_thinking.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Most tokens of one answer; also for requests that name no limit. Absent: the model's length.",
    )
    max_choices: int = Field(
        default=16, ge=1, le=1024, description="Most sequences of one request: n or beams, times prompts."
    )


class RollingUpdate(ApiModel):
    """Replacement of the pods when their template changes, by a new spec or a new release of the installation."""

    max_surge: Literal[0, 1] | None = Field(
        default=None,
        description="1: a pod stops after its replacement is ready and holds its adapters, which takes room for one "
        "more pod meanwhile; 0 is used if no node has room for 60 s. 0: it stops before. Absent: 1 for a pool of one "
        "pod or where a node has room, otherwise 0.",
    )


class AllowedNamespaces(ApiModel):
    """Namespaces that may attach adapters and call the base."""

    rules = (
        Rule(
            "(has(self.from) && self.from == 'Selector') == has(self.selector)",
            "allowedNamespaces.selector belongs to from: Selector, which needs it: set both, or remove the selector",
            lambda self: (self.from_ == "Selector") == (self.selector is not None),
        ),
    )

    from_: Literal["Same", "All", "Selector"] = Field(
        default="Same",
        alias="from",
        description="Same: the pool's own namespace. All: every namespace. Selector: the pool's own, and those whose "
        "labels match selector.",
    )
    selector: LabelSelector | None = Field(default=None, description="Labels of namespaces, for from: Selector.")

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
            "baseModel is immutable: adapters belong to one base; create another ServingPool",
        ),
        Rule(
            "self.modelName == oldSelf.modelName",
            "modelName is immutable: clients call the base under it; create another ServingPool",
        ),
        replicas_or_autoscaling,
    )

    model_name: ModelName = Field(description="Name under which the base itself is callable.")
    base_model: BaseModelSource = Field(description="The base model.")
    engine: Engine = Field(default_factory=Engine, description="The vLLM server's settings.")
    resources: Resources = Field(default_factory=Resources, description="What one engine container asks for.")
    scheduling: Scheduling = Field(default_factory=Scheduling, description="Where the pods may run.")
    replicas: int = Field(default=1, ge=0, le=1000, description="Pods. With autoscaling it must stay as it is.")
    autoscaling: PoolAutoscaling | None = Field(default=None, description="Absent: replicas decides.")
    drain_seconds: int = Field(
        default=60, ge=0, le=3600, description="Seconds that a stopping pod waits for its running requests."
    )
    rolling_update: RollingUpdate = Field(
        default_factory=RollingUpdate, description="Replacement of the pods when their template changes."
    )
    allowed_namespaces: AllowedNamespaces = Field(default_factory=AllowedNamespaces, description="Who may attach.")
    requests: Requests = Field(default_factory=Requests, description="What clients may ask of the shared engine.")


class PoolPhase(StrEnum):
    """Summary of the conditions, for people."""

    PENDING = "Pending"
    AVAILABLE = "Available"
    DEGRADED = "Degraded"


class ServingPoolStatus(StatusModel):
    """Observed state of a ServingPool."""

    phase: PoolPhase | None = Field(default=None, description="Derived from the conditions.")
    reason: str | None = Field(
        default=None, max_length=64, description="Reason of the condition that the phase is derived from."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Available, Progressing, Degraded, Updated; with autoscaling ScalingActive.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    observed_generation: int | None = Field(default=None, description="The metadata.generation that was acted on.")
    base_model_fingerprint: str | None = Field(
        default=None, max_length=128, description="Content fingerprint of the base, as the pods report it."
    )
    desired_replicas: int | None = Field(default=None, description="Pods that are wanted now.")
    desired_reason: str | None = Field(default=None, max_length=1024, description="Why that many.")
    replicas: int | None = Field(default=None, description="Pods that exist.")
    ready_replicas: int | None = Field(default=None, description="Pods that are ready.")
    adapters: int | None = Field(default=None, description="AdapterDeployments that are attached.")
    slots_used: int | None = Field(default=None, description="Adapter copies placed on the pods.")
    slots_free: int | None = Field(default=None, description="Adapter copies that would still fit.")
    selector: str | None = Field(default=None, max_length=256, description="Label selector for /scale.")


class ServingPool(ApiModel):
    """A base model on vLLM pods that many adapters share."""

    model_config = ConfigDict(extra="ignore")
    rules = (
        Rule(
            "size(self.metadata.name) <= 40",
            "metadata.name must have at most 40 characters: names of pods are made from it",
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

    @property
    def model(self) -> str:
        """Global id of the base, `<namespace>/<modelName>`."""
        return f"{self.metadata.namespace}/{self.spec.model_name}"
