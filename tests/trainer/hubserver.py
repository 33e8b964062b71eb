"""The part of the Hugging Face Hub's HTTP API that its library needs to create a repository and commit files to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

MAY_WRITE, MAY_READ = "hf_may-write", "hf_may-read"


@dataclass
class Commit:
    """A commit, with the repository's files after it."""

    message: str
    paths: set[str]
    files: dict[str, bytes]


@dataclass
class StoredRepository:
    """A repository of the server."""

    private: bool
    commits: list[Commit] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files if self.commits else {}


class HubServer:
    """Serves repositories of the organisation org, to which the token MAY_WRITE may write; a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, StoredRepository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[int] = []
        """Statuses that the next commits are answered with, without being applied."""
        self.lost_answers = 0
        """Number of the next commits that are applied but not answered."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_GET(self) -> None:
        tree = re.match(r"/api/models/([^/]+/[^/]+)/tree/main", self.path)
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)", self.path)
        found = self._repository((tree or info)[1]) if (tree or info) else None  # type: ignore[index]
        if found is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif tree:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
                for path, content in found.files.items()
            ]
            self._answer(200, entries)
        else:
            self._answer(200, {"id": info[1] if info else "", "sha": "0" * 40})

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rsplit("/", 1)[-1]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            self._preupload(match[1], json.loads(body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {"error": self.path})

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _repository(self, name: str) -> StoredRepository | None:
        return self.hub.repositories.get(name) if self._token in {MAY_WRITE, MAY_READ} else None

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization']}/{request['name']}"
        if self._token not in {MAY_WRITE, MAY_READ}:
            self._answer(401, {"error": "Invalid username or password."})
        elif self._token == MAY_READ or request["organization"] != "org":
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif name in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        else:
            self.hub.repositories[name] = StoredRepository(private=request.get("visibility") == "private")
            self._answer(200, {"url": f"{self.hub.url}/{name}"})

    def _preupload(self, name: str, request: dict[str, Any]) -> None:
        found = self._repository(name)
        if found is None or self._token != MAY_WRITE:
            self._answer(403, {"error": "Authorization error."})
            return
        files = []
        for file in request["files"]:
            large = file["path"].endswith((".safetensors", ".png"))
            content = found.files.get(file["path"])
            oid = None
            if content is not None:
                oid = hashlib.sha256(content).hexdigest() if large else _blob_id(content)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": files})

    def _batch(self, request: dict[str, Any]) -> None:
        objects = [
            {"oid": blob["oid"], "size": blob["size"]}
            | (
                {}
                if blob["oid"] in self.hub.objects
                else {"actions": {"upload": {"href": f"{self.hub.url}/objects/{blob['oid']}"}}}
            )
            for blob in request["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        found = self._repository(name)
        if found is None or self._token != MAY_WRITE:
            self._answer(403, {"error": "Authorization error."})
            return
        if self.hub.faults:
            self._answer(self.hub.faults.pop(0), {"error": "try later"})
            return
        commit = Commit("", set(), dict(found.files))
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                commit.message = value["summary"]
                continue
            commit.paths.add(value["path"])
            if line["key"] == "file":
                commit.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                commit.files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del commit.files[value["path"]]
        found.commits.append(commit)
        if self.hub.lost_answers:
            self.hub.lost_answers -= 1
            self.close_connection = True
            return
        oid = f"{len(found.commits):040d}"
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def _answer(self, status: int, document: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Do not log requests: pytest shows what matters."""
