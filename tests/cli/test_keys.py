"""Denied requests of `tunesmith keys`."""

from __future__ import annotations

import pytest

from tunesmith.cli.errors import CliError
from tunesmith.cli.keys import _explained_denial
from tunesmith.cluster.errors import ForbiddenError


def test_a_request_that_no_role_allows_is_explained() -> None:
    message = 'configmaps is forbidden: User "alice" cannot list resource "configmaps" in API group ""'
    sentence = "ConfigMaps in the namespace gateway: ask your platform team for a key"
    with pytest.raises(CliError, match=sentence), _explained_denial("gateway"):
        raise ForbiddenError(message)


def test_a_request_that_a_quota_denies_keeps_its_message() -> None:
    with pytest.raises(ForbiddenError, match="exceeded quota"), _explained_denial("gateway"):
        raise ForbiddenError('configmaps "api-key-a" is forbidden: exceeded quota: small')
