"""`tunesmith-agent`: `serve` runs beside vLLM, `fetch-base` before it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import shutil
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp

from tunesmith.contracts.agent import AGENT_PORT
from tunesmith.contracts.connections import guarded
from tunesmith.contracts.environment import (
    ADMIN_TOKEN,
    AGENT_KEYS_FOLDER,
    AGENT_STATE_FOLDER,
    ALLOWED_ADDRESSES,
    CONTROL_KEY,
    EVENTS_KEY,
    METRICS_DIGEST,
    POD_UID,
)
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.keyfile import KeyFile
from tunesmith.contracts.result import TERMINATION_MESSAGE_MAX_BYTES, TERMINATION_MESSAGE_PATH, ExitCode
from tunesmith.storage.schemes import Use, examples
from tunesmith_server import middleware
from tunesmith_server.agent import Agent, AgentSettings
from tunesmith_server.api import AgentApi, Credentials
from tunesmith_server.artifact import PodLimits
from tunesmith_server.base_model import BaseModelError, fetch_base
from tunesmith_server.base_weights import BaseWeights, read_base_weights
from tunesmith_server.connections import Connections, serving
from tunesmith_server.desired import DesiredFile
from tunesmith_server.engine import EngineClient
from tunesmith_server.fetching import ArtifactFetcher, FetchSettings
from tunesmith_server.guard import CANARY_SECONDS, HANG_SECONDS
from tunesmith_server.lora import DEFAULT_MAX_RATIO
from tunesmith_server.metrics import Metrics
from tunesmith_server.store import StoreError, read_credentials, set_proxies

log = logging.getLogger("tunesmith-agent")


class SetupError(Exception):
    """The pod is not set up as the agent needs it."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit code: 0, 2 for a mistake of the setup, 3 where trying again can help."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    return run(arguments)


