"""Base models in images of OCI registries, which the kubelet mounts: uris `oci://registry/repository:tag/folder`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_HOST = r"[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?(:[0-9]+)?"
_REPOSITORY = r"(/[a-z0-9]+([._-]+[a-z0-9]+)*)+"
_DIGEST = r"@sha256:[0-9a-f]{64}"
_TAG = r":[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}"
_FOLDER = r"(/[^/\s]+)*/?"
IMAGE_PATTERN = f"^oci://{_HOST}{_REPOSITORY}({_TAG}({_DIGEST})?|{_DIGEST}){_FOLDER}$"
"""Pattern (RE2) of the uris: a tag or a digest is required, and separates the repository from the folder."""
IMAGE_EXAMPLE = "oci://registry.example/models/llama:1.0/folder"
_PARTS = re.compile(f"^oci://({_HOST}{_REPOSITORY}(?:{_TAG}(?:{_DIGEST})?|{_DIGEST}))({_FOLDER})$")


@dataclass(frozen=True)
class ImageVolume:
    """Image, as the kubelet's reference, and the folder in it; an empty folder is the image's root."""

    reference: str
    folder: str


def image_volume(uri: str) -> ImageVolume | None:
    """Return the image of an oci:// uri; None for other uris."""
    match = _PARTS.match(uri)
    if match is None:
        return None
    return ImageVolume(match[1], uri[match.end(1) :].strip("/"))
