"""Builds the project's images with buildah and brings them into the cluster, once per content of their inputs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from e2e.cluster import addons, binaries
from e2e.cluster.archive import ctr, import_layout, imported_images, program_image, program_reference
from e2e.cluster.layers import export_image
from e2e.cluster.layout import REPOSITORY, SOURCES, ClusterError, Layout, cache_folder
from e2e.cluster.steps import output_of, report, run_logged, step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

UV_VERSION = "0.13.9"
PREFIX = "localhost/tunesmith"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
DOWNLOADS_LIMIT = 3 << 30
FIXED_TIME = 1577836800
"""Modification time of everything in a build context, so that a fresh clone gives the same layers."""


@dataclass(frozen=True)
class Image:
    """One image of the project."""

    name: str
    dockerfile: str
    base: str
    """Base image of a local build, `base` or `torch`, as BASE_IMAGE."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Other build arguments of a local build."""


IMAGES = (
    Image("operator", "operator/Dockerfile", "base"),
    Image("agent", "server-image/Dockerfile", "base"),
    Image("trainer", "trainer-image/Dockerfile", "torch", {"COMPILER": ""}),  # it is for GPUs
    Image("engine", "server-image/engine-cpu/Dockerfile", "torch"),
)


class Builder:
    """buildah with its storage, caches and build contexts in the project's cache folder."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.root = cache_folder() / "buildah"
        self.contexts = self.root / "contexts"
        self.oci = cache_folder() / "oci"
        temporary = self.root / "tmp"  # buildah keeps the Dockerfiles' cache mounts (uv's downloads) here
        temporary.mkdir(parents=True, exist_ok=True)
        self.environment = dict(os.environ, TMPDIR=str(temporary), BUILDAH_ISOLATION="chroot")
        # copies of whole layers that a killed run left
        for leftover in [*temporary.iterdir(), *self.oci.glob("unfinished-*")]:
            if leftover.is_file():
                leftover.unlink()

    def command(self, *arguments: str) -> list[str]:
        """A buildah command line."""
        storage = [
            "--root",
            str(self.root / "storage"),
            "--runroot",
            str(self.layout.build_run),
            "--storage-driver",
            "overlay",
        ]
        return ["buildah", *storage, *arguments]

    def has(self, reference: str) -> bool:
        """Return True if buildah's storage contains the image."""
        return (
            subprocess.run(
                self.command("inspect", "--type=image", reference), capture_output=True, check=False
            ).returncode
            == 0
        )

    def build(self, name: str, dockerfile: Path, context: Path, arguments: dict[str, str]) -> str:
        """Build the image unless it exists; returns its reference, whose tag is the digest of all inputs."""
        digest = hashlib.sha256(dockerfile.read_bytes() + json.dumps(arguments, sort_keys=True).encode())
        for file in sorted(path for path in context.rglob("*") if path.is_file()):
            digest.update(
                f"\0{file.relative_to(context)}\0{file.stat().st_mode & 0o111}\0{_file_digest(file)}".encode()
            )
        reference = f"{PREFIX}/{name}:{digest.hexdigest()[:12]}"
        if self.has(reference):
            return reference
        with step(f"building image {name}"):
            log = self.layout.log / f"image-{name}.log"
            log.unlink(missing_ok=True)
            options = [f"--build-arg={key}={value}" for key, value in arguments.items()]
            command = self.command(
                "build",
                "--layers",
                "--pull-never",
                "--format=oci",
                f"--tag={reference}",
                f"--file={dockerfile}",
                *options,
            )
            run_logged([*command, str(context)], log, f"building the image {name}", environment=self.environment)
        return reference

    def export(self, reference: str) -> None:
        """Writes the image into the OCI layout folder, from which it is imported."""
        export_image(self.root / "storage", self.oci, reference)

    def load(self, archive: bytes, reference: str) -> None:
        """Takes the image of an OCI archive into buildah's storage."""
        with tempfile.NamedTemporaryFile(dir=self.contexts, suffix=".tar") as file:
            file.write(archive)
            file.flush()
            output_of(self.command("pull", "--quiet", f"oci-archive:{file.name}:{reference}"))

    def push(self, reference: str, registry: str) -> str:
        """Pushes the image to `registry` and returns its reference there."""
        remote = f"{registry}/{reference.removeprefix('localhost/')}"
        local = registry.partition(":")[0].partition("/")[0] in {"localhost", "127.0.0.1"}  # those use plain HTTP
        options = ["--quiet", *(["--tls-verify=false"] if local else [])]
        command = self.command("push", *options, reference, f"docker://{remote}")
        run_logged(command, self.layout.log / "image-push.log", f"pushing {remote}", environment=self.environment)
        return remote


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def copied_sources(dockerfile: str) -> list[str]:
    """The paths that a Dockerfile takes from its build context with COPY, ADD or a bind mount."""
    sources: list[str] = []
    for line in re.sub(r"\\\s*\n", " ", dockerfile).splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0].upper() in {"COPY", "ADD"}:
            if any(word.startswith("--from=") for word in words):
                continue
            sources += [word for word in words[1:] if not word.startswith("--")][:-1]
        elif words and words[0].upper() == "RUN":
            for mount in (word for word in words if word.startswith("--mount=type=bind")):
                options = dict(part.split("=", 1) for part in mount.removeprefix("--mount=").split(",") if "=" in part)
                if "from" not in options and "source" in options:
                    sources.append(options["source"])
    return sources


