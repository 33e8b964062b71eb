"""A job's connections: real servers, real redirects, each library that reaches a store."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx2
import pytest
import requests

from tests.trainer.hubserver import MAY_WRITE, HubServer
from tests.trainer.s3server import free_port
from tests.trainer.trainer_rig import chat_rows, s3_job, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.connections import AddressRefusedError, between_ranks, check_server
from tunesmith.contracts.environment import ALLOWED_ADDRESSES
from tunesmith.storage.credentials import Credentials, Origin
from tunesmith.storage.folder import Retry
from tunesmith_trainer.connections import denied, guarded
from tunesmith_trainer.errors import (
    AccessDeniedError,
    DatasetNotFoundError,
    InvalidSpecError,
    StorageUnavailableError,
)
from tunesmith_trainer.hub import Repository
from tunesmith_trainer.store import Stores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.trainer.s3server import S3Server
    from tests.trainer.trainer_rig import Workbench
    from tunesmith.storage.folder import Folder

ONLY_ONE = {ALLOWED_ADDRESSES: "127.0.0.1/32"}
"""Allows the server's address; 127.0.0.2, also on this machine, represents an address of the cluster."""


def repository_of(values: dict[str, str], retry: Retry) -> Repository:
    stores = Stores(secrets=Path("/none"), allow_file=False, environ={})
    credentials = Credentials(values, "the Secret mine", Origin.SECRET)
    return Repository("org/wren", credentials, stores.access(InvalidSpecError, retry))


