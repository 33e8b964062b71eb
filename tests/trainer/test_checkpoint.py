"""Checkpoints on a disk: damaged ones are never used, and one that cannot be written leaves nothing behind.

Also their content: the state of a Trainer.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from tests.trainer.checkpoint_damage import flip, lose_a_file, lose_the_manifest, truncate
from tunesmith.api.checkpoint import Checkpoint
from tunesmith.api.hyperparameters import Scheduler
from tunesmith_trainer.errors import InvalidSpecError, StorageUnavailableError
from tunesmith_trainer.process.interruption import Interruption
from tunesmith_trainer.process.ranks import Ranks
from tunesmith_trainer.store import Stores
from tunesmith_trainer.training.checkpoint import (
    MANIFEST,
    Checkpoints,
    CheckpointWriteError,
    DamagedCheckpointError,
    LocalCheckpoint,
    OtherJobError,
    name_of,
    verify,
    write,
)
from tunesmith_trainer.training.saving import NotCompiledError, Saver
from tunesmith_trainer.training.schedule import Schedule
from tunesmith_trainer.training.trainer import StepTrainer

if TYPE_CHECKING:
    from collections.abc import Callable

BINDING = "sha256:of-this-run"


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "state").write_bytes(b"s" * 10)


def add_a_file(folder: Path) -> None:
    (folder / "stranger").write_bytes(b"")


def claim_another_step(folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, "step": 9}))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip, "the content of weights changed"),
    (truncate, "weights has 999 bytes instead of 1000"),
    (lose_a_file, "state is missing"),
    (lose_the_manifest, "checkpoint.json is missing"),
    (add_a_file, "stranger is not listed in its manifest"),
    (claim_another_step, "the content of checkpoint.json changed"),
]


def checkpoints(folder: Path, reports: list[str], *, keep: int = 2) -> Checkpoints:
    folder.mkdir(exist_ok=True)
    stores = Stores(secrets=folder, allow_file=True)
    place = stores.folder(f"file://{folder}", what="the checkpoints", missing=StorageUnavailableError)
    return Checkpoints(place, folder.parent / "scratch", binding=BINDING, keep=keep, write_line=reports.append)


def test_a_complete_checkpoint_verifies(tmp_path: Path) -> None:
    path = write(tmp_path, 4, BINDING, fill)
    verify(path, 4, BINDING)
    assert sorted(entry.name for entry in path.iterdir()) == [MANIFEST, "state", "weights"]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damage_is_detected_and_the_previous_checkpoint_is_used(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    folder, reports = tmp_path / "checkpoints", list[str]()
    kept = checkpoints(folder, reports)
    for step in (4, 8):
        assert kept.save(step, fill)
    damage(folder / name_of(8))
    with pytest.raises(DamagedCheckpointError, match=words):
        verify(folder / name_of(8), 8, BINDING)
    found = kept.newest()
    assert found is not None
    assert found.step == 4
    assert any("step 8 is damaged and will not be used" in line and words in line for line in reports)


def test_without_a_usable_checkpoint_training_starts_at_step_0_and_reports_it(tmp_path: Path) -> None:
    folder, reports = tmp_path / "checkpoints", list[str]()
    kept = checkpoints(folder, reports)
    kept.save(4, fill)
    flip(folder / name_of(4))
    assert kept.newest() is None
    assert reports[-1].strip() == "no checkpoint is usable: training starts at step 0"


def test_the_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 4, "sha256:of-another-run", fill)
    with pytest.raises(OtherJobError):
        verify(path, 4, BINDING)
    with pytest.raises(InvalidSpecError, match="holds checkpoints of another spec, base model or data set"):
        checkpoints(tmp_path / "checkpoints", []).newest()


def test_a_full_disk_leaves_only_the_previous_checkpoint(tmp_path: Path) -> None:
    def too_much(folder: Path) -> None:
        (folder / "weights").symlink_to("/dev/full")
        (folder / "weights").write_bytes(b"w" * 100_000)

    folder, reports = tmp_path / "checkpoints", list[str]()
    kept = checkpoints(folder, reports)
    kept.save(4, fill)
    with pytest.raises(CheckpointWriteError, match=r"the disk of .* is full"):
        write(folder, 8, BINDING, too_much)
    assert not kept.save(8, too_much)
    assert "that of step 4 is kept, training continues" in reports[-1]
    assert [entry.name for entry in folder.iterdir()] == [name_of(4)]
    found = kept.newest()
    assert found is not None
    assert found.step == 4


def test_an_unfinished_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    kept = checkpoints(folder, [])

    def killed(unfinished: Path) -> None:
        fill(unfinished)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, 4, BINDING, killed)
    assert kept.newest() is None
    assert kept.save(8, fill)
    assert [entry.name for entry in folder.iterdir()] == [name_of(8)]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    kept = checkpoints(folder, [], keep=2)
    for step in (4, 8, 12):
        kept.save(step, fill)
    assert sorted(entry.name for entry in folder.iterdir()) == [name_of(8), name_of(12)]


def trained(
    folder: Path, *, steps: int, compiled: bool = False, ranks: Ranks | None = None
) -> tuple[StepTrainer, Saver]:
    """Return a Trainer of a tiny model after some steps, and its Saver."""
    ranks = ranks or Ranks()
    torch.manual_seed(0)
    unused: Any = None
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=9, use_cpu=True, report_to="none", optim="adamw_torch"
    )
    trainer = StepTrainer(
        model=torch.nn.Linear(3, 2),
        args=arguments,
        rows=Dataset.from_dict({"row": [1]}),
        plan=unused,
        collate=unused,
        objective=unused,
        ranks=ranks,
        callbacks=[],
        schedule=Schedule(Scheduler.COSINE, 9, 3, 0.0),
        compiled=compiled,
    )
    saver = Saver(checkpoints(folder / "checkpoints", []), Checkpoint(), Interruption(), [], ranks, paused=nullcontext)
    saver.attach(trainer)
    trainer.is_distributed_loading_by_transformers = not ranks.alone  # as with sharded weights
    trainer.create_optimizer_and_scheduler(9)
    for _ in range(steps):
        trainer.model(torch.ones(3)).sum().backward()
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    trainer.state.global_step = steps
    trainer.state.max_steps = 9
    return trainer, saver


def saved(folder: Path, *, compiled: bool = False) -> tuple[StepTrainer, LocalCheckpoint]:
    folder.mkdir()
    trainer, _ = trained(folder, steps=2, compiled=compiled)
    trainer._save_checkpoint(trainer.model)
    return trainer, LocalCheckpoint(2, folder / "checkpoints" / name_of(2))


def test_the_optimizers_state_is_restored_through_main_memory(tmp_path: Path) -> None:
    """Tested on one of two ranks with GPUs; loaded states outlive the file."""
    before, checkpoint = saved(tmp_path / "first")
    trainer, _ = trained(tmp_path, steps=0)
    trainer.args = SimpleNamespace(world_size=2, device=torch.device("meta"))
    trainer._load_optimizer_and_scheduler(str(checkpoint.path))
    assert trainer.lr_scheduler.state_dict() == before.lr_scheduler.state_dict()
    expected, found = before.optimizer.state_dict(), trainer.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert list(found["state"]) == [0, 1]
    for number, state in expected["state"].items():
        assert state.keys() == found["state"][number].keys()
        for name, value in state.items():
            assert torch.equal(found["state"][number][name], value), (number, name)
    assert str(checkpoint.path) not in Path("/proc/self/maps").read_text()


def test_a_run_resumes_with_the_same_compilation(tmp_path: Path) -> None:
    _, written = saved(tmp_path / "written")
    _, compiled = saved(tmp_path / "compiled", compiled=True)
    trainer, saver = trained(tmp_path, steps=0, compiled=True)
    saver.restore(compiled)
    assert trainer.compiled
    saver.restore(written)
    assert not trainer.compiled
    with pytest.raises(
        NotCompiledError,
        match=r"checkpoint of step 2 and cannot be compiled on this machine.*with hyperparameters\.torchCompile false",
    ):
        saver.restore(compiled)


def test_a_run_without_remaining_steps_needs_no_compilation(tmp_path: Path) -> None:
    before, compiled = saved(tmp_path / "compiled", compiled=True)
    trainer, saver = trained(tmp_path, steps=0)
    trainer.args.max_steps = 2
    saver.restore(compiled)
    assert torch.equal(trainer.model.weight, before.model.weight)


def test_only_the_saving_rank_gets_the_optimizers_states(tmp_path: Path) -> None:
    counts = [
        len(trained(tmp_path, steps=1, ranks=Ranks(rank=rank, size=2))[0].optimizer.state_dict()["state"])
        for rank in (0, 1)
    ]
    assert counts == [2, 0]
