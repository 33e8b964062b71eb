"""Downloads in child processes: their limits, the errors of killed children, and the journal of a killed agent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.sandbox_children import allocates, dies, leaves, never_ends, was_killed
from tests.server.server_rig import STORE, Artifact, S3Server, write_secret
from tunesmith.contracts.agent import DesiredAdapter
from tunesmith_server.artifact import PodLimits, stored_sizes
from tunesmith_server.base_weights import read_base_weights
from tunesmith_server.fetching import ArtifactFetcher, FetchSettings, Journal
from tunesmith_server.lora import UnfitAdapterError
from tunesmith_server.sandbox import ChildExitedError, ChildLimits, Sandbox
from tunesmith_server.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # for the process that forks the children
        yield Sandbox([])


@pytest.mark.parametrize(
    ("function", "seconds", "sentence"),
    [
        (never_ends, 0.5, "took more than 0.5 seconds"),
        (never_ends, 120.0, "needed more than 1 seconds of processor time"),
        (dies, 120.0, "was terminated by SIGSEGV"),
        (leaves, 120.0, "exited with code 7"),
        (was_killed, 120.0, "was killed, probably because memory ran out"),
    ],
)
def test_the_exit_of_a_child_is_reported(
    sandbox: Sandbox, function: Callable[..., None], seconds: float, sentence: str
) -> None:
    child = sandbox.start(function, (), ChildLimits(memory=64 * 2**20, cpu_seconds=1))
    with pytest.raises(ChildExitedError, match=sentence):
        child.receive(seconds)
    child.close()


def test_a_child_gets_no_more_memory_than_its_limit(sandbox: Sandbox) -> None:
    child = sandbox.start(allocates, (), ChildLimits(memory=64 * 2**20, cpu_seconds=10))
    assert child.receive(120) == ("refused", "no memory")
    child.close()


def test_a_check_that_killed_the_agent_is_not_repeated(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with journal.checking("sha256:first"):
        pass
    checking = journal.checking("sha256:fatal")
    checking.__enter__()  # the agent dies here
    for _ in range(2):
        after = Journal(tmp_path)
        after.refuse("sha256:first")
        with pytest.raises(UnfitAdapterError, match="the agent exited while it checked the adapter's files"):
            after.refuse("sha256:fatal")
    (tmp_path / "checking.json").write_text("{")
    Journal(tmp_path).refuse("sha256:fatal")


@pytest.fixture
def settings(tmp_path: Path, store: S3Server) -> FetchSettings:
    for name in ("adapters", "state"):
        (tmp_path / name).mkdir()
    secret = write_secret(tmp_path / "tunesmith-store", store.secret)
    return FetchSettings(tmp_path / "adapters", tmp_path / "state", secret, 2**30, "127.0.0.1/32")


@pytest.fixture
def make(base: Path, fingerprint: str, settings: FetchSettings) -> Iterator[Callable[..., ArtifactFetcher]]:
    limits = PodLimits(STORE, fingerprint, read_base_weights(base), max_rank=16, max_ratio=4.0)
    made: list[ArtifactFetcher] = []

    def fetcher(**changes: Any) -> ArtifactFetcher:
        fields = settings.__dict__ | changes
        made.append(ArtifactFetcher(FetchSettings(**fields), limits, lambda _: None))
        return made[-1]

    yield fetcher
    for each in made:
        each.close()


def wanted(artifact: Artifact, store: S3Server) -> DesiredAdapter:
    return DesiredAdapter.model_validate(artifact.publish(store))


def test_an_adapter_is_fetched_and_the_bases_norms_are_kept(
    make: Callable[..., ArtifactFetcher], adapter: Callable[..., Artifact], settings: FetchSettings, store: S3Server
) -> None:
    fetcher = make()
    sound = wanted(adapter(), store)
    fetcher.fetch(sound)
    assert set(stored_sizes(settings.adapters)) == {sound.digest}
    assert set(fetcher._limits.base.norms) == {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qv"}
    with pytest.raises(UnfitAdapterError, match="the adapter uses DoRA"):
        fetcher.fetch(wanted(adapter(seed=2, use_dora=True), store))
    assert [path.name for path in settings.adapters.iterdir()] == [sound.digest.removeprefix("sha256:")]


def test_keys_that_are_corrected_later_are_used_at_the_next_attempt(
    make: Callable[..., ArtifactFetcher], adapter: Callable[..., Artifact], settings: FetchSettings, store: S3Server
) -> None:
    fetcher = make()
    entry = wanted(adapter(), store)
    write_secret(settings.secret, store.secret | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    with pytest.raises(
        StoreError, match="with the credentials of the Secret tunesmith-store as written to the pod at 20"
    ) as denied:
        fetcher.fetch(entry)
    assert not denied.value.permanent
    write_secret(settings.secret, store.secret)
    fetcher.fetch(entry)
    assert set(stored_sizes(settings.adapters)) == {entry.digest}


def test_an_endpoint_that_is_not_listed_is_never_connected_to(
    make: Callable[..., ArtifactFetcher], adapter: Callable[..., Artifact], settings: FetchSettings, store: S3Server
) -> None:
    entry = wanted(adapter(), store)
    write_secret(settings.secret, store.secret | {"AWS_ENDPOINT_URL": f"http://127.0.0.2:{store.port}"})
    with pytest.raises(StoreError, match=r"resolves to 127\.0\.0\.2, an address of the pod itself") as refused:
        make().fetch(entry)
    assert not refused.value.permanent


def test_a_full_volume_is_reported_before_the_download(
    make: Callable[..., ArtifactFetcher], adapter: Callable[..., Artifact], settings: FetchSettings, store: S3Server
) -> None:
    with pytest.raises(StoreError, match="the pod's volume for adapters has 1000 bytes, 0 are in use") as full:
        make(storage=1000).fetch(wanted(adapter(), store))
    assert not full.value.permanent
    assert list(settings.adapters.iterdir()) == []


def test_a_check_that_takes_too_long_fails_permanently(
    make: Callable[..., ArtifactFetcher], adapter: Callable[..., Artifact], store: S3Server
) -> None:
    fetcher = make()
    fetcher._check_seconds = 0
    entry = wanted(adapter(), store)
    with pytest.raises(UnfitAdapterError, match="the check of the adapter's files took more than"):
        fetcher.fetch(entry)
