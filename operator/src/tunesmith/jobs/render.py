"""Jobs of the trainer's image and their pods, which meet the pod security standard `restricted`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.api.credentials import REPORTING_SECRET, STORE_SECRET
from tunesmith.contracts.environment import ALLOWED_ADDRESSES, LM_EVAL_TASKS
from tunesmith.contracts.location import CLAIMS_FOLDER
from tunesmith.contracts.progress import PROGRESS_PORT
from tunesmith.jobs.observe import CONTAINER
from tunesmith.storage.schemes import STORE_KEYS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tunesmith.contracts.result import ExitCode
    from tunesmith.jobs.settings import JobSettings

Object = dict[str, Any]

JOB_FOLDER = "/etc/tunesmith/job"
"""Mount path of the ConfigMap of a pod."""
SECRETS_FOLDER = "/etc/tunesmith/secrets"
USER_ID = 65532
GRACE_SECONDS = 120
"""Time for a checkpoint at the end of the current step, and for its upload."""
_REQUESTED_STORAGE = "256Mi"
"""A small request, because a job's need for disk space is unknown before its validation."""


@dataclass(frozen=True)
class PodInputs:
    """Arguments and inputs of a pod.

    Attributes:
        arguments: arguments of the trainer.
        resources: requests and limits, without storage.
        configuration: name of the ConfigMap that is mounted; None: none.
        secrets: names of the Secrets with credentials.
        claims: names of the PersistentVolumeClaims, which are mounted read-only.
        images: references of the images that are mounted, by the name of the folder beside those of the claims.
        scheduling: further fields of the pod.
        shared_memory: True if its processes exchange data through shared memory, which is 64 MiB by default.
    """

    arguments: list[str]
    resources: Object
    configuration: str | None = None
    secrets: Iterable[str] = ()
    claims: Iterable[str] = ()
    images: Mapping[str, str] = field(default_factory=dict)
    scheduling: Object = field(default_factory=dict)
    shared_memory: bool = False


def pod(settings: JobSettings, labels: Mapping[str, str], inputs: PodInputs) -> Object:
    """Return the template of a pod that runs the trainer."""
    secrets, claims = list(dict.fromkeys(inputs.secrets)), list(dict.fromkeys(inputs.claims))
    mounted, shared = inputs.configuration is not None, inputs.shared_memory
    return {
        "metadata": {"labels": dict(labels)},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **inputs.scheduling,
            "containers": [
                {
                    "name": CONTAINER,
                    "image": settings.trainer_image,
                    "imagePullPolicy": settings.image_pull_policy,
                    "command": ["tunesmith-trainer"],
                    "args": inputs.arguments,
                    "envFrom": [{"secretRef": {"name": STORE_SECRET}}],
                    "env": [
                        {"name": "HOME", "value": "/tmp"},  # noqa: S108 - an emptyDir of the pod
                        # Set even if empty, so that keys of the Secret above, which become variables, cannot set them.
                        {"name": LM_EVAL_TASKS, "value": settings.lm_eval_tasks},
                        {"name": ALLOWED_ADDRESSES, "value": ",".join(settings.allowed_addresses)},
                    ],
                    "ports": [{"name": "progress", "containerPort": PROGRESS_PORT}],
                    "resources": _with_storage(inputs.resources, settings.job_storage),
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "volumeMounts": [
                        *([{"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}] if mounted else []),
                        {"name": "work", "mountPath": "/work"},
                        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of the pod
                        *([{"name": "shm", "mountPath": "/dev/shm"}] if shared else []),  # noqa: S108 - an emptyDir
                        *(
                            {"name": f"secret-{index}", "mountPath": f"{SECRETS_FOLDER}/{name}", "readOnly": True}
                            for index, name in enumerate(secrets)
                        ),
                        *(
                            {"name": f"claim-{index}", "mountPath": f"{CLAIMS_FOLDER}/{name}", "readOnly": True}
                            for index, name in enumerate(claims)
                        ),
                        *(
                            {"name": f"image-{index}", "mountPath": f"{CLAIMS_FOLDER}/{name}", "readOnly": True}
                            for index, name in enumerate(inputs.images)
                        ),
                    ],
                }
            ],
            "volumes": [
                *([{"name": "job", "configMap": {"name": inputs.configuration}}] if mounted else []),
                {"name": "work", "emptyDir": {"sizeLimit": settings.job_storage}},
                {"name": "tmp", "emptyDir": {"sizeLimit": settings.job_storage}},
                *([{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}] if shared else []),
                # Optional: the kubelet would wait silently for a missing Secret; the trainer reports which one is
                # missing.
                *(
                    {"name": f"secret-{index}", "secret": {"secretName": name, "optional": True, **_secret_items(name)}}
                    for index, name in enumerate(secrets)
                ),
                *(
                    {"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": name, "readOnly": True}}
                    for index, name in enumerate(claims)
                ),
                *(
                    {"name": f"image-{index}", "image": {"reference": reference, "pullPolicy": "IfNotPresent"}}
                    for index, reference in enumerate(inputs.images.values())
                ),
            ],
        },
    }


def job(metadata: Object, template: Object, rules: list[Object], *, retries: int) -> Object:
    """Return the Job of one pod at a time.

    Args:
        metadata: metadata of the Job.
        template: template of its pods.
        rules: rules of its pod failure policy.
        retries: number of pods that it starts after failures that no rule matches.
    """
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": retries,
            # A second pod must not start while the first is still writing.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": rules},
            "template": template,
        },
    }


def on_disruption(action: str) -> Object:
    """Return the rule for a pod that was evicted or pre-empted, or whose node disappeared."""
    return {"action": action, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def on_exit_codes(action: str, code: ExitCode) -> Object:
    """Return the rule for an exit code of the trainer."""
    return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [int(code)]}}


def owner_reference(api_version: str, kind: str, name: str, uid: str) -> Object:
    """Return the reference to the controlling owner, which is deleted without waiting for its dependents."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def _with_storage(resources: Object, storage: str) -> Object:
    """Return the resources with a limit on everything that the pod writes to its node's disk, volumes included."""
    return {
        "requests": {**resources["requests"], "ephemeral-storage": _REQUESTED_STORAGE},
        "limits": {**resources["limits"], "ephemeral-storage": storage},
    }


def _secret_items(secret: str) -> Object:
    """Return the volume items of a Secret: the stores' keys only, but all keys of the reporting Secret."""
    return {} if secret == REPORTING_SECRET else {"items": [{"key": key, "path": key} for key in STORE_KEYS]}