class Server(ThreadingHTTPServer):
    """Records the host names of its requests."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("", 0), handler)
        self.reached: list[str] = []


class _Redirecting(BaseHTTPRequestHandler):
    server: Server

    def _answer(self) -> None:
        self.server.reached.append(self.headers["Host"])
        self.send_response(307)
        self.send_header("Location", f"http://127.0.0.2:{self.server.server_port}{self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_POST = _answer  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Do not log requests: pytest shows what matters."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[Server]:
    server = Server(handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def public() -> Iterator[Server]:
    """Start a server that answers each request with a redirect to an address of the cluster."""
    with serving(_Redirecting) as server:
        yield server


async def by_aiohttp(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(url):
        pass


LIBRARIES: dict[str, Callable[[str], object]] = {
    "requests": lambda url: requests.get(url, timeout=10),
    "httpx2": lambda url: httpx2.get(url, follow_redirects=True),
    "aiohttp": lambda url: asyncio.run(by_aiohttp(url)),
    "a socket": lambda url: socket.socket().connect((url.split("/")[2].split(":")[0], 1)),
}


@pytest.mark.parametrize("library", ["requests", "httpx2", "aiohttp"])
def test_no_redirect_leads_to_a_refused_address(library: str, public: Server) -> None:
    public.reached.clear()
    url = f"http://127.0.0.1:{public.server_port}/a"
    with guarded(ONLY_ONE), pytest.raises(Exception) as raised:  # noqa: PT011 - of each library its own
        LIBRARIES[library](url)
    failure = denied(raised.value, "the data set")
    assert isinstance(failure, AccessDeniedError)
    assert str(failure).startswith(
        "the data set resolves to 127.0.0.2, an address of the pod itself, which jobs and pools may not reach"
    )
    assert "the chart's value trainer.allowedAddresses" in str(failure)
    assert public.reached == [f"127.0.0.1:{public.server_port}"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_address_or_name_reaches_a_refused_address(library: str, host: str, public: Server) -> None:
    public.reached.clear()
    with guarded({}), pytest.raises(Exception) as raised:  # noqa: PT011 - of each library its own
        LIBRARIES[library](f"http://{host}:{public.server_port}/a")
    assert denied(raised.value, "it") is not None
    assert public.reached == []


def test_the_server_or_proxy_of_a_client_with_its_own_sockets_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_server("http://127.0.0.1:9")  # no guard is active
    with guarded({ALLOWED_ADDRESSES: "127.0.0.1/32"}):
        check_server("http://127.0.0.1:9/api")
        for server in ("http://127.0.0.2:9", "https://user:key@169.254.169.254/api", "http://[::1]:9"):
            with pytest.raises(AddressRefusedError):
                check_server(server)
        monkeypatch.setenv("https_proxy", "127.0.0.1:3128")
        check_server("https://nowhere.example")
        monkeypatch.setenv("https_proxy", "http://10.0.0.7:3128")
        with pytest.raises(AddressRefusedError):
            check_server("https://nowhere.example")


@pytest.mark.parametrize("library", ["requests", "httpx2", "aiohttp"])
def test_a_name_with_one_refused_address_is_refused(
    library: str, public: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    public.reached.clear()
    resolve = socket.getaddrinfo

    def both(host: str, *rest: Any, **more: Any) -> list[Any]:
        names = ["127.0.0.1", "127.0.0.2"] if host == "store.example" else [host]
        return [found for name in names for found in resolve(name, *rest, **more)]

    monkeypatch.setattr("socket.getaddrinfo", both)
    with guarded({}), pytest.raises(Exception) as raised:  # noqa: PT011 - of each library its own
        LIBRARIES[library](f"http://store.example:{public.server_port}/a")
    assert denied(raised.value, "it") is not None
    assert public.reached == []


def test_the_guard_ends_with_its_block_and_ignores_other_sockets(public: Server, tmp_path: Path) -> None:
    place = ("127.0.0.1", public.server_port)
    with guarded({}):
        with pytest.raises(AddressRefusedError):
            socket.create_connection(place)
        with between_ranks():
            socket.create_connection(place).close()
        with pytest.raises(AddressRefusedError):
            socket.create_connection(("::ffff:169.254.169.254", 80))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "socket"))
        listener.close()
    socket.create_connection(place).close()


def test_a_malformed_list_stops_the_job() -> None:
    with (
        pytest.raises(InvalidSpecError, match="'s3' is not a network"),
        guarded({ALLOWED_ADDRESSES: "s3"}),
    ):
        pass


# Jobs as they run in a pod of a cluster.


@pytest.mark.usefixtures("uploaded")
def test_a_store_in_the_cluster_must_be_listed(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same job, with and without the platform's list."""
    assert bench.run("validate", s3_job(), allow_file=False).code == 0
    monkeypatch.setenv(ALLOWED_ADDRESSES, "")
    for command in ("validate", "train"):
        ran = bench.run(command, s3_job(), allow_file=False, output="s3://tunesmith/store/listed/artifact")
        assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.ACCESS_DENIED, False)
        assert "127.0.0.1, an address of the pod itself, which jobs and pools may not reach" in ran.result.message
        assert (
            "ask the platform's administrators to add it to the chart's value trainer.allowedAddresses"
            in ran.result.message
        )


def test_the_owners_own_machine_is_not_guarded(
    bench: Workbench, s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_environment.filesystem().pipe_file(
        "tunesmith/own/train.jsonl", b"\n".join(json.dumps(row).encode() for row in chat_rows(24))
    )
    monkeypatch.delenv(ALLOWED_ADDRESSES)
    own = bench.job(dataset={"train": [{"uri": "s3://tunesmith/own/train.jsonl"}]})
    ran = bench.run("validate", own)
    assert ran.code == 0, ran.result.message


@pytest.mark.parametrize("part", ["base", "data", "export"])
@pytest.mark.parametrize("endpoint", ["http://169.254.169.254", "http://127.0.0.2:9", "redirect"])
def test_an_endpoint_in_a_users_secret_must_be_allowed(
    bench: Workbench,
    uploaded: S3Server,
    public: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    part: str,
    endpoint: str,
) -> None:
    monkeypatch.setenv(ALLOWED_ADDRESSES, "127.0.0.1/32")
    address = f"http://127.0.0.1:{public.server_port}" if endpoint == "redirect" else endpoint
    (tmp_path / "secrets/mine").mkdir(parents=True)
    for name, value in (uploaded.environment() | {"AWS_ENDPOINT_URL": address}).items():
        (tmp_path / "secrets/mine" / name).write_text(value)
    manifest = s3_job()
    spec = manifest["spec"]
    mine = {"secretRef": {"name": "mine"}}
    if part == "base":
        spec["baseModel"] |= mine
    elif part == "data":
        spec["dataset"]["train"][0] |= mine
    else:
        spec["output"] = {"exports": [{"uri": "s3://copies/wren"} | mine]}
    ran = bench.run("validate", manifest, "--secrets", str(tmp_path / "secrets"), allow_file=False)
    refused = "169.254.169.254" if "169" in endpoint else "127.0.0.2"
    assert f"resolves to {refused}, " in ran.result.message
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.ACCESS_DENIED, False)


