"""The CPU stage: everything that can be known without weights is checked and counted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunesmith.api.dataset import LossOn
from tunesmith.api.finetunejob_status import ServableStatus
from tunesmith.api.placement import DataParallelism
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith_trainer import data
from tunesmith_trainer.base_model import model
from tunesmith_trainer.data.loading import load as load_rows
from tunesmith_trainer.data.rows import FORMS
from tunesmith_trainer.data.template import same_prompts
from tunesmith_trainer.errors import BaseModelNotFoundError, InvalidSpecError
from tunesmith_trainer.evaluation import folders, harness
from tunesmith_trainer.evaluation.folders import TaskCode
from tunesmith_trainer.evaluation.generation import Example, also_trained, load
from tunesmith_trainer.methods.config import parameters_at, plan_method
from tunesmith_trainer.methods.servable import require as require_servable
from tunesmith_trainer.methods.targets import modules_of
from tunesmith_trainer.methods.tokens import check_tokens
from tunesmith_trainer.preflight import plan
from tunesmith_trainer.preflight import sizing as preflight
from tunesmith_trainer.process.activity import limited
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from tunesmith.api.finetunejob import FineTuneJob, FineTuneJobSpec
    from tunesmith.api.finetunejob_status import Preflight, Resolved
    from tunesmith.contracts.fingerprint import ModelFolder
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.evaluation.folders import OwnTasks
    from tunesmith_trainer.methods.config import Planned
    from tunesmith_trainer.preflight.fitting import Settings
    from tunesmith_trainer.store import Stores


_PLANNING_SECONDS = 600.0
"""PEFT reads some names as regular expressions, which can backtrack for ever."""


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs are checked, counted and tokenised.

    Args:
        base: folder with the base's configuration and tokenizer, and its weights where they were asked for.
        train: rows to train on, tokenised: `input_ids` and `labels`, and `seq_lengths` where they are packed.
        validation: rows held out, tokenised.
        lengths: tokens of each of `train`.
        pad: token for padding.
        preflight: what was counted.
        resolved: what was decided.
        planned: the adapter.
        ends: tokens that end an answer.
        examples: by generation suite, what is asked and answered.
        task_folders: by suite, the tasks that it brings.
    """

    base: Path
    train: Dataset
    validation: Dataset
    lengths: np.ndarray[Any, np.dtype[np.integer[Any]]]
    pad: int
    preflight: Preflight
    resolved: Resolved
    planned: Planned
    ends: list[int]
    examples: dict[str, list[Example]]
    task_folders: dict[str, OwnTasks]


