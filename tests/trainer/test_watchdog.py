"""A step that hangs is detected; a slow one is not mistaken for one."""

from __future__ import annotations

import queue

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from tunesmith_trainer.training.watchdog import FIRST_STEP_SECONDS, MIN_STEP_SECONDS, Watchdog, deadline

ENDLESS = 60.0


@pytest.mark.parametrize(
    ("seconds", "allowed"),
    [([], FIRST_STEP_SECONDS), ([1.0] * 10, MIN_STEP_SECONDS), ([60.0] * 10, 1200.0), ([900.0] + [30.0] * 9, 600.0)],
    ids=["first step", "quick steps", "slow steps", "one that compiled"],
)
def test_the_time_limit_of_a_step_follows_from_the_previous_steps(seconds: list[float], allowed: float) -> None:
    assert deadline(seconds) == allowed


def test_a_hung_step_is_reported_once_with_the_completed_steps(tmp_path: object) -> None:
    reports: queue.Queue[tuple[int, float]] = queue.Queue()
    watchdog = Watchdog(
        lambda step, seconds: reports.put((step, seconds)),
        limit=lambda seconds: 0.2 if seconds else ENDLESS,
        pause=0.05,
    )
    arguments, state, control = TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl()
    watchdog.on_train_begin(arguments, state, control)
    watchdog.on_step_begin(arguments, state, control)
    state.global_step = 1
    watchdog.on_step_end(arguments, state, control)
    watchdog.on_step_begin(arguments, state, control)
    step, seconds = reports.get(timeout=120)
    assert step == 1
    assert seconds > 0.2
    watchdog.stop()


def test_work_between_steps_has_a_longer_limit(tmp_path: object) -> None:
    reports: queue.Queue[int] = queue.Queue()
    watchdog = Watchdog(lambda step, _: reports.put(step), limit=lambda _: 0.1, pause=0.02)
    watchdog.on_train_begin(TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl())
    with watchdog.paused(), pytest.raises(queue.Empty):
        reports.get(timeout=1)
    assert reports.get(timeout=120) == 0  # another step, which hangs


def test_work_between_steps_has_a_limit(tmp_path: object) -> None:
    reports: queue.Queue[float] = queue.Queue()
    watchdog = Watchdog(lambda _, seconds: reports.put(seconds), limit=lambda _: ENDLESS, pause=0.02, max_pause=0.2)
    watchdog.on_train_begin(TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl())
    with watchdog.paused():
        assert reports.get(timeout=120) > 0.2


def test_a_finished_run_is_not_watched(tmp_path: object) -> None:
    reports: queue.Queue[int] = queue.Queue()
    watchdog = Watchdog(lambda step, _: reports.put(step), limit=lambda _: 0.1, pause=0.02)
    arguments, state, control = TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl()
    watchdog.on_train_begin(arguments, state, control)
    watchdog.on_train_end(arguments, state, control)
    with pytest.raises(queue.Empty):
        reports.get(timeout=1)
