"""A base model in an image: its uris, and its pods on API servers with and without volumes of images."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.apiserver import ApiServer
from tests.controlplane.manifests import adapter, pool
from tests.controlplane.operatorprocess import until
from tests.serving.test_render import SETTINGS
from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.image_volume import ImageVolume, image_volume
from tunesmith.api.servingpool import ServingPool
from tunesmith.contracts.refusal import removed_images
from tunesmith.jobs.settings import JobSettings
from tunesmith.serving.imports import ImportBase, import_job
from tunesmith.serving.render import deployment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.controlplane.operatorprocess import Operator
    from tunesmith.cluster.client import Cluster

DIGEST = "sha256:" + "a" * 64
URI = f"oci://registry.example:5000/models/llama:1.0@{DIGEST}/8b/instruct"


@pytest.fixture(scope="module")
def with_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("apiserver"), "--feature-gates=ImageVolume=true") as server:
        server.install_crds()
        yield server


def rendered(server: ApiServer, namespace: str) -> dict[str, Any]:
    """The Deployment of a pool that the API server accepts."""
    server.apply(pool(namespace, baseModel__uri=URI))
    stored = ServingPool.model_validate(server.get("spool", "small", "-n", namespace))
    return deployment(stored, SETTINGS, 1)


def make_namespace(server: ApiServer, name: str) -> str:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    return name


@pytest.mark.parametrize(
    ("uri", "reference", "folder"),
    [
        (URI, f"registry.example:5000/models/llama:1.0@{DIGEST}", "8b/instruct"),
        ("oci://registry.example/llama:1.0", "registry.example/llama:1.0", ""),
        (f"oci://registry.example/llama@{DIGEST}/", f"registry.example/llama@{DIGEST}", ""),
        ("oci://127.0.0.1:5000/a/b/c_d-e:latest/models", "127.0.0.1:5000/a/b/c_d-e:latest", "models"),
    ],
)
def test_an_image_and_its_folder(uri: str, reference: str, folder: str) -> None:
    assert image_volume(uri) == ImageVolume(reference, folder)


@pytest.mark.parametrize(
    "uri", ["oci://registry.example/llama", "oci://llama:1", "oci://registry.example/Llama:1", "oci://"]
)
def test_a_uri_without_a_tag_or_repository_is_refused(apiserver: ApiServer, uri: str) -> None:
    done = apiserver.kubectl("apply", "-f", "-", manifest=pool("default", baseModel__uri=uri))
    assert done.returncode != 0
    assert "oci://registry.example/models/llama:1.0/folder, where the tag or a digest is required" in done.stderr


def test_credentials_and_caches_are_refused(apiserver: ApiServer) -> None:
    given = pool(
        "default", baseModel={"uri": URI, "secretRef": {"name": "registry"}}, baseModelCache={"claimName": "c"}
    )
    done = apiserver.kubectl("apply", "-f", "-", manifest=given)
    assert "baseModel.secretRef is not for oci:// uris: remove it" in done.stderr
    assert "baseModelCache is only for base models that pods download" in done.stderr


async def test_without_the_feature_gate_the_pool_names_it(
    operator: Operator, server: ApiServer, cluster: Cluster
) -> None:
    """The API server accepts the Deployment, and removes the volume."""
    assert operator.process.poll() is None
    namespace = make_namespace(server, "without-images")
    await cluster.create(pool(namespace, baseModel__uri=URI))

    async def message() -> str:
        status = (await cluster.get("ServingPool", "small", namespace)).get("status") or {}
        conditions = {entry["type"]: entry for entry in status.get("conditions") or ()}
        degraded = conditions.get("Degraded") or {}
        return str(degraded["message"]) if degraded.get("reason") == "WriteRefused" else ""

    async def degraded() -> bool:
        return bool(await message())

    await until(degraded, "the condition Degraded")
    found = await message()
    assert "the API server removes the volume models of Deployment without-images/" in found
    assert "enable the feature gate ImageVolume (Kubernetes 1.33 or newer), or use no oci:// uri" in found


def test_with_the_feature_gate_deployment_and_pod_are_accepted(with_images: ApiServer) -> None:
    namespace = make_namespace(with_images, "with-images")
    manifest = rendered(with_images, namespace)
    with_images.apply(manifest)
    stored = with_images.get("deployment", manifest["metadata"]["name"], "-n", namespace)["spec"]["template"]["spec"]
    volume = next(volume for volume in stored["volumes"] if volume["name"] == "models")
    assert volume["image"] == {
        "reference": f"registry.example:5000/models/llama:1.0@{DIGEST}",
        "pullPolicy": "IfNotPresent",
    }
    engine = stored["containers"][0]
    mount = next(mount for mount in engine["volumeMounts"] if mount["name"] == "models")
    assert (mount["subPath"], mount["readOnly"]) == ("8b/instruct", True)
    template = manifest["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": namespace, **template["metadata"]},
        "spec": template["spec"],
    }
    done = with_images.kubectl("apply", "--server-side", "-f", "-", manifest=pod)
    assert done.returncode == 0, done.stderr


def removed_from_an_import(server: ApiServer, namespace: str) -> list[str]:
    """Return the volumes of images that the API server removes from the Job that imports an adapter from an image."""
    server.apply(adapter(namespace, adapterFrom={"artifact": {"uri": URI}}))
    stored = AdapterDeployment.model_validate(server.get("adep", "tone", "-n", namespace))
    source = stored.spec.adapter_from.artifact
    assert source is not None
    settings = JobSettings(store="s3://tunesmith/store", trainer_image="localhost/trainer:1")
    job = import_job(stored, source, ImportBase("s3://models/base"), settings)
    done = server.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", manifest=job)
    return removed_images(job, json.loads(done.stdout))


def test_an_adapter_in_an_image_is_imported_where_volumes_of_images_exist(with_images: ApiServer) -> None:
    assert removed_from_an_import(with_images, make_namespace(with_images, "import")) == []


def test_elsewhere_the_import_would_be_of_an_empty_folder(apiserver: ApiServer) -> None:
    assert removed_from_an_import(apiserver, make_namespace(apiserver, "import")) == ["image-0"]