def prepare(
    job: FineTuneJob,
    stores: Stores,
    work: Path,
    *,
    weights: bool,
    ranks: int | None = None,
    gpu_memory: int | None = None,
    tokens: Folder | None = None,
    task_code: TaskCode = TaskCode.REFUSED,
    say: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Checks, counts and tokenises the inputs of a job.

    Args:
        job: the manifest.
        stores: opens the places that it names.
        work: folder for downloads and tokenised rows.
        weights: download the base's weights too; without them the fingerprint is read with ranged reads.
        ranks: that train together; None: as many as the manifest asks for.
        gpu_memory: of the GPU, bytes; None where it is not known.
        tokens: keeps the tokenised rows for the next attempt.
        task_code: whether tasks that the job brings may be run.
        say: tells a person how far it is.

    Raises:
        TrainerError: an input is missing, refused or not usable.
    """
    spec = job.spec if ranks is None else _of_ranks(job.spec, ranks)
    before = job.status.resolved
    folders.permit(spec.evaluation, task_code)
    remote = model.open_base(spec.base_model, stores)
    base = model.fetch_base(remote, work / "base", weights=weights)
    config = model.load_config(base, spec.base_model.uri)
    tokenizer = model.load_tokenizer(base, spec.base_model.uri)
    ends = model.end_tokens(base, tokenizer, spec.base_model.uri)
    modules = modules_of(config)
    with limited("spec.method: finding the modules that its names and patterns mean", _PLANNING_SECONDS):
        planned = _with_template(plan_method(spec, modules), spec, tokenizer)
    folder: ModelFolder = LocalModelFolder(base) if weights else remote
    try:
        fingerprint = base_fingerprint(folder)
    except ValueError as error:
        raise BaseModelNotFoundError(f"{spec.base_model.uri}: {error}") from None

    asked = spec.dataset
    encoder = data.Encoder(tokenizer, ends, chat_template=asked.chat_template, loss_on=asked.loss_on)
    context = getattr(config, "max_position_embeddings", None)
    rows = load_rows(
        asked,
        stores,
        work,
        encoder,
        forms=FORMS[spec.objective_name],
        tokenizer=_tokenizer_digest(base, ends),
        seed=spec.hyperparameters.seed,
        context=context,
        store=tokens,
        say=say,
    )
    check_tokens(planned.config, rows.train)
    answers = data.Encoder(tokenizer, ends, chat_template=asked.chat_template, loss_on=LossOn.COMPLETION)
    examples = {
        suite.name: load(suite, asked, stores, work / "data", answers, tokenizer, context)
        for suite in spec.suites
        if suite.generation is not None
    }
    own: dict[str, OwnTasks] = {}
    if spec.evaluation is not None and any(suite.lm_eval is not None for suite in spec.suites):
        say("  fetching the tasks of lm-evaluation-harness")
        validated = {one.suite: one.digest for one in (before.task_folders if before is not None else None) or []}
        own = folders.fetch(spec.evaluation, stores, work / "tasks", validated)
        harness.check(spec.evaluation, own)
    lengths = rows.lengths

    def trainable(rank: int | None) -> int:
        return parameters_at(rank, planned, spec, modules)

    known = planned.parameters is not None
    sized = preflight.sizing(spec, config, modules, planned.modules, trainable, lengths) if known else None
    run, sizes = _settings(spec, before, sized, gpu_memory, has_layers=model.can_be_shared_out(config))
    now = plan.resolve(
        spec,
        rows=len(rows.train),
        held_out=len(rows.validation),
        targets=planned.targets,
        fingerprint=fingerprint,
        digest=rows.digest,
        folders={suite: tasks.digest for suite, tasks in own.items()},
        micro_batch_size=run.micro_batch_size,
        checkpointing=run.checkpointing,
        sharded=run.sharded,
    )
    resolved = plan.frozen(before, now)
    counted = rows.counted.model_copy(update={"trainable_parameters": planned.parameters, "servable": planned.servable})
    flattered = [also_trained(name, some, rows.keys) for name, some in examples.items()]
    found = [*(counted.also_trained or []), *(one for one in flattered if one is not None)]
    counted = counted.model_copy(update={"also_trained": found or None})
    counted = preflight.judge(counted, sized, spec, run, sizes, gpu_memory)
    pad = model.pad_token(tokenizer, ends)
    return Prepared(
        base, rows.train, rows.validation, rows.lengths, pad, counted, resolved, planned, ends, examples, own
    )


def _of_ranks(spec: FineTuneJobSpec, ranks: int) -> FineTuneJobSpec:
    """The spec with the nodes that are there: outside of a cluster it is one, whatever the manifest says."""
    nodes = max(1, ranks // max(1, spec.resources.gpus))
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"nodes": nodes})})


def _settings(
    spec: FineTuneJobSpec,
    frozen: Resolved | None,
    sized: preflight.Sizing | None,
    gpu_memory: int | None,
    *,
    has_layers: bool,
) -> tuple[Settings, list[int]]:
    """The micro-batch size, the checkpointing and the data parallelism of a run, and the sizes that are possible.

    Raises:
        InvalidSpecError: activations are to be computed again, or weights shared out, where that is not possible.
    """
    asked = spec.hyperparameters.micro_batch_size
    before = frozen.micro_batch_size if frozen is not None else None
    sizes = plan.micro_batch_sizes(spec)
    again, possible = spec.hyperparameters.gradient_checkpointing, preflight.can_recompute(spec)
    if again and not possible:
        raise InvalidSpecError(
            f"hyperparameters.gradientCheckpointing: what method.{spec.method.name} trains is lost where activations"
            " are computed again; set it to false"
        )
    checkpointing = spec.resources.gpus > 0 and possible if again is None else again
    run = preflight.settings_of(spec, micro_batch_size=before or asked or max(sizes), checkpointing=checkpointing)
    if run.sharded and not has_layers:
        raise InvalidSpecError(
            f"resources.dataParallelism: the layers of {spec.base_model.uri} are not known, so FSDP2 cannot share its"
            " weights out: use DDP"
        )
    if before is not None and frozen is not None:
        sharded = frozen.data_parallelism is DataParallelism.FSDP2 and spec.resources.ranks > 1
        return replace(run, checkpointing=bool(frozen.gradient_checkpointing), sharded=sharded), sizes
    if sized is None or gpu_memory is None:
        return run, sizes
    ways = (False, True) if again is None and possible else (checkpointing,)
    sharding = spec.resources.data_parallelism is None and spec.resources.ranks > 1 and spec.shardable and has_layers
    return preflight.decided(sized, run, [asked] if asked else sizes, ways, gpu_memory, sharding=sharding), sizes


def _with_template(planned: Planned, spec: FineTuneJobSpec, tokenizer: PreTrainedTokenizerFast) -> Planned:
    """The adapter, with the verdict on a chat template of its own: a pool asks with that of its base model."""
    template = spec.dataset.chat_template
    if spec.method.full is not None or template is None or same_prompts(tokenizer, template):
        return planned
    reason = (
        "dataset.chatTemplate writes questions otherwise than the base model's chat template, which a pool of that base"
        " model serves with: use the base model's own, with nothing but {% generation %} marks added, or serve the"
        " merged model"
    )
    planned = replace(planned, servable=ServableStatus(vllm=False, reason=reason))
    require_servable(spec, planned.servable)
    return planned


def _tokenizer_digest(base: Path, ends: list[int]) -> str:
    files = {file.name: file_sha256(file) for file in model.tokenizer_files(base)}
    return hashlib.sha256(json.dumps([files, ends], sort_keys=True).encode()).hexdigest()
