"""Mirroring of requests to a shadow revision, whose answers are compared with those that clients got and discarded.

A request is mirrored once its client has the complete answer, so the mirrored one can neither delay nor fail it. The
number of mirrored requests and their bytes are bounded; what does not fit is dropped and counted. The engine gives
mirrored requests the lowest priority and refuses those that would wait for an adapter slot, and they are cancelled as
soon as another adapter waits for one on that pod. They count towards no limit of the tenant.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from http import HTTPStatus
from typing import TYPE_CHECKING

import aiohttp

from tunesmith.contracts.crash import DIGEST_HEADER, request_digest
from tunesmith.contracts.traffic import SHADOW_HEADER
from tunesmith.gateway.apis import CHAT, COMPLETIONS
from tunesmith.gateway.comparison import AnswerReader, documents
from tunesmith.gateway.faults import describe_error
from tunesmith.gateway.forward import NOT_STARTED_HEADER
from tunesmith.gateway.mirror import MAX_ANSWER_BYTES, Mirror
from tunesmith.gateway.split import Points

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.gateway.backends import Backend, BackendTable
    from tunesmith.gateway.comparison import AnswerFacts, Comparisons
    from tunesmith.gateway.crashes import CrashTable
    from tunesmith.gateway.request import Call

LOG = logging.getLogger(__name__)

MIRRORED_APIS = (CHAT, COMPLETIONS)
MAX_MIRRORED = 32
"""Highest number of requests that are mirrored, or chosen for it, at once."""
MAX_MIRRORED_PER_POD = 8
"""Highest number of sequences of mirrored requests on one pod."""
MAX_SECONDS = 600.0
"""Longest time of a mirrored request."""
_BUDGET_SHARE = 16
"""Mirrored requests may occupy this fraction of the budget of bytes in flight, in addition to it: one sixteenth."""
_CHECK_SECONDS = 0.25
"""Time between two checks whether mirrored requests must yield."""
_EVENTS_PER_TURN = 64
"""Events of a stream that are read before other tasks run."""
_NOT_MIRRORED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND})


class _DroppedError(Exception):
    """The request is not mirrored, and nothing follows from that for the shadow."""


class _FailedError(Exception):
    """The shadow answered with an error."""


class Mirrors:
    """Mirrored requests of this gateway.

    Args:
        session: makes the requests to engines.
        backends: the pods.
        crashes: requests that were in flight when an engine crashed; they are not mirrored.
        comparisons: gets the results.
        exists: returns True if there is a revision with an engine name.
        max_in_flight_bytes: budget of bytes in flight of all requests.
        is_busy: returns True if the gateway has no capacity for mirrored requests.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        backends: BackendTable,
        crashes: CrashTable,
        comparisons: Comparisons,
        exists: Callable[[str], bool],
        *,
        max_in_flight_bytes: int,
        is_busy: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._session = session
        self._backends = backends
        self._crashes = crashes
        self._comparisons = comparisons
        self._max_bytes = max_in_flight_bytes // _BUDGET_SHARE
        self._is_busy = is_busy
        self._clock = clock
        self._points = Points(exists)
        self._reserved = 0
        self._bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._by_pod: Counter[str] = Counter()
        self._closed = False

    def draw(self, call: Call) -> Mirror | None:
        """Return a mirror of a call if it is in its shadow's share and there is room for it, otherwise None.

        Its bytes are reserved until `start` or `release`.
        """
        model = call.model
        if model.shadow is None or model.pool is None or call.api not in MIRRORED_APIS:
            return None
        shadow, percent = model.shadow
        if self._points.next(shadow) * 100 >= percent:
            return None
        pieces = call.body.pieces(shadow, call.cache_salt)
        size = sum(map(len, pieces)) + 2 * MAX_ANSWER_BYTES
        has_room = self._reserved < MAX_MIRRORED and self._bytes + size <= self._max_bytes
        if self._closed or not has_room or self._is_busy():
            self._comparisons.add_dropped(shadow)
            return None
        self._reserved += 1
        self._bytes += size
        return Mirror(
            shadow=shadow,
            pool=model.pool,
            path=call.api.path,
            stream=call.body.stream,
            tenant_salt=call.cache_salt,
            request_id=call.request_id,
            sequences=call.body.sequences,
            pieces=pieces,
            size=size,
        )

    def release(self, mirror: Mirror) -> None:
        """Give up a mirror whose request got no complete answer."""
        self._reserved -= 1
        self._bytes -= mirror.size

    def start(self, mirror: Mirror) -> None:
        """Mirror a request whose client has the complete answer."""
        if self._closed:
            self.release(mirror)
            return
        task = asyncio.create_task(self._run(mirror), name=f"mirror of {mirror.request_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel all mirrored requests, and mirror none from now on."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, mirror: Mirror) -> None:
        try:
            await self._compare(mirror)
        except _FailedError:
            self._comparisons.add_failure(mirror.shadow)
        except (_DroppedError, asyncio.CancelledError):
            self._comparisons.add_dropped(mirror.shadow)
        except Exception as error:  # noqa: BLE001 - an internal fault; its text may contain the client's data
            LOG.error("mirror of request %s: %s", mirror.request_id, describe_error(error))  # noqa: TRY400
            self._comparisons.add_dropped(mirror.shadow)
        finally:
            self.release(mirror)

    async def _compare(self, mirror: Mirror) -> None:
        """Get the shadow's answer and count the comparison.

        Raises:
            _DroppedError: one of the answers cannot be compared.
            _FailedError: the shadow failed.
        """
        answer = mirror.answer
        served = None if answer is None else await _facts(answer, stream=mirror.stream)
        if served is None:
            raise _DroppedError
        backend = self._backends.pick(mirror.pool, mirror.shadow, is_base=False)
        if backend is None or backend.is_crowded(self._clock()):
            raise _DroppedError
        uid = backend.pod.uid
        if self._by_pod[uid] + mirror.sequences > MAX_MIRRORED_PER_POD:
            raise _DroppedError
        self._by_pod[uid] += mirror.sequences
        try:
            mirrored = await self._exchange_unless_crowded(mirror, backend)
        finally:
            self._by_pod[uid] -= mirror.sequences
            if not self._by_pod[uid]:
                del self._by_pod[uid]
        if mirrored is None:
            raise _FailedError
        self._comparisons.add(mirror.shadow, served, mirrored)

    async def _exchange_unless_crowded(self, mirror: Mirror, backend: Backend) -> AnswerFacts | None:
        """Return the shadow's answer, or cancel the request when other requests need the pod.

        Raises:
            _DroppedError: it was cancelled, not accepted, or is too long.
            _FailedError: the shadow failed.
        """
        exchange = asyncio.create_task(self._exchange(mirror, backend))
        deadline = self._clock() + MAX_SECONDS
        try:
            while not exchange.done():
                await asyncio.wait({exchange}, timeout=_CHECK_SECONDS)
                if not exchange.done() and (backend.is_crowded(self._clock()) or self._clock() > deadline):
                    raise _DroppedError
            return await exchange
        finally:
            exchange.cancel()
            await asyncio.gather(exchange, return_exceptions=True)

    async def _exchange(self, mirror: Mirror, backend: Backend) -> AnswerFacts | None:
        digest = request_digest(mirror.tenant_salt, mirror.path, mirror.shadow, mirror.pieces)
        if self._crashes.find(backend.pod.pool.uid, digest) is not None:
            raise _DroppedError
        headers = {
            "Authorization": f"Bearer {backend.serving_tokens.current}",
            "Content-Type": "application/json",
            "X-Request-Id": mirror.request_id,
            DIGEST_HEADER: digest,
            SHADOW_HEADER: "true",
        }
        body = b"".join(mirror.pieces)
        try:
            async with self._session.post(
                backend.url(mirror.path), data=body, headers=headers, allow_redirects=False
            ) as response:
                if response.status in _NOT_MIRRORED or response.headers.get(NOT_STARTED_HEADER) == "true":
                    raise _DroppedError
                if response.status != HTTPStatus.OK:
                    raise _FailedError
                return await _facts(await _read(response), stream=mirror.stream)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise _DroppedError from None
        except (aiohttp.ClientError, OSError):
            raise _FailedError from None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Return the body.

    Raises:
        _DroppedError: it is too long to be compared.
    """
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise _DroppedError
    return bytes(body)


async def _facts(answer: bytes, *, stream: bool) -> AnswerFacts | None:
    """Return the properties of an answer; None if it reports an error or cannot be read."""
    reader = AnswerReader()
    for number, document in enumerate(documents(answer, stream=stream), 1):
        reader.read(document)
        if number % _EVENTS_PER_TURN == 0:
            await asyncio.sleep(0)
    return reader.facts()
