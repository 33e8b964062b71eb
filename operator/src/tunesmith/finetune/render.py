"""Kubernetes objects of a FineTuneJob, each with its full intent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.api.credentials import REPORTING_SECRET, STORE_SECRET
from tunesmith.contracts.environment import ALLOWED_ADDRESSES, LM_EVAL_TASKS
from tunesmith.contracts.location import (
    CLAIMS_FOLDER,
    artifact_uri,
    checkpoints_uri,
    job_folder,
    owned_name,
    short_uid,
    tokens_uri,
    volume_claim,
)
from tunesmith.contracts.network import NetworkPolicySettings, network_policy
from tunesmith.contracts.progress import PROGRESS_PORT
from tunesmith.contracts.result import ExitCode
from tunesmith.finetune.observe import ATTEMPT_LABEL, COMPONENT_LABEL, CONTAINER, TRAIN, VALIDATE
from tunesmith.finetune.permission import sources
from tunesmith.finetune.start import source_name
from tunesmith.storage.schemes import STORE_KEYS

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.finetune.settings import JobSettings

Object = dict[str, Any]

JOB_LABEL = "tunesmith.dev/finetunejob"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
JOB_FOLDER = "/etc/tunesmith/job"
JOB_FILE = "job.yaml"
SECRETS_FOLDER = "/etc/tunesmith/secrets"
USER_ID = 65532
MASTER_PORT = 29500
"""Port on the first pod of an attempt, to which the other pods connect."""
GRACE_SECONDS = 120
"""Time for a checkpoint at the end of the current step, and for its upload."""
VALIDATION_MEMORY = "2Gi"
VALIDATION_SECONDS = 6 * 3600
"""Time for the checks of a job's data, after which the trainer stops with a message."""
_VALIDATION_MARGIN_SECONDS = 1800
"""Further time for the start of the pod, and for a trainer that does not stop."""
_VALIDATION_RESOURCES = {
    "requests": {"cpu": "500m", "memory": VALIDATION_MEMORY},
    "limits": {"cpu": "2", "memory": VALIDATION_MEMORY},
}
_VALIDATION_RETRIES = 3
_REQUESTED_STORAGE = "256Mi"
"""A small request, because a job's need for disk space is unknown before its validation."""
_MANIFEST_SUFFIXES = {VALIDATE: "spec", TRAIN: "resolved"}


@dataclass(frozen=True)
class JobInstallation:
    """Settings of the installation that apply to every job."""

    settings: JobSettings
    cluster: str = ""
    """UID of the namespace kube-system, by which `tunesmith gc` recognises this cluster's folders; empty if unknown."""


def configuration(job: FineTuneJob, stage: str) -> Object:
    """Return the ConfigMap with the manifest that the trainer reads.

    It is created once and never changed: the values resolved before the first attempt apply to all attempts. The
    trainer knows no FineTuneJobs, so one in continueFrom is replaced by its artifact, which the status has.

    Args:
        job: the FineTuneJob.
        stage: VALIDATE, or TRAIN for every attempt, whose manifest also has the values that validation resolved.
    """
    resolved = job.status.resolved if stage == TRAIN else None
    spec = job.spec.manifest()
    start = job.status.resolved.continued_from if job.status.resolved is not None else None
    if start is not None and source_name(job) is not None:
        spec["continueFrom"] = {"artifact": start.manifest()}
    manifest = {
        "apiVersion": job.api_version,
        "kind": job.kind,
        "metadata": {"name": job.metadata.name, "namespace": job.metadata.namespace, "uid": job.metadata.uid},
        "spec": spec,
        **({"status": {"resolved": resolved.manifest()}} if resolved is not None else {}),
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, _MANIFEST_SUFFIXES[stage], {}),
        "immutable": True,
        # The reader accepts JSON as well, which serialises a hundred times faster.
        "data": {JOB_FILE: json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"},
    }


def validation(job: FineTuneJob, installation: JobInstallation, gpu_memory_bytes: int | None = None) -> Object:
    """Return the Job that checks data, base model and settings on a CPU.

    The Job controller retries it after retryable failures, and replaces disrupted pods.

    Args:
        job: the FineTuneJob.
        installation: settings of the installation.
        gpu_memory_bytes: memory of the smallest GPU that it may train on; None if unknown.
    """
    labels = {COMPONENT_LABEL: VALIDATE}
    rules = [_on_disruption("Ignore"), _on_exit_codes("FailJob", ExitCode.USER_FAULT)]
    arguments = ["validate", "--job", f"{JOB_FOLDER}/{JOB_FILE}", "--tokens", _tokens(job, installation)]
    arguments += [*_ownership(job, installation), *_permissions(installation)]
    arguments += ["--deadline", str(VALIDATION_SECONDS)]
    if gpu_memory_bytes is not None:
        arguments += ["--gpu-memory-bytes", str(gpu_memory_bytes)]
    pod = _pod(job, installation, labels, arguments, _VALIDATION_RESOURCES)
    pod["spec"]["activeDeadlineSeconds"] = VALIDATION_SECONDS + _VALIDATION_MARGIN_SECONDS
    # A validation needs no GPU, so only the constraints that exclude nodes apply.
    pod["spec"].pop("runtimeClassName", None)
    return _job(job, VALIDATE, labels, pod, rules, retries=_VALIDATION_RETRIES)


