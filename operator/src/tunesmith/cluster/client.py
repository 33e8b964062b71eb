"""Asynchronous client of one cluster. Objects are plain dicts; kubernetes' exceptions do not leave this package."""

from __future__ import annotations

import json
import os
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlencode

import aiohttp
import yaml
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import ApiClient, Configuration

from tunesmith.cluster.connector import Connector
from tunesmith.cluster.errors import (
    AlreadyExistsError,
    ClusterError,
    ConfigurationError,
    NotFoundError,
    UnavailableError,
    error_of,
)
from tunesmith.cluster.resources import Object, Objects, Resource, named, resource_of
from tunesmith.cluster.watch import WatchEvent, watch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

FIELD_MANAGER = "tunesmith"
PAGE_SIZE = 500
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=10)
_STREAM_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=90)
_LOG_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10)
"""No read timeout: a container may log nothing for any length of time."""
_MAX_DEPTH = 12_000
_HTTP_ERROR = 400

PatchType = Literal["merge", "strategic", "json"]
Propagation = Literal["Background", "Foreground", "Orphan"]
_PATCH_CONTENT_TYPES: dict[str, str] = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
}


@dataclass(frozen=True, repr=False)
class Connection:
    """Address of the API server, and credentials for it. Its repr is hidden because it contains credentials."""

    server: str
    ca_file: str | None
    certificate_file: str | None
    key_file: str | None
    token: str | None
    verify: bool


