"""Google Cloud Storage with the key of a service account, which stays in memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tunesmith_trainer.errors import AccessDeniedError

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = "GOOGLE_SERVICE_ACCOUNT_KEY"
"""Key of a Secret, or variable of the environment: the JSON file that Google gives for a key of a service account."""
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_TYPE = "service_account"


def filesystem(values: Mapping[str, str], credentials: str) -> Any:  # noqa: ANN401 - fsspec has no types
    """The file system, with the service account's key where there is one, else with what Google's libraries find.

    Args:
        values: the keys and values of a Secret, or the environment.
        credentials: where they come from, for messages.

    Raises:
        AccessDeniedError: the key is none.
        ImportError: this image cannot read gs://.
    """
    # Not the class that fsspec knows: it asks over gRPC, which goes its own ways, for features that nothing here uses.
    from gcsfs.core import GCSFileSystem  # noqa: PLC0415

    token = _service_account(values[KEY], credentials) if values.get(KEY) else None
    return GCSFileSystem(token=token, use_listings_cache=False, skip_instance_cache=True)


def denied(error: BaseException) -> bool:
    """Whether an exception of gcsfs says that access is denied."""
    return getattr(error, "code", None) in {401, 403} or str(error).startswith("Forbidden: ")


def refused(error: BaseException) -> bool:
    """Whether an exception of gcsfs says that the uri cannot be one: 400, of a bucket's or an object's name."""
    return isinstance(error, ValueError) and str(error).startswith("Bad Request: ")


def _service_account(text: str, credentials: str) -> Any:  # noqa: ANN401 - google-auth is partly annotated
    from google.auth.exceptions import GoogleAuthError  # noqa: PLC0415
    from google.oauth2 import service_account  # noqa: PLC0415

    # What is in the key is in none of these sentences, nor is what a library says of it.
    try:
        document = json.loads(text)
    except ValueError:
        raise _no_key(credentials, "it is not JSON") from None
    kind = document.get("type") if isinstance(document, dict) else None
    if kind != _TYPE:
        # Other types name files and addresses that a pod would read.
        raise _no_key(credentials, f"its type is not {_TYPE}")
    try:
        return service_account.Credentials.from_service_account_info(document, scopes=[_SCOPE])
    except (GoogleAuthError, ValueError, TypeError, KeyError):
        missing = [name for name in ("client_email", "private_key", "token_uri") if not document.get(name)]
        why = f"it has no {' and no '.join(missing)}" if missing else "its private_key cannot be read"
        raise _no_key(credentials, why) from None


def _no_key(credentials: str, why: str) -> AccessDeniedError:
    return AccessDeniedError(
        f"{KEY} of {credentials} is no key of a service account: {why}; put the JSON file there, whole and as Google"
        " gives it"
    )