def attempt(job: FineTuneJob, number: int, installation: JobInstallation) -> Object:
    """Return the Job of an attempt: one pod per node, no retries; if one fails, the Job controller stops the others.

    The cause of the failure remains in the Job after the pods are gone.
    """
    metadata = job.metadata
    labels = {COMPONENT_LABEL: TRAIN, ATTEMPT_LABEL: str(number)}
    rules = [
        _on_disruption("FailJob"),
        *(_on_exit_codes("FailJob", code) for code in (ExitCode.USER_FAULT, ExitCode.RETRYABLE, ExitCode.PREEMPTED)),
    ]
    artifact = artifact_uri(installation.settings.store, metadata.namespace, metadata.name, metadata.uid)
    checkpoints = checkpoints_uri(installation.settings.store, metadata.namespace, metadata.name, metadata.uid)
    arguments = ["train", "--job", f"{JOB_FOLDER}/{JOB_FILE}", "--output", artifact, "--checkpoints", checkpoints]
    arguments += ["--tokens", _tokens(job, installation), *_ownership(job, installation), *_permissions(installation)]
    pod = _pod(job, installation, labels, arguments, _resources(job))
    manifest = _job(job, str(number), labels, pod, rules, retries=0)
    if job.spec.resources.nodes > 1:
        _distribute(job, manifest)
    queue = job.spec.scheduling.queue
    if queue is not None:
        # Created suspended and never written again: from now on the queue decides when its pods run.
        manifest["metadata"]["labels"][QUEUE_LABEL] = queue
        manifest["spec"]["suspend"] = True
    return manifest


def rank_network(job: FineTuneJob) -> list[Object]:
    """Return the Service through which pods on several nodes find each other; empty for a single node.

    All attempts share it, since their pods' names differ.
    """
    if job.spec.resources.nodes == 1:
        return []
    labels = {COMPONENT_LABEL: TRAIN}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**_metadata(job, TRAIN, labels), "name": _rank_service_name(job)},
        # The other pods must find the first one before it is ready, because it waits for them.
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_LABEL: job.metadata.name, **labels},
            "ports": [{"name": "ranks", "port": MASTER_PORT, "protocol": "TCP"}],
        },
    }
    return [service]


def isolation(job: FineTuneJob, network: NetworkPolicySettings) -> list[Object]:
    """Return the NetworkPolicy of the job's pods; empty if the platform disables policies and the job has one node.

    Pods on several nodes always have one: their traffic is neither encrypted nor authenticated.
    """
    is_distributed = job.spec.resources.nodes > 1
    if not network.policies and not is_distributed:
        return []
    pods = {JOB_LABEL: job.metadata.name}
    training = {**pods, COMPONENT_LABEL: TRAIN}
    ingress = [network.admit(PROGRESS_PORT, "operator")]
    if is_distributed:
        ingress.append({"from": [{"podSelector": {"matchLabels": training}}]})
    return [network_policy(_metadata(job, "network", {}), pods, ingress)]


def _rank_service_name(job: FineTuneJob) -> str:
    # A Service's name must begin with a letter; a FineTuneJob's may begin with a digit.
    return f"ranks-{job.metadata.name}-{short_uid(job.metadata.uid)}"


def _distribute(job: FineTuneJob, manifest: Object) -> None:
    """Change a Job with one pod into one with a pod per node."""
    nodes = job.spec.resources.nodes
    manifest["spec"] |= {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes}
    template = manifest["spec"]["template"]
    pod = template["spec"]
    pod["subdomain"] = _rank_service_name(job)
    pod["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": dict(template["metadata"]["labels"])},
        }
    ]
    pod["containers"][0]["env"] += [
        {"name": "MASTER_ADDR", "value": f"{manifest['metadata']['name']}-0.{_rank_service_name(job)}"},
        {"name": "MASTER_PORT", "value": str(MASTER_PORT)},
    ]


def _job(
    job: FineTuneJob, suffix: str, labels: dict[str, str], pod: Object, rules: list[Object], *, retries: int
) -> Object:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, suffix, labels),
        "spec": {
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": retries,
            # A second pod must not start while the first is still writing.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": rules},
            "template": pod,
        },
    }


def _on_disruption(action: str) -> Object:
    return {"action": action, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def _on_exit_codes(action: str, code: ExitCode) -> Object:
    return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [int(code)]}}


