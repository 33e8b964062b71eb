"""Table of the schemes of uris. Everything that differs between stores is a field of a row."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tunesmith.storage.checksums import az_checksum, gs_checksum, no_checksum, s3_checksum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

GOOGLE_KEY = "GOOGLE_SERVICE_ACCOUNT_KEY"
"""Key of a Secret, or environment variable, with the JSON file of a Google service account's key."""
HUB = "https://huggingface.co"
_BUCKET = r"[^/\s]+"
_NAME = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
_DENIED_STATUS = frozenset({401, 403})
DENIED_S3_CODES = frozenset(
    {
        "AccessDenied",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "XAdminUserNotFound",
    }
)
"""Codes of S3 servers that s3fs does not translate to PermissionError."""


class Use(StrEnum):
    """Purpose of a uri."""

    BASE_MODEL = "base models"
    DATA = "data"
    TASKS = "evaluation tasks"
    EXPORT = "copies"
    STORE = "the store"


@dataclass(frozen=True)
class Client:
    """Settings of the libraries' clients.

    Attributes:
        connect_seconds: longest time until a connection is made.
        read_seconds: longest time without a byte.
        read_only: True if no writes follow.
        s3_session: session of aiobotocore for S3; None: each file system has its own.
    """

    connect_seconds: float = 10
    read_seconds: float = 60
    read_only: bool = False
    s3_session: Any = None


def _never(_: BaseException) -> bool:
    return False


def _no_options(_values: Mapping[str, str], _client: Client, *, ambient: bool) -> dict[str, Any]:  # noqa: ARG001 - a row's signature
    return {}


def _nothing_wrong(_values: Mapping[str, str]) -> str | None:
    return None


@dataclass(frozen=True)
class Scheme:
    """Row of the table.

    Attributes:
        name: scheme of the uri, without `://`.
        title: name of the store.
        example: example of a uri, for messages and the documentation.
        uses: permitted uses of its uris.
        filesystem: import path of the fsspec class.
        options: returns arguments of the class for the values of a Secret or the environment. If `ambient`, the library
            may add credentials from the machine; otherwise it must not.
        native: returns obstore's configuration for the same values; None if obstore does not support the store.
        root: pattern (RE2) of the part between `://` and the first slash.
        path: pattern (RE2) of the part after that slash, without a trailing slash.
        aliases: other tools' names of the scheme.
        credentials: alternatives, each with the keys that form a complete credential.
        optional: further keys of a Secret.
        alone: keys of `credentials` that may be set without the others if pods have their own identity.
        create_arguments: arguments of `kubectl create secret generic` for the usual credential.
        key_note: remark about the keys.
        endpoint: keys for the server's address; the first one set is used.
        default_server: server that is used without such a key.
        keys_belong_to_server: True if credentials are valid for one server only.
        malformed: returns why the values of a complete credential cannot be used; None if they can.
        unreadable: explanation for values that the library refuses although they are not malformed.
        reserved: what the library would not treat as part of a name, and the message about it.
        lists: True if the store can list a folder.
        keeps_uri: True if the file system expects complete uris.
        local_only: True if it is available only in a run without a cluster.
        mounted: True if Kubernetes mounts it, so it needs no credentials.
        list_options: arguments that make a listing bypass the cache.
        modified: key of a listing's entry with the time of a file's last change.
        version: key of a listing's entry with a value that differs after every write.
        checksum: returns the checksum that the store has of a file, `<algorithm>:<hex>`, or an empty text, for the file
            system and a path.
        no_credentials: returns True for an exception that means that no credentials were found.
        denied: returns True for an exception, besides PermissionError, that means that access is denied.
        missing: returns True for an exception, besides FileNotFoundError, that means that something does not exist.
        no_bucket: returns True for an exception that means that the bucket does not exist.
        invalid: returns True for an exception that means that the store cannot have such a name.
    """

    name: str
    title: str
    example: str
    uses: frozenset[Use]
    filesystem: str
    options: Callable[..., dict[str, Any]] = _no_options
    native: Callable[[Mapping[str, str]], dict[str, str]] | None = None
    root: str = _BUCKET
    path: str = ".*[^/]"
    aliases: tuple[str, ...] = ()
    credentials: tuple[tuple[str, ...], ...] = ()
    optional: tuple[str, ...] = ()
    alone: frozenset[str] = frozenset()
    create_arguments: str = ""
    key_note: str = ""
    endpoint: tuple[str, ...] = ()
    default_server: str = ""
    keys_belong_to_server: bool = False
    malformed: Callable[[Mapping[str, str]], str | None] = _nothing_wrong
    unreadable: str = "the library does not accept its format"
    reserved: tuple[str, str] | None = None
    lists: bool = True
    keeps_uri: bool = False
    local_only: bool = False
    mounted: bool = False
    list_options: Mapping[str, Any] = field(default_factory=dict)
    modified: str = ""
    version: str = ""
    checksum: Callable[[Any, str], str] = no_checksum
    no_credentials: Callable[[BaseException], bool] = _never
    denied: Callable[[BaseException], bool] = _never
    missing: Callable[[BaseException], bool] = _never
    no_bucket: Callable[[BaseException], bool] = _never
    invalid: Callable[[BaseException], bool] = _never

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of a Secret that are used for this scheme."""
        return (*(key for keys in self.credentials for key in keys), *self.optional)

    @property
    def module(self) -> str:
        """Module of the fsspec class."""
        return self.filesystem.rpartition(".")[0]

    def endpoint_of(self, values: Mapping[str, str]) -> tuple[str, str] | None:
        """Return the key for the server's address, and its value; None if none is set."""
        return next(((key, values[key]) for key in self.endpoint if values.get(key)), None)


