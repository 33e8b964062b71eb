"""Real parts of a serving pod on this machine: vLLM, the agent, an S3 server, and small LoRA adapters to load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import s3fs  # type: ignore[import-untyped]

from tunesmith.api.finetunejob_status import ServableStatus
from tunesmith.contracts.agent import keys_file, metrics_digests, metrics_tokens, pod_tokens
from tunesmith.contracts.artifact import (
    ArtifactAdapter,
    ArtifactBase,
    ArtifactFile,
    ArtifactManifest,
    digest_of,
)
from tunesmith.contracts.environment import ALLOWED_ADDRESSES
from tunesmith.contracts.location import engine_name
from tunesmith.contracts.safetensors import read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = Path.home() / ".cache/tunesmith"
T = TypeVar("T")
STORE = "s3://tunesmith/store"
BASE_NAME = "team/smol"
CONTROL_KEY, EVENTS_KEY, SERVING_KEY = (
    b"control-key-of-the-tests",
    b"events-key-of-the-tests",
    b"serving-key-of-the-tests",
)
GATEWAY_KEY = b"gateway-key-of-the-tests"
POD_UID = "uid-of-the-pod"
METRICS_TOKEN = metrics_tokens((GATEWAY_KEY,))[0]
CONTROL_TOKEN, EVENTS_TOKEN, SERVING_TOKEN = (
    pod_tokens((key,), POD_UID)[0] for key in (CONTROL_KEY, EVENTS_KEY, SERVING_KEY)
)
PATIENCE = 600.0
"""Seconds until a condition that is polled for counts as never met."""


class MissingPartError(Exception):
    """A program or file that the tests need is not on this machine."""


def find(what: str, variable: str, candidates: list[Path], fix: str) -> Path:
    """The first that exists of the environment variable's path and the candidates."""
    named = os.environ.get(variable)
    for path in [Path(named)] if named else candidates:
        if path.exists():
            return path
    raise MissingPartError(f"{what} was not found at {named or candidates}: {fix}, or set {variable}.")


def vllm_program() -> Path:
    project = REPOSITORY / "server-image/engine-cpu"
    return find("vLLM", "TUNESMITH_VLLM", [project / ".venv/bin/vllm"], f"run `uv sync --project {project}`")


def versitygw_program() -> Path:
    candidates = [*sorted((CACHE / "bin").glob("versitygw-*/versitygw")), REPOSITORY / ".cluster/bin/versitygw"]
    return find("versitygw", "TUNESMITH_VERSITYGW", candidates, "run `make cluster-up` once")


