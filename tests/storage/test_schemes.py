"""The table of stores: patterns, spellings and credentials, which every process takes from it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from tunesmith.controller.settings import OperatorSettings
from tunesmith.settings import read
from tunesmith.storage.credentials import Credentials, Origin, environment_credentials, read_secret
from tunesmith.storage.errors import AccessDeniedError, CredentialsMissingError
from tunesmith.storage.schemes import BY_NAME, GOOGLE_KEY, SCHEMES, Client, Use, parse_store, pattern

if TYPE_CHECKING:
    from pathlib import Path

REQUIRED = ["--namespace", "n", "--trainer-image", "t", "--agent-image", "a", "--engine-image", "e"]
KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.mark.parametrize("use", Use)
def test_every_example_is_a_uri_of_its_uses_and_of_no_other(use: Use) -> None:
    for scheme in SCHEMES:
        assert (re.fullmatch(pattern(use), scheme.example) is not None) == (use in scheme.uses), scheme.name


@pytest.mark.parametrize(
    ("use", "uri", "accepted"),
    [
        (Use.DATA, "https://example.org/rows.jsonl", True),
        (Use.DATA, "https://example.org:8443/a/rows%20b.jsonl.gz", True),
        (Use.DATA, "https://example.org/rows.jsonl?signature=secret", False),
        (Use.DATA, "https://example.org/folder/", False),
        (Use.DATA, "https://example.org/*.jsonl", False),
        (Use.DATA, "https://user:password@example.org/rows.jsonl", False),
        (Use.DATA, "http://example.org/rows.jsonl", False),
        (Use.BASE_MODEL, "https://example.org/model", False),
        (Use.DATA, "s3://bucket/folder/", True),
        (Use.DATA, "s3://bucket", False),
        (Use.EXPORT, "s3://bucket/folder/", False),
        (Use.EXPORT, "pvc://claim/folder", False),
        (Use.EXPORT, "hf://org/name", False),
        (Use.BASE_MODEL, "abfs://container/model", False),
    ],
)
def test_uris(use: Use, uri: str, *, accepted: bool) -> None:
    assert (re.fullmatch(pattern(use), uri) is not None) == accepted


@pytest.mark.parametrize(
    ("given", "store"),
    [
        ("s3://b//x", "s3://b/x"),
        ("s3://b/x/", "s3://b/x"),
        ("S3://b/./x", "s3://b/x"),
        ("gs://b", "gs://b"),
        ("az://container/x", "az://container/x"),
    ],
)
def test_uris_of_the_operators_store_are_normalised(given: str, store: str) -> None:
    assert parse_store(given) == store
    assert read(OperatorSettings, [*REQUIRED, "--store", given]).store == store


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("abfs://container/x", "write az://container/x"),
        ("gcs://b/x", "write gs://b/x"),
        ("/var/lib/adapters", "write s3://bucket/path, gs://bucket/path or az://container/path"),
        ("hf://org/name", "write s3://bucket/path"),
        ("https://example.org/x", "write s3://bucket/path"),
        ("s3://b/x?versionId=1", "write only bucket and folder"),
        ("s3://b/../x", "write only bucket and folder"),
    ],
)
def test_an_invalid_store_is_refused_when_the_operator_starts(
    given: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(OperatorSettings, [*REQUIRED, "--store", given])
    assert fix in capsys.readouterr().err


def of_secret(**values: str) -> Credentials:
    return Credentials(values, "the Secret mine", Origin.SECRET)


@pytest.mark.parametrize(
    ("scheme", "values", "sentence"),
    [
        ("s3", {}, "the Secret mine has no AWS_ACCESS_KEY_ID, which s3:// requires"),
        ("s3", {"AWS_ACCESS_KEY_ID": "id"}, "has AWS_ACCESS_KEY_ID and no AWS_SECRET_ACCESS_KEY: add the key"),
        ("gs", {}, f"has no {GOOGLE_KEY}, which gs:// requires"),
        ("az", {}, "has no AZURE_STORAGE_CONNECTION_STRING and no AZURE_STORAGE_ACCOUNT_NAME, which az:// requires"),
        (
            "az",
            {"AZURE_STORAGE_ACCOUNT_NAME": "name"},
            "and no AZURE_STORAGE_ACCOUNT_KEY: add the key, or use AZURE_STORAGE_CONNECTION_STRING instead",
        ),
        ("hf", {"AWS_ACCESS_KEY_ID": "id"}, "has no HF_TOKEN, which hf:// requires"),
    ],
)
def test_a_named_secret_must_have_the_keys_of_the_scheme(scheme: str, values: dict[str, str], sentence: str) -> None:
    with pytest.raises(CredentialsMissingError, match=re.escape(sentence)):
        of_secret(**values).check_keys(BY_NAME[scheme])


def test_a_mirror_of_the_hub_needs_no_token() -> None:
    credentials = of_secret(HF_ENDPOINT="https://mirror.example/")
    credentials.check_keys(BY_NAME["hf"])
    options = BY_NAME["hf"].options(credentials.values, Client(), ambient=credentials.ambient(BY_NAME["hf"]))
    assert options == {"token": False, "endpoint": "https://mirror.example"}


@pytest.mark.parametrize("origin", [Origin.STORE_SECRET, Origin.ENVIRONMENT])
def test_an_incomplete_credential_is_refused_from_any_origin(origin: Origin) -> None:
    """The library would take the other half from somewhere else."""
    with pytest.raises(AccessDeniedError, match="has AWS_ACCESS_KEY_ID and no AWS_SECRET_ACCESS_KEY"):
        Credentials({"AWS_ACCESS_KEY_ID": "id"}, "the place", origin).check_keys(BY_NAME["s3"])


@pytest.mark.parametrize("address", ["127.0.0.1:9000", "ftp://store", "http://", "http://[bad"])
@pytest.mark.parametrize(("overridden", "source"), [(["AWS_ENDPOINT_URL"], "the environment"), ([], "the place")])
def test_a_malformed_address_is_reported_with_its_source(address: str, overridden: list[str], source: str) -> None:
    values = {**KEYS, "AWS_ENDPOINT_URL": address}
    credentials = Credentials(values, "the place", Origin.STORE_SECRET, frozenset(overridden))
    with pytest.raises(AccessDeniedError, match=f"^AWS_ENDPOINT_URL of {source} is not an address"):
        credentials.check_keys(BY_NAME["s3"])


@pytest.mark.parametrize(
    ("origin", "values", "ambient"),
    [
        (Origin.SECRET, KEYS, False),
        (Origin.SECRET, {}, False),
        (Origin.STORE_SECRET, KEYS, False),
        (Origin.STORE_SECRET, {"HF_TOKEN": "x"}, True),
        (Origin.ENVIRONMENT, KEYS, True),
    ],
)
def test_a_pod_uses_its_identity_only_without_keys(origin: Origin, values: dict[str, str], *, ambient: bool) -> None:
    assert Credentials(values, "the place", origin).ambient(BY_NAME["s3"]) == ambient


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
@pytest.mark.parametrize("ambient", [True, False])
def test_both_variables_of_the_region_are_read(variable: str, *, ambient: bool) -> None:
    options = BY_NAME["s3"].options({**KEYS, variable: "eu-north-1"}, Client(), ambient=ambient)
    assert options["client_kwargs"] == {"region_name": "eu-north-1"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("-----BEGIN PRIVATE KEY-----", "it is not JSON"),
        ("[]", "its type is not service_account"),
        ('{"type": "authorized_user"}', "its type is not service_account"),
        ('{"type": "service_account", "token_uri": "u"}', "it has no client_email and no private_key"),
    ],
)
def test_a_malformed_google_key_is_reported_without_its_value(text: str, why: str) -> None:
    with pytest.raises(AccessDeniedError) as denied:
        of_secret(**{GOOGLE_KEY: text}).check_keys(BY_NAME["gs"])
    assert str(denied.value) == (
        f"{GOOGLE_KEY} of the Secret mine cannot be used for gs://: {why}; use the whole value as the store issued it"
    )


def test_a_mounted_secret_is_read_whole_and_with_its_version(tmp_path: Path) -> None:
    version = tmp_path / "..2026_11_29_12_55_30.1"
    version.mkdir()
    (version / "HF_TOKEN").write_text("token\n")
    (tmp_path / "..data").symlink_to(version.name)
    (tmp_path / "HF_TOKEN").symlink_to("..data/HF_TOKEN")
    assert read_secret(tmp_path) == ({"HF_TOKEN": "token"}, datetime(2026, 11, 29, 12, 55, 30, tzinfo=UTC))
    (tmp_path / "none").mkdir()
    assert read_secret(tmp_path / "none") == ({}, None)
    with pytest.raises(FileNotFoundError):
        read_secret(tmp_path / "missing")


def test_the_environment_is_checked_like_a_secret() -> None:
    with pytest.raises(AccessDeniedError, match="HF_TOKEN of the environment has several lines"):
        environment_credentials({"HF_TOKEN": "one\ntwo"}).check_values()
