"""Rendering of a ServingPool's objects, such as its Deployment and Secret. Each builder returns the full intent."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from tunesmith.api.credentials import STORE_SECRET
from tunesmith.api.engine_arguments import refused_arguments, reserved_variable
from tunesmith.api.model import API_VERSION
from tunesmith.api.placement import quantity_value
from tunesmith.contracts.agent import AGENT_PORT, ENGINE_PORT
from tunesmith.contracts.environment import (
    ADAPTER_MEMORY,
    ADMIN_TOKEN,
    ADMIN_TOKEN_FILE,
    AGENT_KEYS_FOLDER,
    AGENT_STATE_FOLDER,
    AGENT_URL,
    ALLOWED_ADDRESSES,
    CONTROL_KEY,
    EVENTS_KEY,
    METRICS_DIGEST,
    POD_UID,
    REQUESTS,
    SERVING_KEY,
    SERVING_KEY_FILE,
)
from tunesmith.contracts.labels import POOL_LABEL, POOL_UID_LABEL
from tunesmith.contracts.location import owned_name
from tunesmith.contracts.network import NetworkPolicySettings, network_policy
from tunesmith.contracts.ownership import controller_of
from tunesmith.serving import base_model
from tunesmith.serving.pod import (
    AGENT_CONTAINER,
    BASE_MODEL_ANNOTATION,
    BASE_MODEL_CONTAINER,
    ENGINE_CONTAINER,
    READINESS_GATE,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunesmith.api.servingpool import ServingPool
    from tunesmith.serving.settings import PoolSettings

Manifest = dict[str, Any]

_USER = 65532
_POD_UID: Manifest = {"name": POD_UID, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
_RUN = str(AGENT_STATE_FOLDER)
_ENGINE_KEYS = "/etc/tunesmith/engine"
_ADMIN_TOKEN_FILE = str(AGENT_STATE_FOLDER / ADMIN_TOKEN)
_SECRETS = "/etc/tunesmith/secrets"
_LOG_STORAGE = 2**30
"""Bytes of storage for data that a container writes outside its volumes, such as its log."""
_RUN_SIZE = 256 * 2**20
_TEMPORARY_SIZE = 2**30
_ENGINE_TEMPORARY_SIZE = 20 * 2**30
"""Bytes of storage for the engine's compiled kernels and caches."""
_REQUESTED_STORAGE = "256Mi"
_DRAIN_MARGIN_SECONDS = 30
_START_SECONDS = 3600
_PROBE_SECONDS = 5
_READINESS_SECONDS = 2
_LIVENESS_SECONDS = 10
_CPU_TIMEOUTS = ["--hang-seconds", "120", "--stall-seconds", "60"]
"""Agent arguments that allow an engine on CPUs more time between tokens: while another engine started on the same
cores, one generated none for more than 30 s."""
# The kubelet's HTTP hooks cannot send a token from a file, so the engine's container calls its agent with the token
# that both share: the pool's control key is not in the engine's container.
_DRAIN = (
    "import urllib.request as r;"
    f"t=open('{_ADMIN_TOKEN_FILE}').read().strip();"
    f"q=r.Request('http://127.0.0.1:{AGENT_PORT}/drain',method='POST',headers={{'Authorization':'Bearer '+t}});"
    "r.urlopen(q,timeout=%d)"
)


def deployment_name(pool: ServingPool) -> str:
    """Name of the pool's Deployment and of its disruption budget."""
    return owned_name(pool.metadata.name, pool.metadata.uid, "pool")


def secret_name(pool: ServingPool) -> str:
    """Name of the Secret that holds the pool's keys."""
    return owned_name(pool.metadata.name, pool.metadata.uid, "keys")


def pod_selector(pool: ServingPool) -> dict[str, str]:
    """Return the labels that select exactly the pool's pods."""
    return {POOL_LABEL: pool.metadata.name, POOL_UID_LABEL: pool.metadata.uid}


def is_owned_by(pool: ServingPool, item: Manifest) -> bool:
    """Return True if the pool is the controlling owner of an object in its namespace."""
    owner = controller_of(item, pool.kind)
    same_namespace = item["metadata"].get("namespace") == pool.metadata.namespace
    return same_namespace and owner is not None and owner.get("uid") == pool.metadata.uid


