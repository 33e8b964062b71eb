"""Files of web servers, over https:// only: ranges of bounded length, and no redirects to plain HTTP."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
from fsspec.implementations.http import HTTPFileSystem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp.client_middlewares import ClientHandlerType

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_PARTIAL, _UNSATISFIABLE = 206, 416
_MISSING = frozenset({404, 410})
_DENIED = frozenset({401, 403})


class UnsuitableServerError(Exception):
    """The server's responses cannot be used; the message has the reason."""


class HttpsFileSystem(HTTPFileSystem):  # type: ignore[misc] # fsspec has no types
    """fsspec's file system with its own requests, which read no more than the requested range.

    Args:
        connect_seconds: longest time until a connection is made.
        read_seconds: longest time without a byte.
        options: options of fsspec.
    """

    protocol = "https"

    def __init__(self, *, connect_seconds: float, read_seconds: float, **options: Any) -> None:  # noqa: ANN401 - fsspec's
        client = {
            "timeout": aiohttp.ClientTimeout(sock_connect=connect_seconds, sock_read=read_seconds),
            "trust_env": True,  # proxies
            "headers": {"Accept-Encoding": "identity"},
            "middlewares": (_only_https,),
        }
        super().__init__(client_kwargs=client, **options)

    async def _info(self, url: str, **_kwargs: object) -> dict[str, Any]:
        # A range request instead of HEAD, which servers of signed or generated files often refuse.
        async with self._part(url, 0, 0) as answer:
            if answer.status == _UNSATISFIABLE:
                return {"name": url, "size": 0, "type": "file"}
            size = _range_of(answer)[2]
            return {"name": url, "size": size, "type": "file"}

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **_kwargs: object) -> bytes:
        begin = start or 0
        stop = end if end is not None else (await self._info(url))["size"]
        if stop <= begin:
            return b""
        async with self._part(url, begin, stop - 1) as answer:
            first, last = _range_of(answer)[:2]
            if first != begin or last >= stop:
                raise UnsuitableServerError("the server sent a range other than the requested one")
            data = bytearray()
            async for piece in answer.content.iter_any():
                data += piece
                if len(data) > last - first + 1:
                    raise UnsuitableServerError("the server sent more bytes than announced")
            return bytes(data)

    @asynccontextmanager
    async def _part(self, url: str, first: int, last: int) -> AsyncIterator[aiohttp.ClientResponse]:
        session = await self.set_session()
        try:
            async with session.get(self.encode_url(url), headers={"Range": f"bytes={first}-{last}"}) as answer:
                yield answer
        except aiohttp.TooManyRedirects as error:
            raise UnsuitableServerError(f"it redirects {len(error.history)} times") from None


def _range_of(answer: aiohttp.ClientResponse) -> tuple[int, int, int]:
    """Return the first and last byte of a response, and the size of the file."""
    if answer.status in _MISSING:
        raise FileNotFoundError(str(answer.url))
    if answer.status in _DENIED:
        raise PermissionError(f"{answer.status} {answer.reason}")
    answer.raise_for_status()
    found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if answer.status != _PARTIAL or found is None:
        raise UnsuitableServerError("the server does not support range requests: copy the file to another store")
    first, last, size = map(int, found.groups())
    return first, last, size


async def _only_https(request: aiohttp.ClientRequest, handler: ClientHandlerType) -> aiohttp.ClientResponse:
    if request.url.scheme != "https":
        raise UnsuitableServerError(
            f"it redirects to {request.url.host} over plain HTTP, which is not protected against changes"
        )
    return await handler(request)
