from __future__ import annotations

import pytest

from tunesmith.contracts.location import reads_foreign_store, writes_into_store

STORE = "s3://tunesmith/store"
INSIDE = [
    "s3://tunesmith/store",
    "s3://tunesmith/store/",
    "s3://tunesmith/store/other/job-1/artifact",
    "s3://tunesmith//store///other/x",
    "s3://tunesmith/./store/x",
    "s3://tunesmith/a/../store/x",
    "s3://tunesmith/../store/x",
    "S3://tunesmith/store/x",
    "s3://TuneSmith/store/x",
    "s3://tunesmith/%73tore/x",
    "s3://tunesmith/%2573tore/x",
    "s3://tunesmith%2Fstore/x",
    "s3://tunesmith/a/%2e%2e/store/x",
]
OUTSIDE = ["s3://tunesmith/stores/x", "s3://other/store/x", "gs://tunesmith/store/x", "s3://tunesmith/data/train.jsonl"]


@pytest.mark.parametrize("uri", INSIDE)
def test_every_spelling_of_a_uri_in_the_store_is_recognised(uri: str) -> None:
    assert writes_into_store(STORE, uri)
    assert reads_foreign_store(STORE, "team", uri)


@pytest.mark.parametrize("uri", OUTSIDE)
def test_uris_outside_the_store(uri: str) -> None:
    assert not writes_into_store(STORE, uri)
    assert not reads_foreign_store(STORE, "team", uri)


@pytest.mark.parametrize("uri", ["s3://tunesmith", "s3://tunesmith/"])
def test_a_parent_folder_of_the_store_counts_as_the_store(uri: str) -> None:
    assert writes_into_store(STORE, uri)
    assert reads_foreign_store(STORE, "team", uri)


@pytest.mark.parametrize(
    ("uri", "foreign"),
    [
        ("s3://tunesmith/store/team/job-1/merged", False),
        ("s3://tunesmith/store/team/**/*.jsonl", False),
        ("s3://tunesmith/store/teams/x", True),
        ("s3://tunesmith/store/team/../other/x", True),
        ("s3://tunesmith/store/*/x", True),
        ("s3://tunesmith/st*/other/x", True),
        ("s3://tunesmith/[r-t]tore/other/x", True),
        ("s3://tunesmith/**/x.jsonl", True),
        ("s3://tunesmith/*.jsonl", False),
        ("pvc://tunesmith/store/other", False),
    ],
)
def test_a_namespace_reads_only_its_own_folder_of_the_store(uri: str, *, foreign: bool) -> None:
    assert reads_foreign_store(STORE, "team", uri) is foreign


def test_an_azure_container_may_include_its_account() -> None:
    assert writes_into_store("az://tunesmith/store", "az://tunesmith@account.dfs.core.windows.net/store/x")