def s3_options(values: Mapping[str, str], client: Client, *, ambient: bool) -> dict[str, Any]:
    """Return the arguments of s3fs."""
    endpoint = values.get("AWS_ENDPOINT_URL") or values.get("AWS_ENDPOINT_URL_S3") or None
    region = values.get("AWS_REGION") or values.get("AWS_DEFAULT_REGION") or (None if ambient else "us-east-1")
    config: dict[str, Any] = {
        "connect_timeout": client.connect_seconds,
        "read_timeout": client.read_seconds,
        "retries": {"max_attempts": 2, "mode": "standard"},
    }
    if not ambient:
        config["ignore_configured_endpoint_urls"] = True
    if endpoint:
        # Stores other than Amazon's support neither virtual-hosted buckets nor the newer checksums.
        config |= {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    return {
        "key": values.get("AWS_ACCESS_KEY_ID") or None,
        "secret": values.get("AWS_SECRET_ACCESS_KEY") or None,
        "token": values.get("AWS_SESSION_TOKEN") or None,
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": region} if region else {},
        "config_kwargs": config,
        "session": client.s3_session,
    }


def s3_native(values: Mapping[str, str]) -> dict[str, str]:
    """Return obstore's configuration."""
    endpoint = values.get("AWS_ENDPOINT_URL") or values.get("AWS_ENDPOINT_URL_S3")
    return _given(
        access_key_id=values.get("AWS_ACCESS_KEY_ID"),
        secret_access_key=values.get("AWS_SECRET_ACCESS_KEY"),
        session_token=values.get("AWS_SESSION_TOKEN"),
        endpoint=endpoint,
        region=values.get("AWS_REGION") or values.get("AWS_DEFAULT_REGION") or "us-east-1",
    )


def gs_native(values: Mapping[str, str]) -> dict[str, str]:
    """Return obstore's configuration."""
    return _given(service_account_key=values.get(GOOGLE_KEY), base_url=values.get("STORAGE_EMULATOR_HOST"))


def az_native(values: Mapping[str, str]) -> dict[str, str]:
    """Return obstore's configuration. It has no connection string, so the parts are set one by one."""
    connection = values.get("AZURE_STORAGE_CONNECTION_STRING") or ""
    parts = dict(part.split("=", 1) for part in connection.split(";") if "=" in part)
    return _given(
        account_name=parts.get("AccountName") or values.get("AZURE_STORAGE_ACCOUNT_NAME"),
        account_key=parts.get("AccountKey") or values.get("AZURE_STORAGE_ACCOUNT_KEY"),
        sas_key=parts.get("SharedAccessSignature"),
        endpoint=parts.get("BlobEndpoint"),
    )


def _given(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}


def hub_options(values: Mapping[str, str], _client: Client | None = None, *, ambient: bool) -> dict[str, Any]:
    """Return the arguments of huggingface_hub's clients.

    The address is always set, because the library would read it from the environment. Likewise the token is never read
    from there or from a file, unless `ambient` is set.
    """
    token = values.get("HF_TOKEN") or (None if ambient else False)
    return {"token": token, "endpoint": (values.get("HF_ENDPOINT") or HUB).rstrip("/")}


def gs_options(values: Mapping[str, str], client: Client, *, ambient: bool) -> dict[str, Any]:  # noqa: ARG001 - a row's signature
    """Return the arguments of gcsfs; without a key, Google's libraries look for credentials."""
    token = parse_service_account(values[GOOGLE_KEY]) if values.get(GOOGLE_KEY) else None
    return {"token": token, "access": "read_only" if client.read_only else "read_write"}


def az_options(values: Mapping[str, str], _client: Client, *, ambient: bool) -> dict[str, Any]:  # noqa: ARG001 - a row's signature
    """Return the arguments of adlfs: the account as a connection string, which no environment variable overrides."""
    connection = values.get("AZURE_STORAGE_CONNECTION_STRING") or None
    name, key = values.get("AZURE_STORAGE_ACCOUNT_NAME") or None, values.get("AZURE_STORAGE_ACCOUNT_KEY") or None
    if connection is None and name and key:
        connection = (
            f"DefaultEndpointsProtocol=https;AccountName={name};AccountKey={key};EndpointSuffix=core.windows.net"
        )
    return {"account_name": name, "account_key": key, "connection_string": connection}


def https_options(_values: Mapping[str, str], client: Client, *, ambient: bool) -> dict[str, Any]:  # noqa: ARG001 - a row's signature
    """Return the arguments of the https:// file system."""
    return {"connect_seconds": client.connect_seconds, "read_seconds": client.read_seconds}


def parse_service_account(text: str) -> dict[str, Any]:
    """Return the document of a Google key.

    Only service accounts are accepted: other credential types name files and addresses that a pod would read.

    Raises:
        ValueError: it is not a service account's key; the message has the reason and no part of the text.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(document, dict) or document.get("type") != "service_account":
        raise ValueError("its type is not service_account")
    missing = [name for name in ("client_email", "private_key", "token_uri") if not document.get(name)]
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}")
    return document


def _google_key_fault(values: Mapping[str, str]) -> str | None:
    if not values.get(GOOGLE_KEY):
        return None
    try:
        parse_service_account(values[GOOGLE_KEY])
    except ValueError as error:
        return str(error)
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        yield current
        seen.add(id(current))
        current = current.__cause__


def is_instance(error: BaseException, *names: str) -> bool:
    """Return True if the exception's class has one of these names, since this module imports no store's library."""
    return any(kind.__name__ in names for cause in causes(error) for kind in type(cause).__mro__)


def _s3_answer(error: BaseException) -> tuple[str, int]:
    """Return the error code and HTTP status of an S3 server's response."""
    for cause in causes(error):
        answer = getattr(cause, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(answer.get("Error", {}).get("Code", "")), int(status)
    return "", 0


def _s3_denied(error: BaseException) -> bool:
    code, status = _s3_answer(error)
    return code in DENIED_S3_CODES or code in {"401", "403"} or status in _DENIED_STATUS


def _hub_denied(error: BaseException) -> bool:
    return any(
        getattr(getattr(cause, "response", None), "status_code", None) in _DENIED_STATUS for cause in causes(error)
    )


def _gs_denied(error: BaseException) -> bool:
    refused = is_instance(error, "RefreshError") and "invalid_" in str(error)
    return refused or getattr(error, "code", None) in _DENIED_STATUS or str(error).startswith("Forbidden: ")


def _az_denied(error: BaseException) -> bool:
    return is_instance(error, "ClientAuthenticationError") or any(
        getattr(cause, "status_code", None) in _DENIED_STATUS for cause in causes(error)
    )


def _https_denied(error: BaseException) -> bool:
    return any(getattr(cause, "status", None) in _DENIED_STATUS for cause in causes(error))


def precondition_failed(error: BaseException) -> bool:
    """Return True if a conditional write was refused because the object exists."""
    return _s3_answer(error)[1] == 412  # noqa: PLR2004 - HTTP Precondition Failed


_EVERYWHERE = frozenset({Use.BASE_MODEL, Use.DATA, Use.TASKS})

SCHEMES = (
    Scheme(
        name="hf",
        title="Hugging Face Hub",
        example="hf://organisation/name",
        uses=_EVERYWHERE,
        filesystem="huggingface_hub.HfFileSystem",
        options=hub_options,
        credentials=(("HF_TOKEN",),),
        optional=("HF_ENDPOINT",),
        create_arguments="--from-literal=HF_TOKEN=…",
        key_note="a public repository needs none; `HF_ENDPOINT` is the address of another Hub than Hugging Face's",
        endpoint=("HF_ENDPOINT",),
        default_server="huggingface.co",
        denied=_hub_denied,
        missing=lambda error: is_instance(
            error, "RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError"
        ),
    ),
    Scheme(
        name="s3",
        title="S3: Amazon's, MinIO, Ceph and others",
        example="s3://bucket/path",
        uses=frozenset(Use),
        filesystem="s3fs.S3FileSystem",
        options=s3_options,
        native=s3_native,
        aliases=("s3a", "s3n"),
        credentials=(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),),
        optional=(
            "AWS_SESSION_TOKEN",
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT_URL_S3",
            "AWS_REGION",
            "AWS_DEFAULT_REGION",
        ),
        create_arguments="--from-literal=AWS_ACCESS_KEY_ID=… --from-literal=AWS_SECRET_ACCESS_KEY=… "
        "--from-literal=AWS_ENDPOINT_URL=https://… --from-literal=AWS_REGION=…",
        key_note="without `AWS_ENDPOINT_URL` (or `AWS_ENDPOINT_URL_S3`) the store is Amazon's; without `AWS_REGION` "
        "(or `AWS_DEFAULT_REGION`) the region is us-east-1; `AWS_SESSION_TOKEN` belongs to temporary keys",
        endpoint=("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
        default_server="Amazon S3",
        keys_belong_to_server=True,
        reserved=(
            r"\?versionId=",
            "names a version, and only the newest can be read: remove ?versionId=… from it",
        ),
        list_options={"refresh": True},
        modified="LastModified",
        version="ETag",
        checksum=s3_checksum,
        no_credentials=lambda error: is_instance(error, "NoCredentialsError", "PartialCredentialsError"),
        denied=_s3_denied,
        no_bucket=lambda error: _s3_answer(error)[0] == "NoSuchBucket",
        invalid=lambda error: is_instance(error, "ParamValidationError"),
    ),
    Scheme(
        name="gs",
        title="Google Cloud Storage",
        example="gs://bucket/path",
        uses=frozenset(Use),
        # Not fsspec's registered class: it queries features over gRPC, which the guard does not see, and nothing
        # uses them.
        filesystem="gcsfs.core.GCSFileSystem",
        options=gs_options,
        native=gs_native,
        aliases=("gcs",),
        credentials=((GOOGLE_KEY,),),
        create_arguments=f"--from-file={GOOGLE_KEY}=key.json",
        key_note="the JSON file of a service account's key, whole",
        malformed=_google_key_fault,
        unreadable="its private_key cannot be read",
        modified="mtime",
        version="generation",
        checksum=gs_checksum,
        denied=_gs_denied,
        invalid=lambda error: isinstance(error, ValueError) and str(error).startswith("Bad Request: "),
    ),
    Scheme(
        name="az",
        title="Azure Blob Storage",
        example="az://container/path",
        uses=frozenset(Use),
        filesystem="adlfs.AzureBlobFileSystem",
        options=az_options,
        native=az_native,
        aliases=("abfs", "abfss"),
        credentials=(
            ("AZURE_STORAGE_CONNECTION_STRING",),
            ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"),
        ),
        alone=frozenset({"AZURE_STORAGE_ACCOUNT_NAME"}),
        create_arguments="--from-literal=AZURE_STORAGE_CONNECTION_STRING='…'",
        key_note="the connection string, or the account's name and key",
        reserved=(r"[?#]", "has a '?' or '#', which Azure's library does not support: rename the blob"),
        modified="last_modified",
        version="etag",
        checksum=az_checksum,
        denied=_az_denied,
        missing=lambda error: is_instance(error, "ResourceNotFoundError"),
    ),
    Scheme(
        name="pvc",
        title="PersistentVolumeClaim of the namespace",
        example="pvc://claim/path",
        uses=_EVERYWHERE,
        filesystem="fsspec.implementations.local.LocalFileSystem",
        root=_NAME,
        mounted=True,
        modified="mtime",
    ),
    Scheme(
        name="https",
        title="a file on a web server, without credentials",
        example="https://host/path/rows.jsonl",
        uses=frozenset({Use.DATA}),
        filesystem="tunesmith.storage.https.HttpsFileSystem",
        options=https_options,
        root=r"[^/\s@?#]+",
        path=r"[^\s*?#\[\]]*[^/\s*?#\[\]]",
        lists=False,
        keeps_uri=True,
        denied=_https_denied,
        invalid=lambda error: is_instance(error, "UnsuitableServerError"),
    ),
    Scheme(
        name="file",
        title="files of this machine, with `tunesmith run`",
        example="file:///path",
        uses=frozenset({*_EVERYWHERE, Use.EXPORT}),
        filesystem="fsspec.implementations.local.LocalFileSystem",
        root="",
        local_only=True,
        modified="mtime",
    ),
)
"""All rows, in the order of messages and of the documentation."""

BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
STORE_KEYS = tuple(dict.fromkeys(key for scheme in SCHEMES for key in scheme.keys))
"""Keys of a Secret that a secretRef names. Pods mount no other keys."""


def of(use: Use, *, local: bool = False) -> tuple[Scheme, ...]:
    """Return the schemes with a use; with `local` also those of runs without a cluster."""
    return tuple(scheme for scheme in SCHEMES if use in scheme.uses and (local or not scheme.local_only))


def listed(words: list[str] | tuple[str, ...], last: str = "or") -> str:
    """Return `a, b or c`."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def pattern(use: Use) -> str:
    """Return the pattern (RE2) of a use's uris, with those of local runs."""
    trailing = "" if use is Use.EXPORT else "/?"
    groups: dict[tuple[str, str], list[str]] = {}
    for scheme in of(use, local=True):
        # A trailing slash would turn a single file into a folder.
        end = trailing if scheme.lists else ""
        groups.setdefault((scheme.root, f"{scheme.path}{end}"), []).append(scheme.name)
    return "|".join(
        f"^{names[0] if len(names) == 1 else '(' + '|'.join(names) + ')'}://{root}/{path}$"
        for (root, path), names in groups.items()
    )


def store_pattern() -> str:
    """Return the pattern (RE2) of an installation's store: a bucket, optionally with a folder."""
    return f"^({'|'.join(scheme.name for scheme in of(Use.STORE))})://{_BUCKET}(/.*)?$"


def examples(use: Use) -> str:
    """Return the examples of a use, such as `s3://bucket/path, gs://bucket/path or az://container/path`."""
    return listed([scheme.example for scheme in of(use)])


def prefixes(*uses: Use) -> str:
    """Return the schemes of some uses, such as `s3://, gs:// or az://`, without those of local runs."""
    return listed([f"{scheme.name}://" for scheme in SCHEMES if scheme.uses & {*uses} and not scheme.local_only])


def split(uri: str) -> tuple[str, str]:
    """Return the scheme's name and the rest after `://`.

    This is not a URL parser: in a path `#`, `?` and `%` are literal.
    """
    name, _, path = uri.partition("://")
    return name, path


def normalised(uri: str) -> str:
    """Return the normal form of a bucket's uri: the scheme in lower case, single slashes between names."""
    name, path = split(uri)
    return f"{name.lower()}://{'/'.join(part for part in path.split('/') if part not in {'', '.'})}"


def canonical(uri: str) -> str | None:
    """Return a bucket's uri with aliases of its scheme replaced by this table's name; None for other uris."""
    name, path = split(uri)
    scheme = next((scheme for scheme in of(Use.STORE) if name == scheme.name or name in scheme.aliases), None)
    return None if scheme is None else f"{scheme.name}://{path}"


def parse_store(uri: str) -> str:
    """Return the uri of an installation's store in its normal form.

    Raises:
        ValueError: it cannot be a store's uri; the message names the fix.
    """
    store = normalised(uri)
    _, path = split(store)
    meant = canonical(store)
    if meant not in {None, store}:
        raise ValueError(f"{uri} uses another tool's name of the scheme: write {meant}")
    if re.fullmatch(store_pattern(), store) is None:
        raise ValueError(f"{uri} is not a store: write {examples(Use.STORE)}")
    if not {"?", "#"}.isdisjoint(path) or ".." in path.split("/"):
        raise ValueError(
            f"{uri} contains '?', '#' or '..': write only bucket and folder, such as {examples(Use.STORE)}"
        )
    return store