def is_pod_of(pool: ServingPool, pod: Manifest) -> bool:
    """Return True if a pod was created by a ReplicaSet of the pool's Deployment."""
    metadata = pod["metadata"]
    labels = metadata.get("labels") or {}
    owner = controller_of(pod, "ReplicaSet")
    return (
        metadata.get("namespace") == pool.metadata.namespace
        and pod_selector(pool).items() <= labels.items()
        and owner is not None
        and owner.get("name") == f"{deployment_name(pool)}-{labels.get('pod-template-hash', '')}"
    )


def selector_text(pool: ServingPool) -> str:
    """Return the label selector of the scale subresource."""
    return ",".join(f"{key}={value}" for key, value in pod_selector(pool).items())


def reserved(pool: ServingPool) -> str | None:
    """Return a sentence about arguments or variables that the spec must not contain; None if it has none.

    The API server does not check objects that were stored before the rule existed.
    """
    arguments = refused_arguments(pool.spec.engine.args or ())
    if arguments:
        return " ".join(arguments)
    variables = sorted({variable.name for variable in pool.spec.engine.env or () if reserved_variable(variable.name)})
    if variables:
        return f"engine.env must not hold {', '.join(variables)}: the pool sets or reserves them; remove them"
    return None


def key_secret(pool: ServingPool, files: Mapping[str, bytes]) -> Manifest:
    """Return the Secret with the keys from which the pool's agents and engines derive their tokens, by entry."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(pool, secret_name(pool)),
        "type": "Opaque",
        "data": {name: base64.b64encode(content).decode() for name, content in files.items()},
    }


def isolation(pool: ServingPool, network: NetworkPolicySettings) -> Manifest:
    """Return the NetworkPolicy of the pool's pods: gateways reach engines and agents, the operator reaches agents."""
    ingress = [network.admit(AGENT_PORT, "operator", "gateway"), network.admit(ENGINE_PORT, "gateway")]
    return network_policy(_metadata(pool, deployment_name(pool)), pod_selector(pool), ingress)


def disruption_budget(pool: ServingPool) -> Manifest:
    """Return the PodDisruptionBudget: one pod is evicted at a time, and an unready pod never blocks a node's drain."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(pool, deployment_name(pool)),
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": pod_selector(pool)},
        },
    }


def deployment(pool: ServingPool, settings: PoolSettings, replicas: int, max_surge: int = 0) -> Manifest:
    """Return the Deployment. A changed template replaces pods one by one; `max_surge` 1 keeps the number of pods."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(pool, deployment_name(pool)),
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": _START_SECONDS,
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": max_surge, "maxUnavailable": 1 - max_surge},
            },
            "selector": {"matchLabels": pod_selector(pool)},
            "template": {
                "metadata": {
                    "labels": {**_labels(pool), POOL_UID_LABEL: pool.metadata.uid},
                    "annotations": _annotations(pool),
                },
                "spec": _pod(pool, settings),
            },
        },
    }


def _metadata(pool: ServingPool, name: str) -> Manifest:
    owner = {
        "apiVersion": API_VERSION,
        "kind": pool.kind,
        "name": pool.metadata.name,
        "uid": pool.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {"name": name, "namespace": pool.metadata.namespace, "labels": _labels(pool), "ownerReferences": [owner]}


def _annotations(pool: ServingPool) -> dict[str, str]:
    digest = base_model.artifact_digest(pool)
    base = {} if digest is None else {BASE_MODEL_ANNOTATION: digest}
    return {"kubectl.kubernetes.io/default-container": ENGINE_CONTAINER, **base}


def _labels(pool: ServingPool) -> dict[str, str]:
    return {
        "app.kubernetes.io/managed-by": "tunesmith",
        "app.kubernetes.io/component": "pool",
        POOL_LABEL: pool.metadata.name,
    }


def _pod(pool: ServingPool, settings: PoolSettings) -> Manifest:
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": pool.spec.drain_seconds + _DRAIN_MARGIN_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "readinessGates": [{"conditionType": READINESS_GATE}],
        # A mounted base model needs no download: the agent computes its fingerprint.
        "initContainers": [
            *([] if base_model.is_mounted(pool) else [_base_model(pool, settings)]),
            _agent(pool, settings),
        ],
        "containers": [_engine(pool, settings)],
        "volumes": _volumes(pool, settings),
        # Pods of one template are spread over nodes and zones as far as there is room.
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": pod_selector(pool)},
                "matchLabelKeys": ["pod-template-hash"],
            }
            for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
        ],
        **pool.spec.scheduling.pod_fields(),
    }


