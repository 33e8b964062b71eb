"""Settings of the operator that reach the pods of the trainer."""

from __future__ import annotations

from typing import Annotated

from tunesmith.contracts.settings import ChartValue, SettingPattern, StorageSize, WorkloadSettings


class JobSettings(WorkloadSettings):
    """Settings of validation and training pods."""

    trainer_image: Annotated[str, ChartValue("images.trainer", 'include "tunesmith.image" (list . "trainer")')]
    """Image of validation and training pods."""
    lm_eval_tasks: Annotated[
        str, SettingPattern("(/.+)?", "an absolute path in the trainer's image"), ChartValue("trainer.lmEvalTasks")
    ] = ""
    """Folder in the trainer's image with the platform's own tasks for lm-evaluation-harness, whose functions training
    pods execute; empty: no folder."""
    allow_task_folders: Annotated[bool, ChartValue("trainer.allowTaskFolders")] = False
    """Allow jobs to provide evaluation tasks (lmEval.taskFolder), which are code that runs in their pods."""
    job_storage: Annotated[StorageSize, ChartValue("trainer.storage")] = "500Gi"
    """Local disk space that a pod of a job may use, in Mi or Gi, for base model, data, checkpoints and a merged model.
    A pod that uses more is stopped."""