def model_folder() -> Path:
    candidates = [CACHE / "models/SmolLM2-135M-Instruct"]
    return find("SmolLM2-135M-Instruct", "TUNESMITH_TEST_MODEL", candidates, "run `make model`")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """Poll until the condition is true; its value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.1)


def write_secret(folder: Path, values: dict[str, str]) -> Path:
    """A Secret as a kubelet mounts it: links into a folder that is named by the time, to which `..data` is a link."""
    folder.mkdir(parents=True, exist_ok=True)
    version = folder / f"..{time.strftime('%Y_%m_%d_%H_%M_%S', time.gmtime())}.{time.monotonic_ns()}"
    version.mkdir()
    for name, value in values.items():
        (version / name).write_text(value)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    link = folder / "..data_tmp"
    link.symlink_to(version.name)
    link.replace(folder / "..data")
    return folder


class S3Server:
    """versitygw over a folder, with one account."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.data = folder / "data"
        (self.data / "tunesmith").mkdir(parents=True)  # a bucket
        self.secret = {
            "AWS_ACCESS_KEY_ID": "tunesmith",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
        }
        root = {"ROOT_ACCESS_KEY": "tunesmith", "ROOT_SECRET_KEY": "secret-of-the-tests"}
        with (folder / "versitygw.log").open("wb") as log:
            self._process = subprocess.Popen(
                [versitygw_program(), "--quiet", "--port", f"127.0.0.1:{self.port}", "posix", self.data],
                env={**os.environ, **root},
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: listens(self.port), "the S3 server listens", 30)
        self.files = s3fs.S3FileSystem(
            key="tunesmith",
            secret="secret-of-the-tests",
            endpoint_url=self.url,
            client_kwargs={"region_name": "us-east-1"},
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    @property
    def process_id(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def has_ipv6() -> bool:
    """True if this machine has IPv6, as the containers of a pod may not."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def write_safetensors(path: Path, tensors: dict[str, np.ndarray[Any, Any]], dtype: str = "F32") -> None:
    header: dict[str, Any] = {}
    place = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


@dataclass
class Artifact:
    """An artifact's folder on this machine, before it is published."""

    folder: Path
    fingerprint: str
    rank: int

    def publish(self, store: S3Server, namespace: str = "team", model: str = "pirate") -> dict[str, str]:
        """Write tunesmith.json, upload all, and give the entry of the desired list."""
        return self.upload(store, self.seal(), namespace, model)

    def seal(self, **changes: Any) -> bytes:
        """The bytes of tunesmith.json, written into the folder."""
        files = {
            path.name: ArtifactFile(
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=path.stat().st_size
            )
            for path in sorted(self.folder.iterdir())
            if path.name != "tunesmith.json"
        }
        manifest = ArtifactManifest(
            files=files,
            base=ArtifactBase(fingerprint=self.fingerprint, uri="s3://tunesmith/models/smol"),
            adapter=ArtifactAdapter(method="lora", rank=self.rank, alpha=16, target_modules=["q_proj", "v_proj"]),
            dataset_digest="sha256:" + "0" * 64,
            hyperparameters={},
            versions={},
            servable=ServableStatus(vllm=True),
        ).model_copy(update=changes)
        document = manifest.to_bytes()
        (self.folder / "tunesmith.json").write_bytes(document)
        return document

    def upload(self, store: S3Server, document: bytes, namespace: str, model: str) -> dict[str, str]:
        digest = digest_of(document)
        uri = f"{STORE}/{namespace}/{model}-{digest[7:15]}/artifact"
        for path in self.folder.iterdir():
            store.files.pipe_file(f"{uri}/{path.name}", path.read_bytes())
        return {"engineName": engine_name(namespace, model, digest), "digest": digest, "uri": uri}


def make_adapter(
    folder: Path, base: Path, fingerprint: str, *, seed: int, rank: int = 8, layers: int = 30, **config: Any
) -> Artifact:
    """A random LoRA adapter for q_proj and v_proj of the first layers; with all of them it changes every answer."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, tensor in read_tensors(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "v_proj")) and int(module.split(".")[2]) < layers:
            outputs, inputs = tensor.shape
            place = f"base_model.model.{module}"
            tensors[f"{place}.lora_A.weight"] = random.normal(0, 0.1, (rank, inputs)).astype(np.float32)
            tensors[f"{place}.lora_B.weight"] = random.normal(0, 0.1, (outputs, rank)).astype(np.float32)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "lora_dropout": 0.0,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return Artifact(folder, fingerprint, rank)


@dataclass
class Pod:
    """Folders and ports that the containers of a pod share."""

    folder: Path
    base: Path
    store: S3Server

    def __post_init__(self) -> None:
        self.state = self.folder / "run"
        self.adapters = self.folder / "adapters"
        self.keys = self.folder / "keys"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.keys.mkdir(exist_ok=True)
        for name, key in (("control", CONTROL_KEY), ("events", EVENTS_KEY), ("serving", SERVING_KEY)):
            (self.keys / name).write_bytes(key)
        (self.keys / "metrics").write_bytes(keys_file(metrics_digests((GATEWAY_KEY,))))
        self.secret = self.folder / "tunesmith-store"
        if not self.secret.exists():
            write_secret(self.secret, self.store.secret)
        self.engine_port, self.agent_port = free_port(), free_port()
        self.engine_url = f"http://127.0.0.1:{self.engine_port}"
        self.agent_url = f"http://127.0.0.1:{self.agent_port}"

    @property
    def admin_token(self) -> str:
        return (self.state / "admin-token").read_text()


class Container:
    """A process that a test may kill and start again, as a kubelet does."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._command, self._environment, self.log = command, environment, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **self._environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL to all its processes, as the death of a container's first process is."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    @property
    def group(self) -> int:
        """The process group of its processes."""
        assert self._process is not None
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while the first process runs."""
        return None if self._process is None else self._process.poll()

    def listening(self) -> set[tuple[str, int]]:
        """Addresses and ports on which its processes listen."""
        assert self._process is not None
        inodes = set()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getpgid(int(process.name)) == self._process.pid:
                    inodes |= {str(link.readlink()) for link in (process / "fd").iterdir()}
        found = set()
        for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:  # LISTEN
                    address, port = fields[1].split(":")
                    raw = b"".join(struct.pack("=I", int(address[i : i + 8], 16)) for i in range(0, len(address), 8))
                    found.add((socket.inet_ntop(family, raw), int(port, 16)))
        return found

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def agent_container(pod: Pod, **options: Any) -> Container:
    program = REPOSITORY / "server-image/.venv/bin/tunesmith-agent"
    flags: dict[str, Any] = {
        "engine-url": pod.engine_url,
        "port": pod.agent_port,
        "control-key-file": pod.keys / "control",
        "events-key-file": pod.keys / "events",
        "metrics-digest-file": pod.keys / "metrics",
        "pod-uid": POD_UID,
        "state": pod.state,
        "adapters": pod.adapters,
        "base-model": pod.base,
        "base-fingerprint-file": pod.folder / "base.fingerprint",
        "store": STORE,
        "secret": pod.secret,
        "storage": 2**30,
        "max-lora-rank": 16,
        "max-adapters": 3,
        "drain-seconds": 60,
        **{name.replace("_", "-"): value for name, value in options.items()},
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    environment = {ALLOWED_ADDRESSES: "127.0.0.0/8"}
    return Container([str(program), "serve", *arguments], environment, pod.folder / "agent.log")


def engine_variables() -> dict[str, str]:
    """Variables of a vLLM on this machine's CPUs."""
    return {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # As in the image, which has no compiler either.
        "TORCHDYNAMO_DISABLE": "1",
        "CXX": "/nowhere/c++",
        "PATH": f"{vllm_program().parent}:{os.environ['PATH']}",
        **dict.fromkeys(("VLLM_HOST_IP", "VLLM_LOOPBACK_IP", "MASTER_ADDR"), "127.0.0.1"),
        **dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), "lo"),
    }


