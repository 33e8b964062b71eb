"""Object stores through obstore, for the CLI, whose Kubernetes client is incompatible with s3fs.

Pods never use it: its requests are made in Rust, which `tunesmith.contracts.connections` cannot check.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from obstore.exceptions import AlreadyExistsError
from obstore.fsspec import FsspecStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunesmith.storage.schemes import Client

_RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}


class NativeFileSystem(FsspecStore):
    """obstore's file system, extended by modification times in listings, open ranges and conditional writes.

    Args:
        protocol: name of the scheme.
        config: credentials and server, under obstore's names.
        client: settings of the client.
        options: options of fsspec.
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

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_kwargs: object) -> bytes:
        bucket, path_in_bucket = self._split_path(path)
        store = self._construct_store(bucket)
        if start is None and end is None:
            answer = await store.get_async(path_in_bucket)
        elif end is None:
            answer = await store.get_async(path_in_bucket, options={"range": {"offset": start or 0}})
        else:
            return (await store.get_range_async(path_in_bucket, start=start or 0, end=end)).to_bytes()
        return (await answer.bytes_async()).to_bytes()

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_kwargs: object) -> None:
        bucket, path_in_bucket = self._split_path(path)
        try:
            await self._construct_store(bucket).put_async(
                path_in_bucket, value, mode="create" if mode == "create" else "overwrite"
            )
        except AlreadyExistsError:
            raise FileExistsError(path) from None


def _file(bucket: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": f"{bucket}/{entry['path']}",
        "size": entry["size"],
        "type": "file",
        "last_modified": entry["last_modified"],
    }
