"""Object stores through obstore: for the CLI, whose client for Kubernetes excludes s3fs.

Its requests are made in Rust, which `tunesmith.contracts.connections` does not see: pods never use it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from obstore.fsspec import FsspecStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunesmith.storage.schemes import Client

_RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}


class NativeFileSystem(FsspecStore):
    """obstore's file system, whose listings have the time of each file's last change.

    Args:
        protocol: name of the scheme.
        config: credentials and server, by obstore's names.
        client: settings of the client.
        options: of fsspec.
    """

    cachable = False

    def __init__(self, protocol: str, config: Mapping[str, str], client: Client, **options: Any) -> None:  # noqa: ANN401 - fsspec's
        plain = any(config.get(key, "").startswith("http://") for key in ("endpoint", "base_url"))
        given: dict[str, Any] = {
            "config": dict(config),
            "client_options": {
                "allow_http": plain,
                "connect_timeout": timedelta(seconds=client.connect_seconds),
                "timeout": timedelta(seconds=client.read_seconds),
            },
            "retry_config": _RETRIES,
        }
        super().__init__(protocol, **given, **options)  # type: ignore[call-overload] # one overload per scheme

    async def _ls(self, path: str, detail: bool = False, **_kwargs: object) -> list[Any]:  # noqa: FBT001, FBT002 - fsspec's signature
        bucket, prefix = self._split_path(path)
        found = await self._construct_store(bucket).list_with_delimiter_async(prefix)
        entries = [_file(bucket, entry) for entry in found["objects"]]
        entries += [{"name": f"{bucket}/{name}", "size": 0, "type": "directory"} for name in found["common_prefixes"]]
        if not entries:
            raise FileNotFoundError(path)
        return entries if detail else sorted(entry["name"] for entry in entries)

    async def _find(self, path: str, detail: bool = False, **_kwargs: object) -> Any:  # noqa: ANN401, FBT001, FBT002 - fsspec's signature
        bucket, prefix = self._split_path(path)
        pages = self._construct_store(bucket).list(prefix)
        found = {entry["name"]: entry async for page in pages for entry in (_file(bucket, item) for item in page)}
        return found if detail else sorted(found)


def _file(bucket: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": f"{bucket}/{entry['path']}",
        "size": entry["size"],
        "type": "file",
        "last_modified": entry["last_modified"],
    }