def stage_context(dockerfile: str, target: Path) -> None:
    """Copies exactly the files that a Dockerfile of the project uses into `target`: what is hashed is what is built.

    Raises:
        ClusterError: the Dockerfile names a path that is not in the repository.
    """
    for source in copied_sources((REPOSITORY / dockerfile).read_text()):
        listed = output_of(
            ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", source]
        )
        names = [name for name in listed.split("\0") if name and (REPOSITORY / name).is_file()]
        if not names:
            raise ClusterError(
                f"{dockerfile} copies {source}, which is not in the repository (or git ignores it): correct the path"
            )
        for name in names:
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, copy)
            copy.chmod(0o755 if os.access(REPOSITORY / name, os.X_OK) else 0o644)
    _fix_times(target)


def _fix_times(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (FIXED_TIME, FIXED_TIME))
        if path.is_dir():
            path.chmod(0o755)


def uv_program() -> Path:
    """The uv that goes into the base image, from its wheel."""
    program = cache_folder() / f"uv-{UV_VERSION}" / "uv"
    if not program.exists():
        with step(f"fetching uv {UV_VERSION}"), tempfile.TemporaryDirectory() as folder:
            output_of(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, f"uv=={UV_VERSION}"]
            )
            wheel = next(Path(folder).glob("*.whl"))
            program.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheel) as archive:
                member = next(name for name in archive.namelist() if name.endswith("/scripts/uv"))
                unfinished = program.with_name(f".uv-{os.getpid()}")
                unfinished.write_bytes(archive.read(member))
            unfinished.chmod(0o755)
            unfinished.replace(program)
    return program


def base_root() -> Path:
    """A tar of Debian bookworm with Python and certificates, made once by debootstrap."""
    tar = cache_folder() / "debian" / "bookworm-python3-1.tar"
    if not tar.exists():
        with step("unpacking Debian for the base image"):
            tar.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=tar.parent, prefix=".root-") as folder:
                log = cache_folder() / "log" / "debootstrap.log"
                packages = "python3,ca-certificates"
                command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", f"{folder}/root"]
                run_logged(command, log, "debootstrap")
                for waste in (
                    "var/cache/apt",
                    "var/lib/apt/lists",
                    "var/log",
                    "usr/share/doc",
                    "usr/share/man",
                    "usr/share/locale",
                ):
                    shutil.rmtree(f"{folder}/root/{waste}", ignore_errors=True)
                run_logged(
                    [
                        "tar",
                        "--create",
                        "--numeric-owner",
                        "--file",
                        f"{folder}/root.tar",
                        "--directory",
                        f"{folder}/root",
                        ".",
                    ],
                    log,
                    "tar",
                )
                Path(folder, "root.tar").rename(tar)
    return tar


