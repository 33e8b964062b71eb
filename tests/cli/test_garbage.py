"""Decisions of `tunesmith gc` about removable and kept files, from listings."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.cli.duration import parse_duration
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.garbage import JobFolder, Resources, StoredFile, folders, leftovers, unneeded
from tunesmith.cli.gc import _remove
from tunesmith.cli.store import Store
from tunesmith.contracts.location import TEMPORARY_FOLDER
from tunesmith.contracts.owner import Owner
from tunesmith.storage.folder import ONE_TRY

if TYPE_CHECKING:
    from collections.abc import Sequence

STORE = "s3://tunesmith/store"
NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
UID = "0f0e0d0c-0000-4000-8000-000000000001"
OTHER_UID = "0f0e0d0c-0000-4000-8000-000000000002"
FOLDER = f"team/tone-{UID}"
OURS = Owner(cluster="here", namespace="team", name="tone", uid=UID)
FILES = [
    "artifact/adapter_model.safetensors",
    "artifact/tunesmith.json",
    "merged/model.safetensors",
    "owner.json",
    "tmp/checkpoints/step-00000004/weights",
]
EVENTS = ["tensorboard/events.out.tfevents.1"]
DAY = timedelta(days=1)
TOO_YOUNG = "it was written more recently than --older-than allows"
PUBLISHED = "it is a published artifact: --artifacts removes it too"


def stored(names: list[str], folder: str = FOLDER, age: timedelta = 2 * DAY) -> list[StoredFile]:
    return [StoredFile(f"{folder}/{name}", 1000, NOW - age) for name in names]


def resource(kind: str, uid: str = UID, name: str = "tone", **parts: Any) -> dict[str, Any]:
    return {"kind": kind, "metadata": {"namespace": "team", "name": name, "uid": uid}, **parts}


def decisions(
    *,
    files: list[StoredFile] | None = None,
    jobs: list[dict[str, Any]] | None = None,
    others: list[dict[str, Any]] | None = None,
    owner: Owner | None = OURS,
    artifacts: bool = True,
    older_than: timedelta = DAY,
) -> dict[str, str | None]:
    """Return the reason for keeping each part; None if it is removable."""
    seen = Resources(cluster="here", jobs=jobs or [], others=others or [])
    found = unneeded(folders(stored(FILES) if files is None else files), seen)
    owners = {folder.path: owner for folder in found}
    parts = leftovers(found, owners, seen, STORE, now=NOW, older_than=older_than, artifacts=artifacts)
    return {part.part: part.kept for part in parts}


def test_all_files_of_a_deleted_job_are_removable() -> None:
    assert decisions() == {"tmp": None, "artifact": None}


def test_published_artifacts_are_removable_only_on_request() -> None:
    assert decisions(artifacts=False) == {"tmp": None, "artifact": PUBLISHED}


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"conditions": [{"type": "Started", "status": "True"}]},
        {"conditions": [{"type": "Suspended", "status": "True"}]},
        {"conditions": [{"type": "Failed", "status": "True"}]},
        {"conditions": [{"type": "Complete", "status": "False"}]},
    ],
    ids=["new", "running", "suspended", "failed", "not complete"],
)
def test_files_of_an_incomplete_job_are_kept(status: dict[str, Any]) -> None:
    assert decisions(jobs=[resource("FineTuneJob", status=status)]) == {}


def test_imported_adapters_are_removable_once_their_adapterdeployment_is_deleted() -> None:
    files = stored(["import-0a1b2c3d/artifact/tunesmith.json", "import-0a1b2c3d/artifact/README.md", "owner.json"])
    assert decisions(files=files, others=[resource("AdapterDeployment")]) == {}
    assert decisions(files=files) == {"artifact": None}
    assert decisions(files=files, artifacts=False) == {"artifact": PUBLISHED}
    unfinished = stored(["import-0a1b2c3d/artifact/README.md", "owner.json"])
    assert decisions(files=unfinished, artifacts=False) == {"unpublished": None}


def test_only_temporary_files_of_a_complete_job_are_removable() -> None:
    complete = {
        "conditions": [{"type": "Complete", "status": "True"}],
        "artifact": {"uri": f"{STORE}/{FOLDER}/artifact"},
    }
    assert decisions(jobs=[resource("FineTuneJob", status=complete)], owner=None) == {"tmp": None}


def test_a_new_job_of_that_name_does_not_keep_the_old_ones_folder() -> None:
    assert decisions(jobs=[resource("FineTuneJob", OTHER_UID)]) == {"tmp": None, "artifact": None}


@pytest.mark.parametrize(
    ("user", "what"),
    [
        (
            resource(
                "AdapterDeployment", OTHER_UID, "bot", status={"revisions": [{"uri": f"{STORE}/{FOLDER}/artifact"}]}
            ),
            "AdapterDeployment team/bot uses it",
        ),
        (
            resource("ServingPool", OTHER_UID, "big", spec={"baseModel": {"uri": f"{STORE}/{FOLDER}/merged/"}}),
            "ServingPool team/big uses it",
        ),
        (
            resource("FineTuneJob", OTHER_UID, "next", spec={"baseModel": {"uri": f"{STORE}/{FOLDER}"}}),
            "FineTuneJob team/next uses it",
        ),
        (
            resource(
                "FineTuneJob",
                OTHER_UID,
                "next",
                spec={"dataset": {"train": [{"uri": f"{STORE}/{FOLDER}/merged/a.jsonl"}]}},
            ),
            "FineTuneJob team/next uses it",
        ),
    ],
    ids=["a revision", "a pool's base", "a job's base", "a job's data"],
)
def test_files_that_a_resource_refers_to_are_kept(user: dict[str, Any], what: str) -> None:
    jobs, others = ([user], []) if user["kind"] == "FineTuneJob" else ([], [user])
    assert decisions(jobs=jobs, others=others)["artifact"] == what


def test_checkpoints_of_a_deleted_job_are_removable_while_its_adapter_serves() -> None:
    serving = {"revisions": [{"uri": f"{STORE}/{FOLDER}/artifact"}]}
    assert decisions(others=[resource("AdapterDeployment", OTHER_UID, "bot", status=serving)])["tmp"] is None


def test_an_unpublished_merged_model_is_kept_while_a_pool_serves_it() -> None:
    files = stored([*EVENTS, *FILES[2:]])
    assert decisions(files=files, artifacts=False) == {"tmp": None, "unpublished": None}
    user = resource("ServingPool", OTHER_UID, "big", spec={"baseModel": {"uri": f"{STORE}/{FOLDER}/merged"}})
    kept = {"tmp": None, "unpublished": "ServingPool team/big uses it"}
    assert decisions(files=files, artifacts=False, others=[user]) == kept


def test_a_uri_with_the_same_prefix_is_not_a_reference() -> None:
    user = resource("ServingPool", OTHER_UID, spec={"baseModel": {"uri": f"{STORE}/{FOLDER}/artifact-2"}})
    assert decisions(others=[user]) == {"tmp": None, "artifact": None}


@pytest.mark.parametrize(
    ("owner", "why"),
    [
        (None, "it has no owner.json, so its owner is unknown"),
        (OURS.model_copy(update={"cluster": "elsewhere"}), "it belongs to another cluster"),
        (OURS.model_copy(update={"uid": OTHER_UID}), "its owner.json names another resource"),
    ],
    ids=["without an owner", "another cluster's", "a copy"],
)
def test_folders_without_proof_of_ownership_are_kept(owner: Owner | None, why: str) -> None:
    assert decisions(owner=owner) == {"tmp": why, "artifact": why}


def test_a_folder_that_was_written_recently_is_kept_whole() -> None:
    old, new = stored(FILES[:-1]), stored(FILES[-1:], age=timedelta(minutes=5))
    assert decisions(files=old + new) == {"tmp": TOO_YOUNG, "artifact": TOO_YOUNG}
    assert decisions(files=old + new, older_than=timedelta(minutes=4)) == {"tmp": None, "artifact": None}


@pytest.mark.parametrize(
    "path",
    [
        "readme.txt",
        "team/notes.txt",
        "team/data/rows.jsonl",
        f"team/{UID}/artifact/a",
        f"team/tone-{UID[:-1]}/artifact/a",
    ],
)
def test_other_files_of_the_store_are_ignored(path: str) -> None:
    assert folders([StoredFile(path, 1, NOW - 2 * DAY)]) == []


def test_job_names_with_hyphens_are_parsed() -> None:
    assert folders(stored(["tmp/a"], f"team/a-b-0f0e-{UID}")) == [
        JobFolder("team", "a-b-0f0e", UID, tuple(stored(["tmp/a"], f"team/a-b-0f0e-{UID}")))
    ]


@pytest.mark.parametrize(
    ("names", "artifacts", "expected"),
    [
        (FILES, True, {"tmp": FILES[-1:], "artifact": [FILES[1], FILES[0], FILES[2], "owner.json"]}),
        (FILES, False, {"tmp": FILES[-1:], "artifact": [FILES[1], FILES[0], FILES[2]]}),
        (FILES[-2:], False, {"tmp": [FILES[-1], "owner.json"]}),
        (["owner.json"], False, {"tmp": ["owner.json"]}),
        ([*EVENTS, *FILES[2:]], False, {"tmp": FILES[-1:], "unpublished": [FILES[2], *EVENTS, "owner.json"]}),
        ([FILES[0], "owner.json"], False, {"unpublished": [FILES[0], "owner.json"]}),
        ([*EVENTS, *FILES[:2]], False, {"artifact": [FILES[1], FILES[0], *EVENTS]}),
    ],
    ids=[
        "all",
        "the artifact stays",
        "never published",
        "only the owner",
        "events and a merged model, never published",
        "half an artifact",
        "events of what was published",
    ],
)
def test_the_manifest_is_removed_first_and_the_owner_last(
    names: list[str],
    artifacts: bool,  # noqa: FBT001 - a parameter of the cases
    expected: dict[str, list[str]],
) -> None:
    seen = Resources(cluster="here", jobs=[], others=[])
    found = folders(stored(names))
    parts = leftovers(found, {FOLDER: OURS}, seen, STORE, now=NOW, older_than=DAY, artifacts=artifacts)
    assert {part.part: [file.path.removeprefix(f"{FOLDER}/") for file in part.files] for part in parts} == expected


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://tunesmith//store/{FOLDER}/artifact",
        f"S3://tunesmith/store/{FOLDER}//artifact/",
        f"s3://tunesmith/store/./{FOLDER}/artifact",
    ],
)
def test_files_referred_to_in_another_spelling_are_kept(uri: str) -> None:
    user = resource("AdapterDeployment", OTHER_UID, "bot", status={"revisions": [{"uri": uri}]})
    assert decisions(others=[user]) == {"tmp": None, "artifact": "AdapterDeployment team/bot uses it"}


@pytest.mark.parametrize(
    "uri", [STORE, f"{STORE}//", "S3://tunesmith/store", "s3://tunesmith//store", "s3://tunesmith/./store/"]
)
def test_uris_of_a_store_are_normalised(uri: str) -> None:
    assert Store(uri, ONE_TRY).uri == STORE


@pytest.mark.parametrize("uri", [f"{STORE}?region=x", f"{STORE}#1", "s3://tunesmith/a/../store", "s3://tunesmith?x"])
def test_a_store_with_more_than_bucket_and_folder_is_refused(uri: str) -> None:
    with pytest.raises(CliError, match="write only bucket and folder") as raised:
        Store(uri, ONE_TRY)
    assert raised.value.code == Exit.USAGE


class Failing(Store):
    """A store that cannot remove the files of one folder."""

    def __init__(self, folder: str) -> None:
        super().__init__(STORE, ONE_TRY)
        self._stubborn = folder
        self.removed: list[str] = []

    def remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            if path.startswith(f"{self._stubborn}/"):
                raise CliError(f"cannot remove {path}")
            self.removed.append(path)


def test_a_folder_keeps_its_owner_if_a_part_of_it_cannot_be_removed() -> None:
    """Without the owner no later run would remove the remaining files."""
    seen = Resources(cluster="here", jobs=[], others=[])
    neighbour = f"team/zebra-{OTHER_UID}"
    found = folders(stored(FILES) + stored(FILES, neighbour))
    owners = {FOLDER: OURS, neighbour: OURS.model_copy(update={"name": "zebra", "uid": OTHER_UID})}
    going = leftovers(found, owners, seen, STORE, now=NOW, older_than=DAY, artifacts=True)
    store = Failing(f"{FOLDER}/{TEMPORARY_FOLDER}")
    failed = _remove(store, going)
    assert sorted(store.removed) == sorted(f"{neighbour}/{name}" for name in FILES)
    assert failed == {
        f"{STORE}/{FOLDER}/{TEMPORARY_FOLDER}": f"cannot remove {FOLDER}/{FILES[-1]}",
        f"{STORE}/{FOLDER}": (
            "another part of its folder was not, and owner.json must be removed last: run the command again"
        ),
    }


def test_durations() -> None:
    assert [parse_duration(text, "--older-than") for text in ("90s", "30m", "24h", "7d")] == [
        timedelta(seconds=90),
        timedelta(minutes=30),
        DAY,
        7 * DAY,
    ]
    with pytest.raises(CliError, match="--older-than 1 week is not a duration: write seconds, minutes, hours or days"):
        parse_duration("1 week", "--older-than")
