"""Google Cloud Storage with the key of a service account, which stays in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.storage.schemes import GOOGLE_KEY, parse_service_account
from tunesmith_trainer.errors import AccessDeniedError

if TYPE_CHECKING:
    from collections.abc import Mapping

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


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

    token = _service_account(values[GOOGLE_KEY], credentials) if values.get(GOOGLE_KEY) else None
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
        document = parse_service_account(text)
    except ValueError as error:
        raise _no_key(credentials, str(error)) from None
    try:
        return service_account.Credentials.from_service_account_info(document, scopes=[_SCOPE])
    except (GoogleAuthError, ValueError, TypeError, KeyError):
        missing = [name for name in ("client_email", "private_key", "token_uri") if not document.get(name)]
        why = f"it has no {' and no '.join(missing)}" if missing else "its private_key cannot be read"
        raise _no_key(credentials, why) from None


def _no_key(credentials: str, why: str) -> AccessDeniedError:
    return AccessDeniedError(
        f"{GOOGLE_KEY} of {credentials} is no key of a service account: {why}; put the JSON file there, whole and as"
        " Google gives it"
    )