def test_an_export_to_a_hub_at_a_refused_address_is_refused(public: Server) -> None:
    """Neither directly nor by a redirect; a listed Hub is reached."""
    with HubServer() as hub:
        for address, listed in (
            ("http://169.254.169.254", ""),
            (hub.url, "10.0.0.0/8"),
            (f"http://127.0.0.1:{public.server_port}", "127.0.0.1/32"),
        ):
            values = {"HF_TOKEN": MAY_WRITE, "HF_ENDPOINT": address}
            repository = repository_of(values, Retry(attempts=3))
            with (
                guarded({ALLOWED_ADDRESSES: listed}),
                pytest.raises(AccessDeniedError, match="which jobs and pools may not reach"),
            ):
                repository.create()
        assert hub.repositories == {}
        repository = repository_of(values | {"HF_ENDPOINT": hub.url}, Retry(attempts=1))
        with guarded(ONLY_ONE):
            repository.create()
        assert set(hub.repositories) == {"org/wren"}


READ_HUB = """
import sys
from tunesmith_trainer.connections import guarded
from tunesmith_trainer.errors import DatasetNotFoundError, TrainerError

with guarded():
    from pathlib import Path
    from tunesmith.storage.folder import Retry
    from tunesmith_trainer.store import Stores

    stores = Stores(secrets=Path("/none"), allow_file=False, retry=Retry(attempts=3))
    try:
        stores.folder("hf://datasets/org/doors", what="the data set", missing=DatasetNotFoundError).names()
    except TrainerError as error:
        print(error.reason, error)
    from huggingface_hub import constants
    from huggingface_hub.utils._runtime import is_xet_available
    print(constants.HF_HUB_DISABLE_XET, is_xet_available())
"""


def test_the_hub_is_read_without_redirects_and_without_the_unguarded_client(
    public: Server,
) -> None:
    """Run in a separate process: the Hub's library reads its endpoint when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", READ_HUB],
        env=os.environ | ONLY_ONE | {"HF_ENDPOINT": f"http://127.0.0.1:{public.server_port}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    shown, switched = done.stdout.splitlines()
    assert shown.startswith("AccessDenied HF_ENDPOINT of "), done.stderr
    assert "for the data set hf://datasets/org/doors, resolves to 127.0.0.2, " in shown
    assert switched == "True False"


MEET = """
import sys
from tunesmith_trainer.connections import guarded
from tunesmith_trainer.process.ranks import Ranks

ranks = Ranks(int(sys.argv[1]), 2, address="127.0.0.2", port=int(sys.argv[2]))
with guarded({}):
    ranks.connect("gloo", 60)
    print(ranks.sum(1.0))
    ranks.disconnect()
"""


def test_the_pods_of_a_job_connect_although_their_addresses_are_not_allowed() -> None:
    command = [sys.executable, "-c", MEET]
    port = str(free_port())
    pods = [subprocess.Popen([*command, rank, port], stdout=subprocess.PIPE, text=True) for rank in ("0", "1")]
    assert [pod.communicate(timeout=120)[0] for pod in pods] == ["[2.0]\n"] * 2


# The credentials of a Secret are sent where that Secret specifies, whatever store the environment names.


class _Recording(BaseHTTPRequestHandler):
    """Answers that nothing exists, and records its requests."""

    server: Server
    recorded: list[tuple[str, str]]

    def _answer(self) -> None:
        self.recorded.append((self.headers.get("Authorization", ""), self.headers.get("X-Amz-Security-Token", "")))
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_POST = _answer  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Do not log requests: pytest shows what matters."""


