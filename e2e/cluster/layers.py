"""Writes images from buildah's storage into an OCI layout folder, each layer once and uncompressed.

`buildah push` compresses every layer of an image again each time, which for images that share 6 GB of torch makes a
changed line of code cost minutes. Here a layer that was written before is only referred to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tarfile
from typing import TYPE_CHECKING, Any, BinaryIO

from e2e.cluster.layout import ClusterError

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = 1 << 20
OPAQUE = "trusted.overlay.opaque"
UNREADABLE = ("trusted.overlay.redirect", "trusted.overlay.metacopy")
"""Marks of a layer that leans on the one below, which this build tool's storage does not make."""
KEPT_ATTRIBUTES = ("security.capability",)


class _Digesting:
    """Writes through to a file and digests what passes."""

    def __init__(self, target: BinaryIO) -> None:
        self.target = target
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.target.write(data)


def _add_tree(archive: tarfile.TarFile, folder: Path, name: str) -> None:
    """Adds what a layer changes below `folder`: deletions are device nodes on disk and `.wh.` files in an archive."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = f"{name}{entry.name}"
        information = archive.gettarinfo(entry.path, path)
        if information is None:
            continue  # a socket, which no image can carry
        if information.ischr() and (information.devmajor, information.devminor) == (0, 0):
            archive.addfile(tarfile.TarInfo(f"{name}.wh.{entry.name}"))
            continue
        attributes = () if information.issym() else os.listxattr(entry.path, follow_symlinks=False)
        if any(mark in attributes for mark in UNREADABLE):
            raise ClusterError(f"{entry.path} leans on the layer below: turn off overlay's redirect_dir and metacopy")
        for attribute in KEPT_ATTRIBUTES:
            if attribute in attributes:
                value = os.getxattr(entry.path, attribute).decode("latin-1")
                information.pax_headers = {**information.pax_headers, f"SCHILY.xattr.{attribute}": value}
        if information.isreg():
            with open(entry.path, "rb") as content:  # noqa: PTH123  entry.path is text
                archive.addfile(information, content)
        else:
            archive.addfile(information)
        if information.isdir():
            if OPAQUE in attributes and os.getxattr(entry.path, OPAQUE) == b"y":
                archive.addfile(tarfile.TarInfo(f"{path}/.wh..wh..opq"))
            _add_tree(archive, folder / entry.name, f"{path}/")


def _put(oci: Path, content: bytes, media: str) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    blob = oci / "blobs" / "sha256" / digest
    if not blob.exists():
        temporary = oci / f"unfinished-{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(blob)
    return {"mediaType": f"application/vnd.oci.image.{media}", "digest": f"sha256:{digest}", "size": len(content)}


def _layer(oci: Path, storage: Path, layer: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """The descriptor of a layer, which is written unless it was before."""
    known: dict[str, Any] | None = written.get(layer["diff-digest"])
    if known and (oci / "blobs" / "sha256" / known["digest"].removeprefix("sha256:")).exists():
        return known
    temporary = oci / f"unfinished-{os.getpid()}"
    with temporary.open("wb") as file:
        stream = _Digesting(file)
        with tarfile.open(fileobj=stream, mode="w|", bufsize=CHUNK, format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
            archive.copybufsize = CHUNK
            _add_tree(archive, storage / "overlay" / layer["id"] / "diff", "")
    digest = stream.digest.hexdigest()
    temporary.replace(oci / "blobs" / "sha256" / digest)
    descriptor = {
        "mediaType": "application/vnd.oci.image.layer.v1.tar",
        "digest": f"sha256:{digest}",
        "size": stream.size,
    }
    written[layer["diff-digest"]] = descriptor
    return descriptor


def export_image(storage: Path, oci: Path, reference: str) -> None:
    """Writes the image `reference` of buildah's `storage` into the layout folder `oci` and lists it in its index.

    Raises:
        ClusterError: the storage does not hold it.
    """
    (oci / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    (oci / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    images = json.loads((storage / "overlay-images" / "images.json").read_text())
    image = next((image for image in images if reference in (image.get("names") or [])), None)
    if image is None:
        raise ClusterError(f"{storage} does not hold {reference}: remove the folder and build again")
    encoded = base64.b64encode(f"sha256:{image['id']}".encode()).decode()
    configuration = json.loads((storage / "overlay-images" / image["id"] / f"={encoded}").read_text())
    layers = {layer["id"]: layer for layer in json.loads((storage / "overlay-layers" / "layers.json").read_text())}
    chain = []
    current = image["layer"]
    while current:
        chain.append(layers[current])
        current = layers[current].get("parent", "")
    written_file = oci / "layers.json"
    written: dict[str, Any] = json.loads(written_file.read_text()) if written_file.exists() else {}
    descriptors = [_layer(oci, storage, layer, written) for layer in reversed(chain)]
    written_file.write_text(json.dumps(written))
    configuration["rootfs"]["diff_ids"] = [descriptor["digest"] for descriptor in descriptors]
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _put(oci, json.dumps(configuration).encode(), "config.v1+json"),
        "layers": descriptors,
    }
    entry = _put(oci, json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": reference}
    index_file = oci / "index.json"
    index: dict[str, Any] = {"schemaVersion": 2, "manifests": []}
    if index_file.exists():
        index = json.loads(index_file.read_text())
    others = [
        other
        for other in index["manifests"]
        if other.get("annotations", {}).get("org.opencontainers.image.ref.name") != reference
    ]
    index["manifests"] = [*others, entry]
    index_file.write_text(json.dumps(index))