def torch_constraints() -> str:
    """Requirements for torch and all it needs as the trainer's lock file has them, so that its `uv sync` keeps them."""
    dependencies: dict[str, set[str]] = {}
    for package in tomllib.loads((REPOSITORY / "trainer-image/uv.lock").read_text())["package"]:
        groups = [package.get("dependencies", []), *package.get("optional-dependencies", {}).values()]
        dependencies.setdefault(package["name"], set()).update(entry["name"] for group in groups for entry in group)
    seen: set[str] = set()
    waiting = {"torch"}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= dependencies.get(name, set()) - seen
    export = [
        "export",
        "--quiet",
        "--frozen",
        "--no-hashes",
        "--no-dev",
        "--no-header",
        "--no-annotate",
        "--project",
        str(REPOSITORY / "trainer-image"),
    ]
    lines = output_of([uv_program(), *export]).splitlines()
    return "".join(f"{line}\n" for line in lines if re.split(r"[=\[ ;]", line)[0] in seen)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        shutil.copymode(source, target)


def build_bases(builder: Builder) -> dict[str, str]:
    """Builds the two local base images; returns their references by name."""
    builder.contexts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=builder.contexts) as folder:
        context = Path(folder)
        _link_or_copy(base_root(), context / "root.tar")
        shutil.copyfile(AUTHORITIES, context / "ca-certificates.crt")
        shutil.copyfile(uv_program(), context / "uv")
        (context / "uv").chmod(0o755)
        os.utime(context / "ca-certificates.crt", (FIXED_TIME, FIXED_TIME))
        os.utime(context / "uv", (FIXED_TIME, FIXED_TIME))
        base = builder.build("base", SOURCES / "images/base.Dockerfile", context, {})
    with tempfile.TemporaryDirectory(dir=builder.contexts) as folder:
        Path(folder, "constraints.txt").write_text(torch_constraints())
        _fix_times(Path(folder))
        torch = builder.build("torch", SOURCES / "images/torch.Dockerfile", Path(folder), {"BASE_IMAGE": base})
    return {"base": base, "torch": torch}


def build_image(builder: Builder, image: Image, bases: dict[str, str]) -> str:
    """Builds one of the project's images; returns its reference."""
    if not (REPOSITORY / image.dockerfile).exists():
        raise ClusterError(f"{image.dockerfile} does not exist: the image {image.name} is built from it")
    with tempfile.TemporaryDirectory(dir=builder.contexts) as folder:
        stage_context(image.dockerfile, Path(folder))
        arguments = {"BASE_IMAGE": bases[image.base], **image.arguments}
        return builder.build(image.name, REPOSITORY / image.dockerfile, Path(folder), arguments)


def _share_blobs(layout: Layout, oci: Path) -> None:
    """Makes blobs that the OCI folder and containerd both hold one file on disk."""
    held = layout.containerd_root / "io.containerd.content.v1.content" / "blobs" / "sha256"
    for blob in (oci / "blobs" / "sha256").iterdir():
        twin = held / blob.name
        if twin.exists() and not twin.samefile(blob) and twin.stat().st_size == blob.stat().st_size:
            link = blob.with_name(f".{blob.name}")
            link.unlink(missing_ok=True)
            try:
                os.link(twin, link)
            except OSError:
                return  # the two folders are on different file systems
            link.replace(blob)