class Place:
    """A server with its address and the credentials that were sent to it."""

    def __init__(self, server: Server, recorded: list[tuple[str, str]]) -> None:
        self.recorded = recorded
        self.url = f"http://127.0.0.1:{server.server_port}"


@contextmanager
def recording() -> Iterator[Place]:
    recorded: list[tuple[str, str]] = []
    with serving(type("Handler", (_Recording,), {"recorded": recorded})) as server:
        yield Place(server, recorded)


@pytest.fixture
def stores_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Set the environment of a pod whose Secret tunesmith-store names a store and a Hub of its own."""
    with recording() as place:
        for name, value in {
            "AWS_ENDPOINT_URL": place.url,
            "AWS_ENDPOINT_URL_S3": place.url,
            "AWS_ACCESS_KEY_ID": "the-stores",
            "AWS_SECRET_ACCESS_KEY": "the-stores",
            "AWS_SESSION_TOKEN": "the-stores",
            "AWS_REGION": "mars-north-1",
            "AWS_DEFAULT_REGION": "mars-north-1",
            "HF_ENDPOINT": place.url,
            "HF_TOKEN": "the-stores",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place.url)
        yield place


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Record the host names that are looked up, none of which resolves; addresses do."""
    names: set[str] = set()
    resolve = socket.getaddrinfo

    def recorded(host: str, *rest: Any, **more: Any) -> list[Any]:
        if host[0].isdigit():
            return list(resolve(host, *rest, **more))
        names.add(host)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr("socket.getaddrinfo", recorded)
    return names


def of_a_secret(folder: Path, uri: str, **values: str) -> Folder:
    (folder / "secrets/mine").mkdir(parents=True)
    for name, value in values.items():
        (folder / "secrets/mine" / name).write_text(value)
    stores = Stores(secrets=folder / "secrets", allow_file=False, retry=Retry(attempts=1))
    return stores.folder(uri, what="the data set", missing=DatasetNotFoundError, secret="mine")