def _base_model(pool: ServingPool, settings: PoolSettings) -> Manifest:
    reference = pool.spec.base_model.secret_ref
    volume, secret = ("store-secret", STORE_SECRET) if reference is None else ("base-model-secret", reference.name)
    folder = f"{_SECRETS}/{secret}"  # contains the Secret's name, for messages
    mounts = [
        *base_model.mounts(pool, read_only=False),
        _mount("tmp-base-model", "/tmp"),  # noqa: S108 - an emptyDir of its own
        _mount(volume, folder, read_only=True),
    ]
    return {
        "name": BASE_MODEL_CONTAINER,
        **_agent_image_fields(settings, _volume_sizes(pool, settings)["models"] + base_model.FETCH_SIZE),
        "command": ["tunesmith-agent"],
        "args": base_model.fetch_arguments(pool, settings, folder),
        "volumeMounts": mounts,
    }


def _agent(pool: ServingPool, settings: PoolSettings) -> Manifest:
    engine = pool.spec.engine
    probe = {"httpGet": {"path": "/healthz", "port": AGENT_PORT}, "timeoutSeconds": 5}
    return {
        "name": AGENT_CONTAINER,
        "restartPolicy": "Always",
        **_agent_image_fields(settings, _volume_sizes(pool, settings)["adapters"] + _RUN_SIZE + _TEMPORARY_SIZE),
        "command": ["tunesmith-agent"],
        "args": [
            "serve",
            "--engine-url", f"http://127.0.0.1:{ENGINE_PORT}",
            "--port", str(AGENT_PORT),
            "--control-key-file", f"{AGENT_KEYS_FOLDER}/{CONTROL_KEY}",
            "--events-key-file", f"{AGENT_KEYS_FOLDER}/{EVENTS_KEY}",
            "--metrics-digest-file", f"{AGENT_KEYS_FOLDER}/{METRICS_DIGEST}",
            "--state", _RUN,
            "--adapters", "/adapters",
            "--store", settings.store,
            "--secret", f"{_SECRETS}/{STORE_SECRET}",
            "--storage", str(_bytes(settings.adapter_storage)),
            "--max-adapter-ratio", f"{settings.max_adapter_ratio:g}",
            "--base-fingerprint-file", base_model.FINGERPRINT_FILE,
            *base_model.artifact_arguments(pool),
            *base_model.equivalence_arguments(pool),
            *base_model.gpu_arguments(pool),
            "--max-lora-rank", str(engine.max_lora_rank),
            "--max-adapters", str(engine.adapter_capacity),
            "--drain-seconds", str(pool.spec.drain_seconds),
            *([] if pool.spec.resources.gpus else _CPU_TIMEOUTS),
        ],
        "env": [*_agent_image_variables(settings), _POD_UID],
        "ports": [{"name": "agent", "containerPort": AGENT_PORT, "protocol": "TCP"}],
        "startupProbe": {**probe, "periodSeconds": 1, "failureThreshold": 120},
        "livenessProbe": {**probe, "periodSeconds": 10, "failureThreshold": 6},
        "volumeMounts": [
            *base_model.mounts(pool, read_only=True),
            _mount("adapters", "/adapters"),
            _mount("run", _RUN),
            _mount("agent-keys", str(AGENT_KEYS_FOLDER), read_only=True),
            _mount("store-secret", f"{_SECRETS}/{STORE_SECRET}", read_only=True),
            _mount("tmp-agent", "/tmp"),  # noqa: S108 - an emptyDir of its own
        ],
    }  # fmt: skip