def prune(builder: Builder, wanted: set[str]) -> None:
    """Removes older builds of the project's images from containerd, buildah and the OCI folder.

    Kept are the `wanted` ones and whatever a workload of the cluster names, in an image field or an argument.
    """
    layout = builder.layout
    named = addons.kubectl(layout, "get", "pods,deployments", "--all-namespaces", "-o", "json")
    ours = tuple(f"{PREFIX}/{image.name}:" for image in IMAGES)

    def old(references: Iterable[str]) -> list[str]:
        return [name for name in references if name.startswith(ours) and name not in wanted and name not in named]

    if gone := old(imported_images(layout)):
        ctr(layout, "images", "rm", *gone)
    listed = json.loads(output_of(builder.command("images", "--json")))
    if gone := old(name for image in listed for name in image.get("names") or []):
        output_of(builder.command("rmi", *gone))
    index_file = builder.oci / "index.json"
    if not index_file.exists():
        return
    index = json.loads(index_file.read_text())
    names = {entry["annotations"]["org.opencontainers.image.ref.name"]: entry for entry in index["manifests"]}
    gone = old(names)
    kept = [entry for name, entry in names.items() if name not in gone]
    index["manifests"] = kept
    index_file.write_text(json.dumps(index))
    blobs = builder.oci / "blobs" / "sha256"
    used = set()
    for entry in kept:
        manifest = json.loads((blobs / entry["digest"].removeprefix("sha256:")).read_text())
        used |= {entry["digest"], manifest["config"]["digest"], *(part["digest"] for part in manifest["layers"])}
    for blob in blobs.iterdir():
        if f"sha256:{blob.name}" not in used:
            blob.unlink()


def limit_downloads(builder: Builder) -> None:
    """Empties the builds' download cache when it is larger than DOWNLOADS_LIMIT, as it is after torch was built."""
    folder = builder.root / "tmp" / "buildah-cache"
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if size > DOWNLOADS_LIMIT:
        shutil.rmtree(folder)


def deliver_s3(builder: Builder, registry: str) -> None:
    """Brings the demo's S3 server to a cluster of the user's, in its namespace `s3`, unless the namespace is there."""
    layout = builder.layout
    if addons.kubectl(layout, "get", "namespace", "s3", "--ignore-not-found", "-o", "name"):
        return
    program = binaries.build("versitygw") / "versitygw"
    reference = program_reference("s3", program)
    with step("S3 server"):
        builder.load(program_image(reference, program), reference)
        addons.apply_s3(layout, builder.push(reference, registry))
        addons.ensure_s3_bucket(layout)


def deliver(layout: Layout, names: list[str]) -> dict[str, str]:
    """Builds the images called `names` and brings them to the nodes; returns and records their references.

    With KUBECONTEXT they are pushed to the registry in REGISTRY, otherwise imported into the cluster's containerd.

    Raises:
        ClusterError: there is nowhere to bring them, or a build failed.
    """
    registry = os.environ.get("REGISTRY")
    foreign = bool(os.environ.get("KUBECONTEXT"))
    if foreign and not registry:
        raise ClusterError(
            "KUBECONTEXT is set but REGISTRY is not: set REGISTRY to a registry that the cluster's nodes pull from, "
            "such as registry.example.com/team"
        )
    if not foreign and not layout.containerd_socket.is_socket():
        raise ClusterError(
            "the local cluster does not run, so there is nowhere to bring the images: start it with `make cluster-up`"
        )
    builder = Builder(layout)
    if foreign:
        deliver_s3(builder, str(registry))
    bases = build_bases(builder)
    recorded: dict[str, str] = json.loads(layout.images.read_text()) if layout.images.exists() else {}
    present = set() if foreign else imported_images(layout)
    for image in (image for image in IMAGES if image.name in names):
        reference = build_image(builder, image, bases)
        if foreign:
            with step(f"pushing image {image.name}"):
                reference = builder.push(reference, str(registry))
        elif reference not in present:
            with step(f"importing image {image.name}"):
                builder.export(reference)
                import_layout(layout, builder.oci, reference)
                _share_blobs(layout, builder.oci)
        recorded[image.name] = reference
        temporary = layout.images.with_suffix(".new")
        temporary.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
        temporary.replace(layout.images)
        report(f"  {image.name:9} {reference}")
    limit_downloads(builder)
    if not foreign:
        prune(builder, set(recorded.values()))
    return recorded