def run(arguments: list[str] | None) -> int:
    """As `main`, with the logging that is set up already."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "serve":
            asyncio.run(serve(options))
        else:
            _fetch_base(options)
    except (SetupError, BaseModelError) as error:
        return _end(str(error), ExitCode.USER_FAULT)
    except StoreError as error:
        return _end(str(error), ExitCode.USER_FAULT if error.permanent else ExitCode.RETRYABLE)
    return ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tunesmith-agent", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch-base", help="download the base model")
    fetch.add_argument("--uri", required=True, help=f"folder of the base model: {examples(Use.BASE_MODEL)}")
    fetch.add_argument("--revision", help="commit, tag or branch of an hf:// model")
    fetch.add_argument("--target", type=Path, required=True, help="folder to fill")
    fetch.add_argument("--secret", type=Path, required=True, help="mounted Secret with the uri's credentials")
    fetch.add_argument("--storage", type=int, required=True, help="bytes that the base model may take")
    fetch.add_argument("--fingerprint-file", type=Path, help="where the fingerprint goes; default: TARGET.fingerprint")
    run = commands.add_parser("serve", help="keep the engine's adapters as they are wanted")
    run.add_argument("--engine-url", default="http://127.0.0.1:8000")
    run.add_argument("--port", type=int, default=AGENT_PORT)
    keys = Path(AGENT_KEYS_FOLDER)
    run.add_argument("--control-key-file", type=Path, default=keys / CONTROL_KEY, help="the pool's control key")
    run.add_argument("--events-key-file", type=Path, default=keys / EVENTS_KEY, help="the pool's events key")
    run.add_argument(
        "--metrics-digest-file", type=Path, default=keys / METRICS_DIGEST, help="digests of the tokens of /metrics"
    )
    run.add_argument("--pod-uid", default=os.environ.get(POD_UID), help="this pod's UID")
    run.add_argument("--state", type=Path, default=Path(AGENT_STATE_FOLDER), help="folder shared with the engine")
    run.add_argument("--adapters", type=Path, default=Path("/adapters"), help="folder of adapters, read by the engine")
    run.add_argument("--base-model", type=Path, default=Path("/models/base"), help="the base model's folder")
    run.add_argument("--base-fingerprint-file", type=Path, default=Path("/models/base.fingerprint"))
    run.add_argument("--store", required=True, help="uri of the store; artifacts elsewhere are refused")
    run.add_argument("--secret", type=Path, required=True, help="mounted Secret with the store's credentials")
    run.add_argument("--storage", type=int, required=True, help="bytes that all adapters may take")
    run.add_argument(
        "--max-adapter-ratio",
        type=float,
        default=DEFAULT_MAX_RATIO,
        help="highest norm of an adapter's change of a module, relative to the base's weights",
    )
    run.add_argument("--max-lora-rank", type=int, required=True)
    run.add_argument("--max-loras", type=int, required=True, help="adapters that may be resident at once")
    run.add_argument("--drain-seconds", type=float, default=60.0, help="how long /drain waits for running requests")
    run.add_argument(
        "--canary-seconds",
        type=float,
        default=CANARY_SECONDS,
        help="time between two checks of an idle engine's answers",
    )
    run.add_argument(
        "--hang-seconds", type=float, default=HANG_SECONDS, help="time without a token after which an engine hangs"
    )
    return parser


def _fetch_base(options: argparse.Namespace) -> None:
    target: Path = options.target
    try:
        with guarded():
            credentials = read_credentials(options.secret)
            set_proxies(credentials)
            fingerprint = fetch_base(options.uri, options.revision, target, credentials, options.storage)
    except ValueError as error:
        raise SetupError(f"{error}.") from None
    place: Path = options.fingerprint_file or target.with_name(f"{target.name}.fingerprint")
    place.write_text(fingerprint + "\n")
    log.info("base model: %s, fingerprint %s", options.uri, fingerprint)


async def serve(options: argparse.Namespace) -> None:
    """Run the agent until SIGTERM or SIGINT.

    Raises:
        SetupError: a file or folder that the pod must bring is missing or damaged.
    """
    if not options.pod_uid:
        raise SetupError(f"The pod's UID is missing. Set {POD_UID} from metadata.uid.")
    control = _keys(options.control_key_file, "the pool's control key")
    events = _keys(options.events_key_file, "the pool's events key")
    metrics_digests = _keys(options.metrics_digest_file, "the digest of the token of /metrics")
    fingerprint = _fingerprint(options.base_fingerprint_file, options.base_model)
    base = _base_weights(options.base_model)
    limits = PodLimits(options.store, fingerprint, base, options.max_lora_rank, options.max_adapter_ratio)
    settings = AgentSettings(
        options.adapters,
        fingerprint,
        options.max_loras,
        options.drain_seconds,
        options.state,
        options.canary_seconds,
        options.hang_seconds,
    )
    metrics = Metrics()
    try:
        admin_token = prepare_engine(options.state)
        options.adapters.mkdir(parents=True, exist_ok=True)
        desired = DesiredFile(options.state)
        folders = FetchSettings(
            options.adapters,
            options.state,
            options.secret,
            options.storage,
            os.environ.get(ALLOWED_ADDRESSES, ""),
        )
        fetcher = ArtifactFetcher(folders, limits, metrics.downloaded)
    except (OSError, ValueError) as error:
        raise SetupError(f"The agent's folders cannot be used: {error}.") from None
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # vLLM closes an idle connection after 5 s; one that it is just closing must not be used.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(keepalive_timeout=2)) as session:
        agent = Agent(settings, EngineClient(session, options.engine_url, admin_token), desired, fetcher, metrics)
        credentials = Credentials(control, events, metrics_digests, options.pod_uid, admin_token)
        application = AgentApi(agent, metrics, credentials).application()
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(serving(application, options.port, Connections()))
            except OSError as error:
                raise SetupError(f"Port {options.port} cannot be listened on: {error.strerror}.") from None
            loop = asyncio.create_task(agent.run())
            ended = asyncio.create_task(stop.wait())
            log.info("agent serves on port %d for base %s", options.port, fingerprint)
            await asyncio.wait({loop, ended}, return_when=asyncio.FIRST_COMPLETED)
            if loop.done():
                loop.result()
            loop.cancel()
            ended.cancel()


def prepare_engine(state: Path) -> str:
    """Put the middleware and its admin token where vLLM finds them; the token. A restarted agent keeps the token.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = state / "middleware"
    folder.mkdir(parents=True, exist_ok=True)
    for module in sorted(Path(middleware.__path__[0]).glob("tunesmith_*.py")):
        temporary = folder / f".{module.name}"
        shutil.copyfile(module, temporary)
        temporary.replace(folder / module.name)
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
        return base_fingerprint(LocalModelFolder(base_model))  # a mounted volume, which nobody downloaded
    except (OSError, ValueError) as error:
        raise SetupError(f"The base model at {base_model} cannot be used: {error}.") from None


def _base_weights(base_model: Path) -> BaseWeights:
    try:
        weights = read_base_weights(base_model)
    except (OSError, ValueError) as error:
        raise SetupError(f"The base model at {base_model} cannot be used: {error}.") from None
    if not weights.tensors:
        raise SetupError(f"The base model's folder {base_model} holds no safetensors files; mount it into the agent.")
    return weights


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


def _end(message: str, code: ExitCode) -> int:
    """Say why the process ends where Kubernetes and people look."""
    sys.stderr.write(f"tunesmith-agent: {message}\n")
    termination = Path(TERMINATION_MESSAGE_PATH)
    if termination.exists():
        termination.write_bytes(message.encode()[:TERMINATION_MESSAGE_MAX_BYTES])
    return code


if __name__ == "__main__":
    sys.exit(main())
