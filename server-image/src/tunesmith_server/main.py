"""Agent of a serving pod: `serve` runs beside vLLM, `fetch-base` before vLLM starts."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import secrets
import shutil
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp

from tunesmith.contracts import addresses
from tunesmith.contracts.connections import guarded
from tunesmith.contracts.environment import ADMIN_TOKEN, ALLOWED_ADDRESSES
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.keyfile import KeyFile
from tunesmith.contracts.result import TERMINATION_MESSAGE_MAX_BYTES, TERMINATION_MESSAGE_PATH, ExitCode
from tunesmith.settings import read
from tunesmith_server import middleware
from tunesmith_server.agent import Agent
from tunesmith_server.api import AgentApi, Credentials
from tunesmith_server.artifact import PodLimits
from tunesmith_server.base_model import BaseModel, BaseModelError, fetch_base
from tunesmith_server.base_weights import BaseWeights, read_base_weights
from tunesmith_server.connections import Connections, serving
from tunesmith_server.desired import DesiredFile
from tunesmith_server.engine import EngineClient
from tunesmith_server.fetching import ArtifactFetcher, FetchSettings
from tunesmith_server.metrics import Metrics
from tunesmith_server.middleware.tunesmith_media import ADDRESSES
from tunesmith_server.model_cache import Limits, ModelCache, lock_in_use
from tunesmith_server.parallel_sizes import config_problem
from tunesmith_server.settings import FetchBaseSettings, ServeSettings
from tunesmith_server.store import StoreError, read_credentials, set_proxies

_POD_VOLUME = "ask the platform's administrators to raise the chart's value serving.baseModelStorage"
_CACHE_VOLUME = (
    "raise baseModelCache.maxSize, make its volume larger, or delete pools with other models; a model that no pod uses "
    "is removed when an hour has passed since its last start"
)

log = logging.getLogger("tunesmith-agent")


class SetupError(Exception):
    """The pod lacks something that the agent needs."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for an error in the setup, 3 for an error that a retry can fix."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    return run(sys.argv[1:] if arguments is None else arguments)


def run(arguments: list[str]) -> int:
    """Run a command without configuring logging."""
    command, *flags = _parser().parse_args(arguments[:1]).command, *arguments[1:]
    try:
        if command == "serve":
            asyncio.run(serve(read(ServeSettings, flags)))
        else:
            _fetch_base(read(FetchBaseSettings, flags))
    except (SetupError, BaseModelError) as error:
        return _report_exit(str(error), ExitCode.USER_FAULT)
    except StoreError as error:
        return _report_exit(str(error), ExitCode.USER_FAULT if error.permanent else ExitCode.RETRYABLE)
    return ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tunesmith-agent", description=__doc__, epilog="Example: tunesmith-agent serve --help"
    )
    parser.add_argument("command", choices=("fetch-base", "serve"), help="with --help: its flags")
    return parser


def _fetch_base(settings: FetchBaseSettings) -> None:
    target = settings.target
    root, remedy = (target.parent, _POD_VOLUME) if settings.cache is None else (settings.cache, _CACHE_VOLUME)
    try:
        root.mkdir(parents=True, exist_ok=True)
        cache = ModelCache(root, Limits(settings.storage, remedy))
        with guarded({ALLOWED_ADDRESSES: ",".join(settings.allowed_addresses)}):
            credentials = read_credentials(settings.secret)
            set_proxies(credentials)
            model = BaseModel(settings.uri, settings.revision, target, settings.gpus, settings.artifact_digest)
            fingerprint, arrival = fetch_base(model, credentials, cache)
    except ValueError as error:
        raise SetupError(f"{error}.") from None
    except OSError as error:
        raise SetupError(_unusable(root, error)) from None
    path = settings.fingerprint_file or target.with_name(f"{target.name}.fingerprint")
    path.write_text(fingerprint + "\n")
    log.info("base model: %s, fingerprint %s, %s", settings.uri, fingerprint, arrival.model_dump_json(by_alias=True))
    _write_termination_message(arrival.model_dump_json(by_alias=True))


def _unusable(root: Path, error: OSError) -> str:
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return (
            f"The volume at {root} cannot be written by user {os.getuid()}, group {os.getgid()} ({error.strerror}): "
            f"change the owner of its folder to {os.getuid()}, or its group to {os.getgid()} with write permission."
        )
    return f"The volume at {root} cannot be used: {error}."