def _engine(pool: ServingPool, settings: PoolSettings) -> Manifest:
    resources = pool.spec.resources
    gpus = {resources.gpu_resource: str(resources.gpus)} if resources.gpus else {}
    health = {"httpGet": {"path": "/health", "port": ENGINE_PORT}, "timeoutSeconds": 10}
    return {
        "name": ENGINE_CONTAINER,
        "image": pool.spec.engine.image or settings.engine_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python3", "-m", "tunesmith_supervisor", base_model.BASE_FOLDER],
        "args": _engine_arguments(pool),
        "env": _engine_variables(pool),
        "ports": [{"name": "engine", "containerPort": ENGINE_PORT, "protocol": "TCP"}],
        "resources": {
            "requests": {
                "cpu": resources.cpu,
                "memory": resources.memory,
                "ephemeral-storage": _REQUESTED_STORAGE,
                **gpus,
            },
            "limits": {"memory": resources.memory, "ephemeral-storage": _engine_storage(pool, settings), **gpus},
        },
        "securityContext": _restricted(),
        "startupProbe": {
            **health,
            "periodSeconds": _PROBE_SECONDS,
            "failureThreshold": _START_SECONDS // _PROBE_SECONDS,
        },
        "readinessProbe": {**health, "periodSeconds": _READINESS_SECONDS, "failureThreshold": 3},
        # The supervisor kills a hung engine sooner. A restarted one may take as long as its first start.
        "livenessProbe": {
            **health,
            "periodSeconds": _LIVENESS_SECONDS,
            "failureThreshold": _START_SECONDS // _LIVENESS_SECONDS,
        },
        "lifecycle": {"preStop": {"exec": {"command": ["python3", "-c", _DRAIN % (pool.spec.drain_seconds + 10)]}}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            *base_model.mounts(pool, read_only=True),
            _mount("adapters", "/adapters", read_only=True),
            _mount("run", _RUN, read_only=True),
            _mount("engine-keys", _ENGINE_KEYS, read_only=True),
            _mount("shm", "/dev/shm"),  # noqa: S108 - the engine's processes share tensors in it; a pod's default has 64 MiB
            _mount("tmp-engine", "/tmp"),  # noqa: S108 - an emptyDir of its own
        ],
    }


def _engine_arguments(pool: ServingPool) -> list[str]:
    engine = pool.spec.engine
    # On CPUs, base requests batched with LoRA requests use the adapter in the last slot: the middleware keeps an empty
    # adapter there.
    empty = 1 if pool.spec.resources.gpus == 0 else 0
    arguments = [
        "--served-model-name", pool.model,
        "--port", str(ENGINE_PORT),
        "--enable-lora",
        "--max-loras", str(engine.max_loras + empty),
        "--max-lora-rank", str(engine.max_lora_rank),
        # The middleware limits the bytes of this cache (ADAPTER_MEMORY), which vLLM limits by number only.
        "--max-cpu-loras", str(engine.adapter_capacity + empty),
        "--middleware", "tunesmith_middleware.Middleware",
        "--dtype", engine.data_type,
        # xgrammar, vLLM's default, takes minutes for a hostile grammar and 0.8 s per token for a hostile regular
        # expression, and blocks all requests meanwhile; guidance bounds both.
        "--structured-outputs-config", json.dumps({"backend": "guidance"}),
        # Only the agent sets a priority, for its canary; priorities from clients are refused.
        "--scheduling-policy", "priority",
    ]  # fmt: skip
    requests = pool.spec.requests
    if requests.max_tokens is not None:  # for requests without a limit; higher limits are refused
        arguments += ["--override-generation-config", json.dumps({"max_new_tokens": requests.max_tokens})]
    if requests.allow_chat_template:
        arguments.append("--trust-request-chat-template")
    if engine.max_model_length is not None:
        arguments += ["--max-model-len", str(engine.max_model_length)]
    if engine.kv_cache_memory is not None:
        arguments += ["--kv-cache-memory-bytes", str(_bytes(engine.kv_cache_memory))]
    if pool.spec.resources.gpus > 1:
        arguments += ["--tensor-parallel-size", str(pool.spec.resources.gpus)]
    return [*arguments, *(engine.args or ())]