class Cluster:
    """Client of one API server. Create it with `Cluster.connect()`; close it, or use it with `async with`."""

    def __init__(
        self,
        configuration: Configuration,
        *,
        namespace: str = "default",
        observer: Callable[[str, str, str], None] | None = None,
    ) -> None:
        self._configuration: Any = configuration
        self._client: Any = ApiClient(self._configuration)
        self._connector = Connector(
            limit=self._configuration.connection_pool_maxsize, ssl=self._client.rest_client.ssl_context
        )
        session_options = self._configuration.client_session_kwargs or {}
        self._configuration.client_session_kwargs = {**session_options, "connector": self._connector}
        self._observer = observer
        self.namespace = namespace
        """Namespace of the kubeconfig's context, or of the pod."""

    @classmethod
    async def connect(
        cls,
        *,
        kubeconfig: str | os.PathLike[str] | None = None,
        context: str | None = None,
        observer: Callable[[str, str, str], None] | None = None,
    ) -> Self:
        """Return a client with the credentials read, without making a request.

        Args:
            kubeconfig: file to read, or a list of files as in $KUBECONFIG; None: $KUBECONFIG, the pod's service
                account, ~/.kube/config, in this order.
            context: context of the kubeconfig; None: $KUBECONTEXT, then the current one of the first file that has one.
            observer: called with (verb, kind, result) after each request; result is `ok` or an error's label.

        Raises:
            ConfigurationError: there are no credentials, or they cannot be read.
        """
        configuration: Any = Configuration()
        # Disables the library's own retries: callers decide by the error's `retry`.
        configuration.retries = None
        load: Any = kubernetes_config
        in_cluster = kubeconfig is None and "KUBECONFIG" not in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ
        given = str(kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config")
        files = [] if in_cluster else _kubeconfig_files(given)
        if not in_cluster and not files:
            raise ConfigurationError(
                f"there is no kubeconfig at {given}: set KUBECONFIG to one, or run `make cluster-up`"
            )
        try:
            if in_cluster:
                load.load_incluster_config(client_configuration=configuration)
                # The API server needs no proxy, and reading the proxy variables costs a thread per request.
                configuration.client_session_kwargs = {"trust_env": False}
                return cls(configuration, namespace=_pod_namespace(), observer=observer)
            loader = await load.load_kube_config(
                config_file=os.pathsep.join(map(str, files)),
                context=context or os.environ.get("KUBECONTEXT") or _current_context(files),
                client_configuration=configuration,
                persist_config=False,
            )
            namespace = loader.current_context.get("context", {}).get("namespace") or "default"
            return cls(configuration, namespace=namespace, observer=observer)
        except Exception as error:  # the loader propagates any error of YAML, files and exec plugins
            place = "the pod's service account" if in_cluster else f"the kubeconfig {given}"
            raise ConfigurationError(f"{place} cannot be used: {error}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
        await self._connector.close_all()

    @property
    def server(self) -> str:
        """Address of the API server, `https://host:port`."""
        return str(self._configuration.host)

    async def connection(self) -> Connection:
        """Return the address with current credentials, for another client of the same API server."""
        settings = self._configuration
        token = (await settings.auth_settings()).get("BearerToken", {}).get("value") or ""
        return Connection(
            server=settings.host,
            ca_file=settings.ssl_ca_cert,
            certificate_file=settings.cert_file,
            key_file=settings.key_file,
            token=token.split(" ", 1)[-1] or None,
            verify=settings.verify_ssl,
        )

    async def get(self, kind: str, name: str, namespace: str | None = None) -> Object:
        """Return an object.

        Raises:
            NotFoundError: the object does not exist.
        """
        resource = resource_of(kind)
        return await self._json("get", resource, "GET", resource.path(self._in(resource, namespace), name))

    async def find(self, kind: str, name: str, namespace: str | None = None) -> Object | None:
        """Return an object, or None if it does not exist."""
        try:
            return await self.get(kind, name, namespace)
        except NotFoundError:
            return None

    async def list(self, kind: str, namespace: str | None = None, *, labels: str = "", fields: str = "") -> Objects:
        """Return all objects of a kind; without `namespace` those of all. `labels` and `fields` are selectors."""
        return (await self.list_at(kind, namespace, labels=labels, fields=fields))[0]

    async def list_at(
        self,
        kind: str,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        page_size: int = PAGE_SIZE,
        keep: Callable[[Object], Object] = lambda item: item,
    ) -> tuple[Objects, str]:
        """Return all objects and the resourceVersion to watch from.

        Args:
            kind: kind of the objects.
            namespace: namespace of the objects; None: all namespaces.
            labels: label selector.
            fields: field selector.
            page_size: objects per response of the API server.
            keep: returns the parts of an object to keep; only one page at a time is in memory completely.
        """
        items, version = [], ""
        pages = self.pages(kind, namespace, labels=labels, fields=fields, page_size=page_size)
        async for page, version in pages:  # noqa: B007 - every page has the same version
            items += [keep(item) for item in page]
        return items, version

    async def pages(
        self,
        kind: str,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        page_size: int = PAGE_SIZE,
    ) -> AsyncGenerator[tuple[Objects, str], None]:
        """Yield all objects, one response of the API server at a time, each with the list's resourceVersion.

        The arguments are those of `list_at`.
        """
        resource = resource_of(kind)
        query = {"labelSelector": labels, "fieldSelector": fields, "limit": str(page_size)}
        while True:
            page = await self._json("list", resource, "GET", resource.path(namespace), query=query)
            metadata = page.get("metadata", {})
            yield [named(item, resource) for item in page.get("items") or []], metadata.get("resourceVersion", "")
            if not metadata.get("continue"):
                return
            query["continue"] = metadata["continue"]

    async def create(self, manifest: Object, *, field_manager: str = FIELD_MANAGER) -> Object:
        """Create an object.

        Raises:
            AlreadyExistsError: an object of that name exists.
            InvalidError: the API server refuses the object.
        """
        resource = resource_of(manifest["kind"])
        path = resource.path(self._in(resource, manifest["metadata"].get("namespace")))
        return await self._json("create", resource, "POST", path, body=manifest, query={"fieldManager": field_manager})

    async def apply(
        self,
        manifest: Object,
        *,
        force: bool = True,
        field_manager: str = FIELD_MANAGER,
        subresource: str | None = None,
    ) -> Object:
        """Apply a manifest (server-side apply). It is the full intent: fields that it no longer has are removed.

        Raises:
            ConflictError: `force` is False and another field manager owns a field.
            InvalidError: the API server refuses the object.
        """
        resource = resource_of(manifest["kind"])
        metadata = manifest["metadata"]
        return await self._json(
            "apply",
            resource,
            "PATCH",
            resource.path(self._in(resource, metadata.get("namespace")), metadata["name"], subresource),
            body=manifest,
            query={"fieldManager": field_manager, "force": str(force).lower()},
            content_type="application/apply-patch+yaml",
        )

    async def overwrite(self, manifest: Object) -> None:
        """Create an object, or replace it without reading it.

        For Secrets: server-side apply needs the right to patch, and an empty patch returns a Secret's content.
        """
        try:
            await self.create(manifest)
        except AlreadyExistsError:
            await self.replace(manifest)

    async def replace(self, manifest: Object, *, subresource: str | None = None) -> Object:
        """Replace an object that was read and modified; its resourceVersion must still be current.

        Raises:
            ConflictError: the object changed since it was read.
        """
        resource = resource_of(manifest["kind"])
        metadata = manifest["metadata"]
        path = resource.path(self._in(resource, metadata.get("namespace")), metadata["name"], subresource)
        return await self._json("update", resource, "PUT", path, body=manifest, query={"fieldManager": FIELD_MANAGER})

    async def replace_status(self, manifest: Object) -> Object:
        """Replace the `status` of an object that was read and modified; its resourceVersion must still be current.

        Raises:
            ConflictError: the object changed since it was read.
        """
        return await self.replace(manifest, subresource="status")

    async def patch(
        self,
        kind: str,
        name: str,
        namespace: str | None,
        body: Object | Objects,
        *,
        type_: PatchType = "merge",
        subresource: str | None = None,
    ) -> Object:
        """Patch an object with a JSON merge patch, a strategic merge patch (built-in kinds only) or a JSON patch."""
        resource = resource_of(kind)
        return await self._json(
            "patch",
            resource,
            "PATCH",
            resource.path(self._in(resource, namespace), name, subresource),
            body=body,
            query={"fieldManager": FIELD_MANAGER},
            content_type=_PATCH_CONTENT_TYPES[type_],
        )

    async def scale(self, kind: str, name: str, namespace: str | None, replicas: int) -> None:
        """Set `spec.replicas` through the scale subresource.

        Raises:
            InvalidError: a rule of the kind refuses it; the message is the rule's.
        """
        await self.patch(kind, name, namespace, {"spec": {"replicas": replicas}}, subresource="scale")

    async def delete(
        self,
        kind: str,
        name: str,
        namespace: str | None = None,
        *,
        propagation: Propagation = "Background",
        grace_seconds: int | None = None,
        uid: str | None = None,
    ) -> bool:
        """Delete an object; return False if it did not exist.

        Args:
            kind: kind of the object, such as `Job`.
            name: name of the object.
            namespace: namespace of the object; None: the connection's own.
            propagation: deletion policy for the objects that it owns.
            grace_seconds: grace period of a pod; None: the pod's own.
            uid: delete the object only if it has this UID.

        Raises:
            ConflictError: the object has another UID.
        """
        resource = resource_of(kind)
        body: Object = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            await self._json(
                "delete", resource, "DELETE", resource.path(self._in(resource, namespace), name), body=body
            )
        except NotFoundError:
            return False
        return True

    def watch(
        self,
        kind: str,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        alive: Callable[[], None] = lambda: None,
        keep: Callable[[Object], Object] = lambda item: item,
    ) -> AsyncIterator[WatchEvent]:
        """Yield every object as ADDED, then SYNCED, then every change, without end: see `tunesmith.cluster.watch`."""
        return watch(self, kind, namespace, labels=labels, fields=fields, alive=alive, keep=keep)

    async def stream(
        self, kind: str, namespace: str | None, query: Mapping[str, str], *, verb: str = "watch"
    ) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a streamed response about a collection."""
        resource = resource_of(kind)
        path = resource.path(namespace)
        async with self._response(verb, resource, "GET", path, query=query, timeout=_STREAM_TIMEOUT) as response:
            async for line in _lines(response):
                yield line

    async def log(
        self, pod: str, namespace: str | None, *, container: str, tail: int | None = None, follow: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a container's log.

        Args:
            pod: name of the pod.
            namespace: namespace of the pod; None: the connection's own.
            container: name of the container.
            tail: number of last lines; None: all that the kubelet has kept.
            follow: continue until the container stops.

        Raises:
            NotFoundError: the pod does not exist.
            InvalidError: the container has not started.
        """
        resource = resource_of("Pod")
        query = {"container": container, "follow": str(follow).lower(), "tailLines": "" if tail is None else str(tail)}
        path = resource.path(self._in(resource, namespace), pod, "log")
        async with self._response("log", resource, "GET", path, query=query, timeout=_LOG_TIMEOUT) as response:
            async for line in _lines(response):
                yield line

    def _in(self, resource: Resource, namespace: str | None) -> str | None:
        return (namespace or self.namespace) if resource.namespaced else None

    async def _json(
        self,
        verb: str,
        resource: Resource,
        method: str,
        path: str,
        *,
        body: Object | Objects | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        async with self._response(
            verb, resource, method, path, body=body, query=query, content_type=content_type, timeout=_REQUEST_TIMEOUT
        ) as response:
            document: Object = json.loads(await response.read())
        return named(document, resource) if "metadata" in document and "items" not in document else document

    @asynccontextmanager
    async def _response(
        self,
        verb: str,
        resource: Resource,
        method: str,
        path: str,
        *,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's own
        body: Object | Objects | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        result = "ok"
        response: aiohttp.ClientResponse | None = None
        filled = {key: value for key, value in (query or {}).items() if value}
        url = f"{self.server}{path}" + (f"?{urlencode(filled)}" if filled else "")
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": FIELD_MANAGER}
        try:
            await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
            answer = await self._client.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=timeout
            )
            response = answer.response
            if response.status >= _HTTP_ERROR:
                raise await _error(response)
            yield response
        except ClusterError as error:
            result = error.label
            raise
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            result = UnavailableError.label
            raise UnavailableError(
                f"the API server at {self.server} cannot be reached: {str(error) or type(error).__name__}"
            ) from error
        except ValueError as error:
            result = UnavailableError.label
            raise UnavailableError(f"the API server at {self.server} returned invalid JSON: {error}") from error
        finally:
            if response is not None and (timeout is _STREAM_TIMEOUT or timeout is _LOG_TIMEOUT):
                _abort(response)
            elif response is not None:
                response.release()
            if self._observer is not None:
                self._observer(verb, resource.kind, result)


def allow_deep_objects() -> None:
    """Allow this process to parse every object that an API server may return.

    An API server accepts JSON with 10,000 levels in a field without a schema, such as a FineTuneJob's
    `method.peft.config`; a single such object would otherwise break every list of its kind. 8 MiB of stack suffice.
    """
    sys.setrecursionlimit(max(sys.getrecursionlimit(), _MAX_DEPTH))


def _kubeconfig_files(given: str) -> list[Path]:
    """Return the files of a list with separators; those that are missing or empty are skipped, as kubectl does."""
    paths = [Path(name).expanduser() for name in given.split(os.pathsep) if name]
    return [path for path in paths if path.is_file() and path.stat().st_size]


def _current_context(files: list[Path]) -> str | None:
    """Return the current context: the one of the first file that names one, as in kubectl.

    The loader would take the last file's.
    """
    for path in files:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("current-context"):
            return str(document["current-context"])
    return None


def _pod_namespace() -> str:
    return (_SERVICE_ACCOUNT / "namespace").read_text().strip()


def _abort(response: aiohttp.ClientResponse) -> None:
    """Close a stream that may be unread, without waiting for the API server."""
    transport = response.connection.transport if response.connection is not None else None
    response.close()
    if transport is not None:
        transport.abort()


async def _error(response: aiohttp.ClientResponse) -> ClusterError:
    body = await response.read()
    try:
        status = json.loads(body)
    except ValueError:
        return error_of(response.status, "", body.decode(errors="replace").strip()[:500])
    return error_of(response.status, str(status.get("reason") or ""), str(status.get("message") or ""))


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield lines of any length, without their ends. `StreamReader.readline` refuses long ones."""
    rest = b""
    async for chunk in response.content.iter_any():
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            yield line
    if rest:
        yield rest
