"""What `tunesmith gc` would remove, and what it must never remove, decided from listings."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.cli.duration import duration
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.garbage import Folder, Resources, StoredFile, folders, left, leftovers
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
TOO_YOUNG = "it was written to too short a time ago: see --older-than"
PUBLISHED = "it is a published artifact: --artifacts removes it too"


def stored(names: list[str], folder: str = FOLDER, age: timedelta = 2 * DAY) -> list[StoredFile]:
    return [StoredFile(f"{folder}/{name}", 1000, NOW - age) for name in names]


def resource(kind: str, uid: str = UID, name: str = "tone", **parts: Any) -> dict[str, Any]:
    return {"kind": kind, "metadata": {"namespace": "team", "name": name, "uid": uid}, **parts}


def judged(
    *,
    files: list[StoredFile] | None = None,
    jobs: list[dict[str, Any]] | None = None,
    others: list[dict[str, Any]] | None = None,
    owner: Owner | None = OURS,
    artifacts: bool = True,
    older_than: timedelta = DAY,
) -> dict[str, str | None]:
    """By part, why it is kept; None: it goes."""
    seen = Resources(cluster="here", jobs=jobs or [], others=others or [])
    found = left(folders(stored(FILES) if files is None else files), seen)
    owners = {folder.path: owner for folder in found}
    parts = leftovers(found, owners, seen, STORE, now=NOW, older_than=older_than, artifacts=artifacts)
    return {part.part: part.kept for part in parts}


def test_everything_of_a_deleted_job_goes() -> None:
    assert judged() == {"tmp": None, "artifact": None}


def test_published_artifacts_go_only_where_that_is_asked_for() -> None:
    assert judged(artifacts=False) == {"tmp": None, "artifact": PUBLISHED}


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
def test_nothing_of_a_job_that_is_there_goes(status: dict[str, Any]) -> None:
    assert judged(jobs=[resource("FineTuneJob", status=status)]) == {}


def test_of_a_complete_job_only_what_it_needed_until_then_goes() -> None:
    complete = {
        "conditions": [{"type": "Complete", "status": "True"}],
        "artifact": {"uri": f"{STORE}/{FOLDER}/artifact"},
    }
    assert judged(jobs=[resource("FineTuneJob", status=complete)], owner=None) == {"tmp": None}


def test_a_new_job_of_that_name_does_not_keep_the_old_ones_folder() -> None:
    assert judged(jobs=[resource("FineTuneJob", OTHER_UID)]) == {"tmp": None, "artifact": None}


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
def test_what_a_resource_names_anywhere_stays(user: dict[str, Any], what: str) -> None:
    jobs, others = ([user], []) if user["kind"] == "FineTuneJob" else ([], [user])
    assert judged(jobs=jobs, others=others)["artifact"] == what


def test_the_checkpoints_of_a_deleted_job_whose_adapter_serves_go() -> None:
    serving = {"revisions": [{"uri": f"{STORE}/{FOLDER}/artifact"}]}
    assert judged(others=[resource("AdapterDeployment", OTHER_UID, "bot", status=serving)])["tmp"] is None


def test_a_merged_model_that_was_never_published_with_its_adapter_stays_where_a_pool_serves_it() -> None:
    files = stored([*EVENTS, *FILES[2:]])
    assert judged(files=files, artifacts=False) == {"tmp": None, "unpublished": None}
    user = resource("ServingPool", OTHER_UID, "big", spec={"baseModel": {"uri": f"{STORE}/{FOLDER}/merged"}})
    kept = {"tmp": None, "unpublished": "ServingPool team/big uses it"}
    assert judged(files=files, artifacts=False, others=[user]) == kept


def test_the_name_of_a_neighbour_is_no_use() -> None:
    user = resource("ServingPool", OTHER_UID, spec={"baseModel": {"uri": f"{STORE}/{FOLDER}/artifact-2"}})
    assert judged(others=[user]) == {"tmp": None, "artifact": None}


@pytest.mark.parametrize(
    ("owner", "why"),
    [
        (None, "it has no owner.json, so whose it is is not known"),
        (OURS.model_copy(update={"cluster": "elsewhere"}), "it belongs to another cluster"),
        (OURS.model_copy(update={"uid": OTHER_UID}), "its owner.json is that of another FineTuneJob"),
    ],
    ids=["nobody's", "another cluster's", "a copy"],
)
def test_what_is_not_surely_this_clusters_stays(owner: Owner | None, why: str) -> None:
    assert judged(owner=owner) == {"tmp": why, "artifact": why}


def test_what_was_written_to_recently_stays_as_a_whole() -> None:
    old, new = stored(FILES[:-1]), stored(FILES[-1:], age=timedelta(minutes=5))
    assert judged(files=old + new) == {"tmp": TOO_YOUNG, "artifact": TOO_YOUNG}
    assert judged(files=old + new, older_than=timedelta(minutes=4)) == {"tmp": None, "artifact": None}


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
def test_other_files_of_the_store_are_left_alone(path: str) -> None:
    assert folders([StoredFile(path, 1, NOW - 2 * DAY)]) == []


def test_names_with_hyphens_are_read_right() -> None:
    assert folders(stored(["tmp/a"], f"team/a-b-0f0e-{UID}")) == [
        Folder("team", "a-b-0f0e", UID, tuple(stored(["tmp/a"], f"team/a-b-0f0e-{UID}")))
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
def test_an_artifact_loses_its_manifest_first_and_a_folder_its_owner_last(
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
def test_what_a_resource_names_in_another_spelling_stays(uri: str) -> None:
    user = resource("AdapterDeployment", OTHER_UID, "bot", status={"revisions": [{"uri": uri}]})
    assert judged(others=[user]) == {"tmp": None, "artifact": "AdapterDeployment team/bot uses it"}


@pytest.mark.parametrize(
    "uri", [STORE, f"{STORE}//", "S3://tunesmith/store", "s3://tunesmith//store", "s3://tunesmith/./store/"]
)
def test_a_store_has_one_spelling(uri: str) -> None:
    assert Store(uri, ONE_TRY).uri == STORE


@pytest.mark.parametrize("uri", [f"{STORE}?region=x", f"{STORE}#1", "s3://tunesmith/a/../store", "s3://tunesmith?x"])
def test_a_store_with_more_than_bucket_and_folder_is_refused(uri: str) -> None:
    with pytest.raises(CliError, match="write bucket and folder alone") as raised:
        Store(uri, ONE_TRY)
    assert raised.value.code == Exit.USAGE


class Failing(Store):
    """A store that does not remove what lies in one of its folders."""

    def __init__(self, folder: str) -> None:
        super().__init__(STORE, ONE_TRY)
        self._stubborn = folder
        self.removed: list[str] = []

    def remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            if path.startswith(f"{self._stubborn}/"):
                raise CliError(f"cannot remove {path}")
            self.removed.append(path)


def test_a_folder_keeps_its_owner_where_a_part_of_it_could_not_be_removed() -> None:
    """Without the owner what stayed would belong to nobody, and no later run would remove it."""
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
        f"{STORE}/{FOLDER}": "another part of its folder was not, and owner.json goes last: run this again",
    }


def test_durations() -> None:
    assert [duration(text, "--older-than") for text in ("90s", "30m", "24h", "7d")] == [
        timedelta(seconds=90),
        timedelta(minutes=30),
        DAY,
        7 * DAY,
    ]
    with pytest.raises(CliError, match="--older-than 1 week is not a duration: write seconds, minutes, hours or days"):
        duration("1 week", "--older-than")