def engine_container(pod: Pod, *first: str, **variables: str) -> Container:
    """vLLM with its supervisor. `first`: arguments before the others."""
    arguments = [
        *first,
        *("--served-model-name", BASE_NAME, "--port", str(pod.engine_port)),
        *("--enable-lora", "--max-loras", "4", "--max-cpu-loras", "4", "--max-lora-rank", "16"),
        *("--kv-cache-memory-bytes", str(128 * 2**20), "--max-model-len", "512", "--dtype", "float32"),
        *("--middleware", "tunesmith_middleware.Middleware", "--max-num-seqs", "8"),
        *("--structured-outputs-config", '{"backend": "guidance"}', "--scheduling-policy", "priority"),
    ]
    environment = {
        "PYTHONPATH": str(pod.state / "middleware"),
        "TUNESMITH_SERVING_KEY_FILE": str(pod.keys / "serving"),
        "TUNESMITH_POD_UID": POD_UID,
        "TUNESMITH_AGENT_URL": pod.agent_url,
        "TUNESMITH_ADMIN_TOKEN_FILE": str(pod.state / "admin-token"),
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **engine_variables(),
        **variables,
    }
    command = [str(vllm_program().with_name("python")), "-m", "tunesmith_supervisor", str(pod.base), *arguments]
    return Container(command, environment, pod.folder / "engine.log")
