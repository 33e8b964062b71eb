"""Checksums that stores compute of their files, as `<algorithm>:<hex>`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from typing import Any

_CRC32, _CRC32_BYTES = "crc32", 4
_S3_HEADERS = {"ChecksumSHA256": "sha256", "ChecksumCRC32": _CRC32}


class Checksum:
    """Checksum that is computed piece by piece.

    Args:
        algorithm: sha256, md5 or crc32.
    """

    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        self._crc = 0
        self._digest = None if algorithm == _CRC32 else hashlib.new(algorithm, usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        """Add a piece."""
        if self._digest is None:
            self._crc = zlib.crc32(data, self._crc)
        else:
            self._digest.update(data)

    def text(self) -> str:
        """Return the checksum, `<algorithm>:<hex>`."""
        value = self._crc.to_bytes(_CRC32_BYTES, "big").hex() if self._digest is None else self._digest.hexdigest()
        return f"{self._algorithm}:{value}"


def no_checksum(_filesystem: object, _path: str) -> str:
    """Return an empty text."""
    return ""


def s3_checksum(filesystem: Any, path: str) -> str:  # noqa: ANN401 - fsspec has no types
    """Return the checksum of an object that was uploaded with one over the whole object, not over its parts."""
    bucket, key, _ = filesystem.split_path(path)
    answer = filesystem.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    # The checksum of the parts' checksums ends in the number of parts.
    whole = {name: value for name, value in answer.items() if name in _S3_HEADERS and "-" not in value}
    return next((_from_base64(_S3_HEADERS[name], whole[name]) for name in _S3_HEADERS if name in whole), "")


def gs_checksum(filesystem: Any, path: str) -> str:  # noqa: ANN401 - fsspec has no types
    """Return the MD5 of an object that was not composed of others."""
    return _from_base64("md5", filesystem.info(path).get("md5Hash") or "")


def az_checksum(filesystem: Any, path: str) -> str:  # noqa: ANN401 - fsspec has no types
    """Return the MD5 of a blob that was uploaded with one."""
    settings = filesystem.info(path).get("content_settings") or {}
    value = settings.get("content_md5") if isinstance(settings, dict) else getattr(settings, "content_md5", None)
    return f"md5:{bytes(value).hex()}" if value else ""


def _from_base64(algorithm: str, value: str) -> str:
    try:
        decoded = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return ""
    return f"{algorithm}:{decoded.hex()}" if decoded else ""