def _metadata(job: FineTuneJob, suffix: str, labels: dict[str, str]) -> Object:
    metadata = job.metadata
    return {
        "name": owned_name(metadata.name, metadata.uid, suffix),
        "namespace": metadata.namespace,
        "labels": _labels(job, labels),
        "ownerReferences": [
            {
                "apiVersion": job.api_version,
                "kind": job.kind,
                "name": metadata.name,
                "uid": metadata.uid,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ],
    }


def _labels(job: FineTuneJob, labels: dict[str, str]) -> dict[str, str]:
    return {"app.kubernetes.io/managed-by": "tunesmith", JOB_LABEL: job.metadata.name, **labels}


def _pod(
    job: FineTuneJob, installation: JobInstallation, labels: dict[str, str], arguments: list[str], resources: Object
) -> Object:
    secrets, claims = _secrets(job), _claims(job)
    # The ranks of a pod exchange gradients through shared memory, which is 64 MiB by default.
    shared = job.spec.resources.gpus > 1
    manifest = _MANIFEST_SUFFIXES[labels[COMPONENT_LABEL]]
    scheduling = job.spec.scheduling
    return {
        "metadata": {"labels": _labels(job, labels)},
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
            **scheduling.pod_fields(),
            "containers": [
                {
                    "name": CONTAINER,
                    "image": installation.settings.trainer_image,
                    "imagePullPolicy": installation.settings.image_pull_policy,
                    "command": ["tunesmith-trainer"],
                    "args": arguments,
                    "envFrom": [{"secretRef": {"name": STORE_SECRET}}],
                    "env": [
                        {"name": "HOME", "value": "/tmp"},  # noqa: S108 - an emptyDir of the pod
                        # Set even if empty, so that keys of the Secret above, which become variables, cannot set them.
                        {"name": LM_EVAL_TASKS, "value": installation.settings.lm_eval_tasks},
                        {"name": ALLOWED_ADDRESSES, "value": ",".join(installation.settings.allowed_addresses)},
                    ],
                    "ports": [{"name": "progress", "containerPort": PROGRESS_PORT}],
                    "resources": _with_storage(resources, installation.settings.job_storage),
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "volumeMounts": [
                        {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True},
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
                    ],
                }
            ],
            "volumes": [
                {"name": "job", "configMap": {"name": owned_name(job.metadata.name, job.metadata.uid, manifest)}},
                {"name": "work", "emptyDir": {"sizeLimit": installation.settings.job_storage}},
                {"name": "tmp", "emptyDir": {"sizeLimit": installation.settings.job_storage}},
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
            ],
        },
    }


def _resources(job: FineTuneJob) -> Object:
    requested = job.spec.resources
    gpus = {requested.gpu_resource: str(requested.gpus)} if requested.gpus else {}
    return {
        "requests": {"cpu": requested.cpu, "memory": requested.memory, **gpus},
        "limits": {"memory": requested.memory, **gpus},
    }


def _with_storage(resources: Object, storage: str) -> Object:
    """Return the resources with a limit on everything that the pod writes to its node's disk, volumes included."""
    return {
        "requests": {**resources["requests"], "ephemeral-storage": _REQUESTED_STORAGE},
        "limits": {**resources["limits"], "ephemeral-storage": storage},
    }


def _ownership(job: FineTuneJob, installation: JobInstallation) -> list[str]:
    if not installation.cluster:
        return []
    metadata = job.metadata
    folder = job_folder(installation.settings.store, metadata.namespace, metadata.name, metadata.uid)
    return ["--job-folder", folder, "--cluster", installation.cluster]


def _permissions(installation: JobInstallation) -> list[str]:
    # An argument, not a variable: a key of the Secret in `envFrom` could set a variable.
    return ["--allow-task-code"] if installation.settings.allow_task_folders else []


def _tokens(job: FineTuneJob, installation: JobInstallation) -> str:
    metadata = job.metadata
    return tokens_uri(installation.settings.store, metadata.namespace, metadata.name, metadata.uid)


def _secrets(job: FineTuneJob) -> list[str]:
    """Return the names of the Secrets that the sources, exports and trackers need, without duplicates."""
    places = [*(source for _, source in sources(job)), *job.spec.exports]
    names = [place.secret_ref.name for place in places if place.secret_ref is not None]
    if job.spec.output is not None and job.spec.output.needs_reporting_secret:
        names.append(REPORTING_SECRET)
    return list(dict.fromkeys(names))


def _secret_items(secret: str) -> Object:
    """Return the volume items of a Secret: the stores' keys only, but all keys of the reporting Secret."""
    return {} if secret == REPORTING_SECRET else {"items": [{"key": key, "path": key} for key in STORE_KEYS]}


def _claims(job: FineTuneJob) -> list[str]:
    """Return the names of the PersistentVolumeClaims that the sources name, without duplicates."""
    found = (volume_claim(source.uri) for _, source in sources(job))
    return list(dict.fromkeys(claim[0] for claim in found if claim is not None))