KEYS = {"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "mine"}


def test_keys_of_a_secret_without_an_endpoint_go_to_aws(stores_own: Place, resolved: set[str], tmp_path: Path) -> None:
    folder = of_a_secret(tmp_path, "s3://rows/data", **KEYS)
    with pytest.raises(StorageUnavailableError):
        folder.names()
    assert (stores_own.recorded, resolved) == ([], {"rows.s3.amazonaws.com"})


def test_keys_of_a_secret_go_to_its_endpoint_without_the_stores_settings(stores_own: Place, tmp_path: Path) -> None:
    with recording() as mine:
        folder = of_a_secret(tmp_path, "s3://rows/data", **KEYS, AWS_ENDPOINT_URL=mine.url)
        with pytest.raises(DatasetNotFoundError):
            folder.names()
        assert mine.recorded
        for authorization, token in mine.recorded:
            assert authorization.startswith("AWS4-HMAC-SHA256 Credential=mine/")
            assert "/us-east-1/s3/aws4_request" in authorization
            assert token == ""
    assert stores_own.recorded == []


@pytest.mark.parametrize("uri", ["hf://datasets/org/doors", "hf://org/tiny"])
def test_a_token_of_a_secret_goes_only_to_its_hub(
    stores_own: Place, resolved: set[str], tmp_path: Path, uri: str
) -> None:
    with recording() as mine:
        named = of_a_secret(tmp_path / "named", uri, HF_TOKEN="hf_mine", HF_ENDPOINT=f"{mine.url}/")
        with pytest.raises(DatasetNotFoundError):
            named.names()
        assert {authorization for authorization, _ in mine.recorded} == {"Bearer hf_mine"}
    assert resolved == set()
    with pytest.raises(StorageUnavailableError):
        of_a_secret(tmp_path / "unnamed", uri, HF_TOKEN="hf_mine").names()
    assert (stores_own.recorded, resolved) == ([], {"huggingface.co"})


def test_an_export_goes_only_to_the_hub_of_its_secret(stores_own: Place, resolved: set[str]) -> None:
    repository = repository_of({"HF_TOKEN": "hf_mine"}, Retry(attempts=1))
    with pytest.raises(StorageUnavailableError):
        repository.create()
    assert (stores_own.recorded, resolved) == ([], {"huggingface.co"})


# A folder's content cannot be outside of it.


@pytest.fixture
def claim(tmp_path: Path) -> Path:
    """Return a mounted claim, with a Secret of the pod beside it."""
    (tmp_path / "secret").mkdir()
    write_rows(tmp_path / "secret/key.jsonl", chat_rows(2))
    write_rows(tmp_path / "claim/data/train.jsonl", chat_rows(2))
    return tmp_path / "claim"


def opened(claim: Path, uri: str) -> Any:
    stores = Stores(secrets=Path("/none"), allow_file=False, claims=claim.parent)
    return stores.file(uri, what="the data set", missing=DatasetNotFoundError)


def read(claim: Path, uri: str) -> bytes:
    folder, name = opened(claim, uri)
    return bytes(folder.read(name))


def test_a_link_out_of_a_claim_is_refused(claim: Path) -> None:
    (claim / "data/in.jsonl").symlink_to("train.jsonl")
    (claim / "data/out.jsonl").symlink_to(claim.parent / "secret/key.jsonl")
    (claim / "away").symlink_to("../secret")
    assert read(claim, "pvc://claim/data/in.jsonl") == (claim / "data/train.jsonl").read_bytes()
    for uri in ("pvc://claim/data/out.jsonl", "pvc://claim/away/key.jsonl"):
        with pytest.raises(AccessDeniedError, match="through a symbolic link: copy the linked files into the claim"):
            read(claim, uri)
    with pytest.raises(AccessDeniedError, match="is outside of the claim through a symbolic link"):
        opened(claim, "pvc://claim/data/x")[0].check_links()
    folder, _ = opened(claim, "pvc://claim/data/x")
    for pattern in ("*.jsonl", None):
        with pytest.raises(AccessDeniedError, match=r"out\.jsonl is outside of the claim through a symbolic link"):
            folder.below(pattern)
    (claim / "data/out.jsonl").unlink()
    assert folder.below("*.jsonl") == ["in.jsonl", "train.jsonl"]
    assert opened(claim, "pvc://claim/x")[0].below("**/*.jsonl") == ["data/in.jsonl", "data/train.jsonl"]


def test_a_base_model_on_a_claim_with_a_link_out_of_it_is_refused(claim: Path, base_model: Path) -> None:
    """Its library opens files on its own, such as a chat template, which then becomes part of the artifact."""
    from tunesmith_trainer.base_model.model import fetch_base  # noqa: PLC0415 - takes seconds

    base = claim / "base"
    base.mkdir()
    for file in base_model.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    stores = Stores(secrets=Path("/none"), allow_file=False, claims=claim.parent)
    folder = stores.folder("pvc://claim/base", what="the base model", missing=DatasetNotFoundError)
    assert fetch_base(folder, claim / "unused", weights=True) == base
    (base / "chat_template.jinja").unlink(missing_ok=True)
    (base / "chat_template.jinja").symlink_to(claim.parent / "secret/key.jsonl")
    with pytest.raises(
        AccessDeniedError, match=r"chat_template\.jinja is outside of the claim through a symbolic link"
    ):
        fetch_base(folder, claim / "unused", weights=True)


LISTED = """<?xml version="1.0"?><ListBucketResult><Name>b</Name><KeyCount>2</KeyCount><IsTruncated>false</IsTruncated>
<Contents><Key>data/train.jsonl</Key><Size>3</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>
<Contents><Key>data/../../secret/key.jsonl</Key><Size>3</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>
</ListBucketResult>"""


class _Climbing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = LISTED.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Do not log requests: pytest shows what matters."""


def test_a_store_that_lists_a_path_out_of_its_folder_is_refused() -> None:
    with serving(_Climbing) as server:
        environ = {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        }
        stores = Stores(secrets=Path("/none"), allow_file=False, environ=environ, retry=Retry(attempts=1))
        folder = stores.folder("s3://b/data", what="the data set", missing=DatasetNotFoundError)
        with pytest.raises(AccessDeniedError, match="which is outside of the folder"):
            folder.below()
