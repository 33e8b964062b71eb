"""Kubernetes objects of a FineTuneJob, each with its full intent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.api.credentials import REPORTING_SECRET
from tunesmith.contracts.location import (
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
from tunesmith.finetune.observe import TRAIN, VALIDATE
from tunesmith.finetune.permission import sources
from tunesmith.finetune.start import source_name
from tunesmith.jobs.observe import ATTEMPT_LABEL, COMPONENT_LABEL
from tunesmith.jobs.render import JOB_FOLDER, PodInputs, on_disruption, on_exit_codes, owner_reference, pod
from tunesmith.jobs.render import job as trainer_job

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.jobs.settings import JobSettings

Object = dict[str, Any]

JOB_LABEL = "tunesmith.dev/finetunejob"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
JOB_FILE = "job.yaml"
MASTER_PORT = 29500
"""Port on the first pod of an attempt, to which the other pods connect."""
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
    rules = [on_disruption("Ignore"), on_exit_codes("FailJob", ExitCode.USER_FAULT)]
    arguments = ["validate", "--job", f"{JOB_FOLDER}/{JOB_FILE}", "--tokens", _tokens(job, installation)]
    arguments += [*_ownership(job, installation), *_permissions(installation)]
    arguments += ["--deadline", str(VALIDATION_SECONDS)]
    if gpu_memory_bytes is not None:
        arguments += ["--gpu-memory-bytes", str(gpu_memory_bytes)]
    template = _pod(job, installation, labels, arguments, _VALIDATION_RESOURCES)
    template["spec"]["activeDeadlineSeconds"] = VALIDATION_SECONDS + _VALIDATION_MARGIN_SECONDS
    # A validation needs no GPU, so only the constraints that exclude nodes apply.
    template["spec"].pop("runtimeClassName", None)
    return trainer_job(_metadata(job, VALIDATE, labels), template, rules, retries=_VALIDATION_RETRIES)


def attempt(job: FineTuneJob, number: int, installation: JobInstallation) -> Object:
    """Return the Job of an attempt: one pod per node, no retries; if one fails, the Job controller stops the others.

    The cause of the failure remains in the Job after the pods are gone.
    """
    metadata = job.metadata
    labels = {COMPONENT_LABEL: TRAIN, ATTEMPT_LABEL: str(number)}
    rules = [
        on_disruption("FailJob"),
        *(on_exit_codes("FailJob", code) for code in (ExitCode.USER_FAULT, ExitCode.RETRYABLE, ExitCode.PREEMPTED)),
    ]
    artifact = artifact_uri(installation.settings.store, metadata.namespace, metadata.name, metadata.uid)
    checkpoints = checkpoints_uri(installation.settings.store, metadata.namespace, metadata.name, metadata.uid)
    arguments = ["train", "--job", f"{JOB_FOLDER}/{JOB_FILE}", "--output", artifact, "--checkpoints", checkpoints]
    arguments += ["--tokens", _tokens(job, installation), *_ownership(job, installation), *_permissions(installation)]
    template = _pod(job, installation, labels, arguments, _resources(job))
    manifest = trainer_job(_metadata(job, str(number), labels), template, rules, retries=0)
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
    spec = template["spec"]
    spec["subdomain"] = _rank_service_name(job)
    spec["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": dict(template["metadata"]["labels"])},
        }
    ]
    spec["containers"][0]["env"] += [
        {"name": "MASTER_ADDR", "value": f"{manifest['metadata']['name']}-0.{_rank_service_name(job)}"},
        {"name": "MASTER_PORT", "value": str(MASTER_PORT)},
    ]


def _metadata(job: FineTuneJob, suffix: str, labels: dict[str, str]) -> Object:
    metadata = job.metadata
    return {
        "name": owned_name(metadata.name, metadata.uid, suffix),
        "namespace": metadata.namespace,
        "labels": _labels(job, labels),
        "ownerReferences": [owner_reference(job.api_version, job.kind, metadata.name, metadata.uid)],
    }


def _labels(job: FineTuneJob, labels: dict[str, str]) -> dict[str, str]:
    return {"app.kubernetes.io/managed-by": "tunesmith", JOB_LABEL: job.metadata.name, **labels}


def _pod(
    job: FineTuneJob, installation: JobInstallation, labels: dict[str, str], arguments: list[str], resources: Object
) -> Object:
    configuration = owned_name(job.metadata.name, job.metadata.uid, _MANIFEST_SUFFIXES[labels[COMPONENT_LABEL]])
    inputs = PodInputs(
        arguments,
        resources,
        configuration=configuration,
        secrets=_secrets(job),
        claims=_claims(job),
        scheduling=job.spec.scheduling.pod_fields(),
        # The ranks of a pod exchange gradients through shared memory.
        shared_memory=job.spec.resources.gpus > 1,
    )
    return pod(installation.settings, _labels(job, labels), inputs)


def _resources(job: FineTuneJob) -> Object:
    requested = job.spec.resources
    gpus = {requested.gpu_resource: str(requested.gpus)} if requested.gpus else {}
    return {
        "requests": {"cpu": requested.cpu, "memory": requested.memory, **gpus},
        "limits": {"memory": requested.memory, **gpus},
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


def _claims(job: FineTuneJob) -> list[str]:
    """Return the names of the PersistentVolumeClaims that the sources name, without duplicates."""
    found = (volume_claim(source.uri) for _, source in sources(job))
    return list(dict.fromkeys(claim[0] for claim in found if claim is not None))