async def serve(settings: ServeSettings) -> None:
    """Run the agent until SIGTERM or SIGINT.

    Raises:
        SetupError: a file or folder that the pod must provide is missing or damaged.
    """
    control = _keys(settings.control_key_file, "the pool's control key")
    events = _keys(settings.events_key_file, "the pool's events key")
    metrics_digests = _keys(settings.metrics_digest_file, "the digest of the token of /metrics")
    lock_in_use(settings.base_model_lock)
    fingerprint = _fingerprint(settings.base_fingerprint_file, settings.base_model)
    base = _base_weights(settings.base_model)
    _check_sizes(settings.base_model, settings.gpus)
    limits = PodLimits(
        settings.store,
        fingerprint,
        base,
        settings.max_lora_rank,
        settings.max_adapter_ratio,
        settings.equivalent_to,
    )
    metrics = Metrics()
    try:
        admin_token = prepare_engine(settings.state)
        settings.adapters.mkdir(parents=True, exist_ok=True)
        desired = DesiredFile(settings.state)
        folders = FetchSettings(
            settings.adapters,
            settings.state,
            settings.secret,
            settings.storage,
            ",".join(settings.allowed_addresses),
        )
        fetcher = ArtifactFetcher(folders, limits, metrics.downloaded)
    except (OSError, ValueError) as error:
        raise SetupError(f"The agent's folders cannot be used: {error}.") from None
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # vLLM closes an idle connection after 5 s; a connection that vLLM is about to close must not be reused.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(keepalive_timeout=2)) as session:
        engine = EngineClient(session, settings.engine_url, admin_token)
        agent = Agent(settings, fingerprint, engine, desired, fetcher, metrics)
        credentials = Credentials(control, events, metrics_digests, settings.pod_uid, admin_token)
        application = AgentApi(agent, metrics, credentials).application()
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(serving(application, settings.port, Connections()))
            except OSError as error:
                raise SetupError(f"Port {settings.port} cannot be listened on: {error.strerror}.") from None
            loop = asyncio.create_task(agent.run())
            stopped = asyncio.create_task(stop.wait())
            log.info("the agent listens on port %d; base model fingerprint %s", settings.port, fingerprint)
            await asyncio.wait({loop, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if loop.done():
                loop.result()
            loop.cancel()
            stopped.cancel()


def prepare_engine(state: Path) -> str:
    """Copy the middleware and its admin token to where vLLM finds them; return the token.

    A restarted agent keeps the token.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = state / "middleware"
    folder.mkdir(parents=True, exist_ok=True)
    modules = {module.name: module for module in Path(middleware.__path__[0]).glob("tunesmith_*.py")}
    modules[f"{ADDRESSES}.py"] = Path(str(addresses.__file__))
    for name, module in sorted(modules.items()):
        temporary = folder / f".{name}"
        shutil.copyfile(module, temporary)
        temporary.replace(folder / name)
    path = state / ADMIN_TOKEN
    if not path.exists():
        temporary = state / f".{ADMIN_TOKEN}"
        temporary.touch(mode=0o640)
        temporary.write_text(secrets.token_hex(32))
        temporary.chmod(0o440)
        temporary.replace(path)
    return path.read_text()


def _fingerprint(file: Path, base_model: Path) -> str:
    if file.exists():
        return _read(file, "the base model's fingerprint").strip()
    try:
        return base_fingerprint(LocalModelFolder(base_model))  # a mounted volume, so no download recorded a fingerprint
    except (OSError, ValueError) as error:
        raise SetupError(f"The base model at {base_model} cannot be used: {error}.") from None


def _base_weights(base_model: Path) -> BaseWeights:
    try:
        weights = read_base_weights(base_model)
    except (OSError, ValueError) as error:
        raise SetupError(f"The base model at {base_model} cannot be used: {error}.") from None
    if not weights.tensors:
        raise SetupError(
            f"The base model's folder {base_model} contains no safetensors files: mount the model into the agent."
        )
    return weights


def _check_sizes(base_model: Path, gpus: int) -> None:
    try:
        problem = config_problem((base_model / "config.json").read_bytes(), gpus)
    except OSError as error:
        raise SetupError(f"The base model at {base_model} cannot be used: {error}.") from None
    if problem is not None:
        raise SetupError(problem)


def _keys(path: Path, what: str) -> KeyFile:
    try:
        return KeyFile(path)
    except OSError as error:
        raise SetupError(f"{path} with {what} cannot be read: {error.strerror}. Check the pod's volumes.") from None
    except ValueError as error:
        raise SetupError(f"{path} with {what} cannot be used: {error}. Check the pool's Secret.") from None


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise SetupError(f"{path} with {what} cannot be read: {error.strerror}. Check the pod's volumes.") from None


def _report_exit(message: str, code: ExitCode) -> int:
    """Write the reason for the exit to the log and to the container's termination message; return the exit code."""
    sys.stderr.write(f"tunesmith-agent: {message}\n")
    _write_termination_message(message)
    return code


def _write_termination_message(message: str) -> None:
    termination = Path(TERMINATION_MESSAGE_PATH)
    if termination.exists():
        termination.write_bytes(message.encode()[:TERMINATION_MESSAGE_MAX_BYTES])


if __name__ == "__main__":
    sys.exit(main())
