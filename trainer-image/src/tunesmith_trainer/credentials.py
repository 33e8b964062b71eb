"""Credentials of stores: out of a mounted Secret or the environment, and what they open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fsspec

from tunesmith.storage.credentials import malformed
from tunesmith.storage.schemes import GOOGLE_KEY, STORE_KEYS
from tunesmith_trainer import google_cloud
from tunesmith_trainer.errors import AccessDeniedError, SecretNotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_KEYS = {
    "hf": ("HF_TOKEN",),
    "s3": ("AWS_ACCESS_KEY_ID",),
    "gs": (GOOGLE_KEY,),
    "az": ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME"),
}
"""By scheme, keys of which a Secret has at least one."""
_HUB = "https://huggingface.co"
_REGION = "us-east-1"


def read_secrets(secrets: Path) -> dict[str, dict[str, str]]:
    """Return the keys and values of all mounted Secrets, by the Secret's name.

    Args:
        secrets: folder with one sub-folder per mounted Secret, one file per key. In a cluster the mounts are optional:
            of a missing Secret there is a folder without keys.
    """
    folders = [entry for entry in sorted(secrets.iterdir()) if entry.is_dir()] if secrets.is_dir() else []
    return {
        folder.name: {
            entry.name: entry.read_bytes().decode("utf-8", "surrogateescape").strip()
            for entry in sorted(folder.iterdir())
            if entry.is_file()
        }
        for folder in folders
    }


def check_values(values: Mapping[str, str], credentials: str) -> None:
    """Refuse values that no store could have issued, before a library puts them into a message.

    Args:
        values: by key.
        credentials: where they come from, for messages.

    Raises:
        AccessDeniedError: a value is malformed.
    """
    for key in STORE_KEYS:
        sentence = malformed(key, values.get(key, ""), credentials)
        if sentence is not None:
            raise AccessDeniedError(sentence)


def check_keys(scheme: str, values: Mapping[str, str], secret: str) -> None:
    """Refuses a Secret that would not be used: the libraries would look elsewhere, silently.

    Raises:
        SecretNotFoundError: it has none of the keys that the scheme needs.
    """
    keys = _KEYS.get(scheme, ())
    if keys and not any(values.get(key) for key in keys):
        raise SecretNotFoundError(
            f"the Secret {secret} has no {' and no '.join(keys)}, with which {scheme}:// is reached: add the key, or"
            " remove the secretRef to use the store's credentials"
        )
    if scheme == "az" and not any(
        values.get(key) for key in ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_KEY")
    ):
        raise SecretNotFoundError(
            f"the Secret {secret} has AZURE_STORAGE_ACCOUNT_NAME and no AZURE_STORAGE_ACCOUNT_KEY: add the key, or"
            " give AZURE_STORAGE_CONNECTION_STRING instead of both"
        )


def hub_endpoint(values: Mapping[str, str]) -> str:
    """The address of the Hub that a Secret or the environment names; Hugging Face's own without a name.

    It is given to the library always, which would look into the environment otherwise.
    """
    return (values.get("HF_ENDPOINT") or _HUB).rstrip("/")


def filesystem(scheme: str, values: Mapping[str, str], credentials: str, *, alone: bool) -> Any:  # noqa: ANN401 - fsspec has no types
    """The fsspec file system of a scheme.

    Args:
        scheme: s3, hf, gs, az, or any other for the files of this machine.
        values: the keys and values of a Secret, or the environment.
        credentials: where they come from, for messages.
        alone: they are a Secret's: what the libraries would add out of the environment is another store's.

    Raises:
        AccessDeniedError: what a key holds is none.
        ImportError: this image cannot read the scheme.
    """
    try:
        return _filesystem(scheme, values, credentials, alone=alone)
    except (ValueError, TypeError):  # nothing of what they say, it may hold parts of a key
        raise AccessDeniedError(
            f"what {credentials} holds for {scheme}:// is in a form that cannot be used: check"
            f" {' or '.join(_KEYS.get(scheme, ()))} there, each whole and as the store gives it"
        ) from None


def _filesystem(scheme: str, values: Mapping[str, str], credentials: str, *, alone: bool) -> Any:  # noqa: ANN401 - fsspec has no types
    if scheme == "s3":
        return fsspec.filesystem("s3", **_s3_options(values, alone=alone))
    if scheme == "hf":
        return fsspec.filesystem(
            "hf", token=values.get("HF_TOKEN") or None, endpoint=hub_endpoint(values), skip_instance_cache=True
        )
    if scheme == "gs":
        return google_cloud.filesystem(values, credentials)
    if scheme == "az":
        return fsspec.filesystem("az", **_azure_options(values), use_listings_cache=False, skip_instance_cache=True)
    return fsspec.filesystem("file", skip_instance_cache=True)


def _s3_options(values: Mapping[str, str], *, alone: bool) -> dict[str, Any]:
    endpoint = values.get("AWS_ENDPOINT_URL") or values.get("AWS_ENDPOINT_URL_S3") or None
    region = values.get("AWS_REGION") or values.get("AWS_DEFAULT_REGION") or (_REGION if alone else None)
    config: dict[str, Any] = {
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"max_attempts": 2, "mode": "standard"},
    }
    if alone:
        config["ignore_configured_endpoint_urls"] = True
    if endpoint:
        # Stores that are not AWS know neither bucket host names nor the newer checksums.
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
        "use_listings_cache": False,
        "skip_instance_cache": True,
    }


def _azure_options(values: Mapping[str, str]) -> dict[str, str | None]:
    """The account as a connection string, over which the library puts nothing out of the environment."""
    connection = values.get("AZURE_STORAGE_CONNECTION_STRING") or None
    name, key = values.get("AZURE_STORAGE_ACCOUNT_NAME") or None, values.get("AZURE_STORAGE_ACCOUNT_KEY") or None
    if connection is None and name and key:
        connection = (
            f"DefaultEndpointsProtocol=https;AccountName={name};AccountKey={key};EndpointSuffix=core.windows.net"
        )
    return {"account_name": name, "account_key": key, "connection_string": connection}
