#!/usr/bin/env python3
"""Uploads files to an S3 store, or damages objects in it; credentials come from AWS_* variables.

It needs the trainer's environment:

store.py put FILE|FOLDER URI      uploads files that are missing or differ
store.py flip URI                 flips one bit in the middle of an object
store.py read URI                 prints an object
store.py copy URI FOLDER|URI      copies the objects below a uri to a folder, or elsewhere in the store
store.py remove URI               removes the objects below a uri
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import fsspec

MARKER = ".uploaded"


def digest_of(files: list[Path]) -> str:
    """Return the SHA-256 of the names and contents of the files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def put(source: Path, uri: str) -> str:
    """Upload a file, or a folder's files, unless the marker beside it records the same content."""
    filesystem, target = fsspec.core.url_to_fs(uri)
    bucket = target.split("/", 1)[0]
    if not filesystem.exists(bucket):
        filesystem.mkdir(bucket)
    files = sorted(file for file in source.rglob("*") if file.is_file()) if source.is_dir() else [source]
    marker = target + MARKER
    digest = digest_of(files)
    if filesystem.exists(marker) and filesystem.cat_file(marker).decode() == digest:
        return f"{uri} is up to date"
    for file in files:
        filesystem.put_file(str(file), f"{target}/{file.relative_to(source)}" if source.is_dir() else target)
    filesystem.pipe_file(marker, digest.encode())
    return f"uploaded {len(files)} files to {uri}"


def flip(uri: str) -> str:
    """Flip the lowest bit of the byte in the middle of the object."""
    filesystem, target = fsspec.core.url_to_fs(uri)
    content = bytearray(filesystem.cat_file(target))
    content[len(content) // 2] ^= 1
    filesystem.pipe_file(target, bytes(content))
    return f"flipped a bit of {uri}"


def copy(uri: str, target: str) -> str:
    """Copy the objects below a URI."""
    filesystem, source = fsspec.core.url_to_fs(uri)
    names = [name.removeprefix(source).lstrip("/") for name in filesystem.find(source)]
    for name in names:
        if "://" in target:
            filesystem.pipe_file(f"{target}/{name}", filesystem.cat_file(f"{source}/{name}"))
        else:
            (Path(target) / name).parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(f"{source}/{name}", f"{target}/{name}")
    return f"copied {len(names)} objects of {uri}"


def remove(uri: str) -> str:
    """Remove the objects below a URI."""
    filesystem, target = fsspec.core.url_to_fs(uri)
    names = filesystem.find(target)
    for name in names:
        filesystem.rm_file(name)
    return f"removed {len(names)} objects of {uri}"


def main() -> None:
    """Command line: see the module's docstring."""
    match sys.argv[1:]:
        case ["put", source, uri]:
            print(put(Path(source), uri))
        case ["flip", uri]:
            print(flip(uri))
        case ["read", uri]:
            filesystem, target = fsspec.core.url_to_fs(uri)
            print(filesystem.cat_file(target).decode(), end="")
        case ["copy", source, target]:
            print(copy(source, target))
        case ["remove", uri]:
            print(remove(uri))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
