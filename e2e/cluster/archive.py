"""OCI images as tar streams for containerd: images of one static program, made without a build tool, and the import."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from typing import TYPE_CHECKING

from e2e.cluster.layout import ClusterError, Layout
from e2e.cluster.steps import output_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

NONROOT = "65532:65532"


def ctr(layout: Layout, *arguments: str | Path, stdin: bytes | None = None) -> str:
    """Runs containerd's client against the cluster's containerd, in the namespace the kubelet uses."""
    return output_of(
        ["ctr", "--address", str(layout.containerd_socket), "--namespace", "k8s.io", *arguments], stdin=stdin
    )


def imported_images(layout: Layout) -> set[str]:
    """References of the images that containerd holds."""
    return set(ctr(layout, "images", "ls", "--quiet").split())


def _descriptor(media: str, content: bytes) -> dict[str, object]:
    return {
        "mediaType": f"application/vnd.oci.image.{media}",
        "digest": f"sha256:{hashlib.sha256(content).hexdigest()}",
        "size": len(content),
    }


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mode = mode
    archive.addfile(entry, io.BytesIO(content))


def _tar(files: Iterable[tuple[str, bytes, int]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content, mode in files:
            _add(archive, name, content, mode)
    return stream.getvalue()


def program_image(reference: str, program: Path, *, certificates: Path | None = None) -> bytes:
    """An OCI archive with `program` as /<its name> and entry point, run by user 65532.

    The same inputs give the same bytes: entries carry no time and no owner but root.

    Args:
        reference: the name the image gets when it is imported.
        program: a static executable.
        certificates: authorities the program trusts, put where Go looks for them.
    """
    files = [(program.name, program.read_bytes(), 0o755)]
    if certificates is not None:
        files.append(("etc/ssl/certs/ca-certificates.crt", certificates.read_bytes(), 0o644))
    layer = _tar(files)
    compressed = gzip.compress(layer, compresslevel=1, mtime=0)
    configuration = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": [f"/{program.name}"], "User": NONROOT},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor("config.v1+json", configuration),
            "layers": [_descriptor("layer.v1.tar+gzip", compressed)],
        }
    ).encode()
    names = {"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": reference}
    entry = _descriptor("manifest.v1+json", manifest) | {"annotations": names}
    index = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    blobs = [
        (f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob, 0o644)
        for blob in (compressed, configuration, manifest)
    ]
    return _tar([("oci-layout", b'{"imageLayoutVersion":"1.0.0"}', 0o644), ("index.json", index, 0o644), *blobs])


def ensure_program_image(layout: Layout, name: str, program: Path, *, certificates: Path | None = None) -> str:
    """Imports an image of `program` unless containerd has it; returns its reference, which names the program's build.

    Args:
        layout: the cluster.
        name: the last part of the reference.
        program: a static executable in a folder `<name>-<digest>` of the cache.
        certificates: see `program_image`.
    """
    reference = program_reference(name, program)
    if reference not in imported_images(layout):
        with tempfile.NamedTemporaryFile(suffix=".tar") as file:
            file.write(program_image(reference, program, certificates=certificates))
            file.flush()
            ctr(layout, "images", "import", file.name)
    return reference


def program_reference(name: str, program: Path) -> str:
    """The image reference of a program in the cache: its tag is the digest of what the program was built from."""
    return f"localhost/tunesmith/{name}:{program.parent.name.rpartition('-')[2]}"


def import_layout(layout: Layout, folder: Path, reference: str) -> None:
    """Imports an image of an OCI layout folder, sending only the blobs that containerd lacks.

    Raises:
        ClusterError: containerd refused it, with its output.
    """
    present = set(ctr(layout, "content", "ls", "--quiet").split())
    listed = json.loads((folder / "index.json").read_text())["manifests"]
    entry = next(
        (item for item in listed if item.get("annotations", {}).get("org.opencontainers.image.ref.name") == reference),
        None,
    )
    if entry is None:
        raise ClusterError(f"{folder}/index.json does not list {reference}: remove the folder and build again")
    entry["annotations"] = {"io.containerd.image.name": reference}
    index = {"schemaVersion": 2, "manifests": [entry]}
    blobs = folder / "blobs" / "sha256"
    manifest = json.loads((blobs / entry["digest"].removeprefix("sha256:")).read_text())
    wanted = [entry["digest"], manifest["config"]["digest"], *(part["digest"] for part in manifest["layers"])]
    command = ["ctr", "--address", str(layout.containerd_socket), "--namespace", "k8s.io", "images", "import", "-"]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=complaints)
        assert process.stdin is not None
        try:
            with tarfile.open(fileobj=process.stdin, mode="w|", bufsize=1 << 20) as stream:
                _add(stream, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
                _add(stream, "index.json", json.dumps(index).encode())
                for digest in dict.fromkeys(wanted):
                    if digest not in present:
                        name = digest.removeprefix("sha256:")
                        stream.add(blobs / name, f"blobs/sha256/{name}")
            process.stdin.close()
        except BrokenPipeError:
            pass  # it exited early: the reason is in its status and error output
        if process.wait():
            complaints.seek(0)
            output = " ".join(complaints.read().decode(errors="replace").split())[-500:]
            raise ClusterError(f"containerd refused the image {reference}: {output}")
