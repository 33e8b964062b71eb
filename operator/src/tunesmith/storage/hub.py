"""Client of the Hugging Face Hub's API that uses only the address and the token of the credentials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from tunesmith.storage.schemes import BY_NAME, hub_options

if TYPE_CHECKING:
    from tunesmith.storage.credentials import Credentials


def hub_client(credentials: Credentials) -> HfApi:
    """Return the client.

    Raises:
        AccessDeniedError: a value is malformed.
        CredentialsMissingError: a Secret that a secretRef names has no key of the Hub.
    """
    scheme = BY_NAME["hf"]
    credentials.check_values()
    credentials.check_keys(scheme)
    return HfApi(**hub_options(credentials.values, ambient=credentials.ambient(scheme)))
