"""Option with the peers that may read metrics."""

from __future__ import annotations

import pytest

from tunesmith.contracts.network import parse_peers


def test_peers_are_read_from_json() -> None:
    peer = {"namespaceSelector": {"matchLabels": {"team": "sre"}}}
    assert parse_peers('[{"namespaceSelector": {"matchLabels": {"team": "sre"}}}]') == (peer,)
    assert parse_peers("") == ()


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"namespace": "a"}]', "[", '[{"ipBlock": {}, "port": 1}]'])
def test_an_invalid_list_of_peers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a JSON list of NetworkPolicy peers"):
        parse_peers(text)