def _engine_variables(pool: ServingPool) -> list[Manifest]:
    own = {
        "PYTHONPATH": f"{_RUN}/middleware",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        SERVING_KEY_FILE: f"{_ENGINE_KEYS}/{SERVING_KEY}",
        ADMIN_TOKEN_FILE: _ADMIN_TOKEN_FILE,
        AGENT_URL: f"http://127.0.0.1:{AGENT_PORT}",
        REQUESTS: json.dumps(pool.spec.requests.manifest()),
        ADAPTER_MEMORY: str(_adapter_memory(pool)),
        # The engine runs in one pod: its processes' ports are not exposed to others.
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOOPBACK_IP": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "TP_SOCKET_IFNAME": "lo",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        # The engine's caches are in its home, and PyTorch looks up a user name that the image may lack.
        "HOME": "/tmp",  # noqa: S108 - an emptyDir of its own
        "USER": "tunesmith",
    }
    return [
        *({"name": name, "value": value} for name, value in own.items()),
        _POD_UID,
        *({"name": variable.name, "value": variable.value} for variable in pool.spec.engine.env or ()),
    ]


def _adapter_memory(pool: ServingPool) -> int:
    """Return the bytes of the engine's cache of adapters."""
    memory = pool.spec.engine.adapter_memory
    return int(quantity_value(pool.spec.resources.memory) // 4) if memory is None else _bytes(memory)


def _agent_image_fields(settings: PoolSettings, storage: int) -> Manifest:
    """Return the fields common to both containers of the agent's image; `storage`: bytes of their volumes."""
    return {
        "image": settings.agent_image,
        "imagePullPolicy": settings.image_pull_policy,
        "env": _agent_image_variables(settings),
        "resources": {
            "requests": {"cpu": "50m", "memory": "256Mi", "ephemeral-storage": _REQUESTED_STORAGE},
            "limits": {"memory": "1Gi", "ephemeral-storage": str(storage + _LOG_STORAGE)},
        },
        "securityContext": _restricted(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _agent_image_variables(settings: PoolSettings) -> list[Manifest]:
    return [
        {"name": "HOME", "value": "/tmp"},  # noqa: S108 - an emptyDir of its own
        {"name": ALLOWED_ADDRESSES, "value": ",".join(settings.allowed_addresses)},
    ]


def _engine_storage(pool: ServingPool, settings: PoolSettings) -> str:
    """Return the storage limit of the engine's container.

    The kubelet compares the size of the pod's volumes with the sum of all containers' limits.
    """
    sizes = _volume_sizes(pool, settings)
    return str(sizes["tmp-engine"] + sizes.get("models", 0) + _LOG_STORAGE)


def _restricted() -> Manifest:
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def _volume_sizes(pool: ServingPool, settings: PoolSettings) -> dict[str, int]:
    """Return the size limits in bytes of the volumes on the node's disk.

    A pod whose volume exceeds its limit is evicted, with the adapters of all tenants. So the agent and fetch-base
    enforce the sizes that the platform sets, and the limits are a sixteenth higher, for the file system's overhead.
    """
    sizes = {
        "adapters": _bytes(settings.adapter_storage) * 17 // 16,
        "run": _RUN_SIZE,
        "tmp-agent": _TEMPORARY_SIZE,
        "tmp-engine": _ENGINE_TEMPORARY_SIZE,
    }
    return sizes | base_model.volume_sizes(pool, settings)


def _volumes(pool: ServingPool, settings: PoolSettings) -> list[Manifest]:
    return [
        *({"name": name, "emptyDir": {"sizeLimit": str(size)}} for name, size in _volume_sizes(pool, settings).items()),
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pool.spec.resources.memory}},
        # Optional: no keys are needed if pods have a cloud identity. An adapter whose download needs keys reports that
        # they are missing, and the kubelet mounts a Secret that is created later.
        {"name": "store-secret", "secret": {"secretName": STORE_SECRET, "defaultMode": 0o440, "optional": True}},
        _keys(pool, "agent-keys", CONTROL_KEY, EVENTS_KEY, METRICS_DIGEST),
        _keys(pool, "engine-keys", SERVING_KEY),
        *base_model.volumes(pool),
    ]


def _keys(pool: ServingPool, volume: str, *entries: str) -> Manifest:
    items = [{"key": entry, "path": entry} for entry in entries]
    return {"name": volume, "secret": {"secretName": secret_name(pool), "defaultMode": 0o440, "items": items}}


def _mount(name: str, path: str, *, read_only: bool = False) -> Manifest:
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}


def _bytes(quantity: str) -> int:
    return int(quantity_value(quantity))
