"""The CPU stage: check and count everything that can be known without weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunesmith.api.dataset import LossOn
from tunesmith.api.finetunejob_status import ContinuedFrom, ServableStatus
from tunesmith.api.placement import DataParallelism
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint, tensors_of
from tunesmith_trainer import data
from tunesmith_trainer.base_model import model
from tunesmith_trainer.base_model.headers import check_headers
from tunesmith_trainer.base_model.layers import can_share_prefixes
from tunesmith_trainer.base_model.stored import stored_quantization
from tunesmith_trainer.data.forms import FORMS
from tunesmith_trainer.data.loading import load as load_rows
from tunesmith_trainer.data.loading import require_weights
from tunesmith_trainer.data.template import same_prompts
from tunesmith_trainer.errors import BaseModelNotFoundError, InvalidSpecError
from tunesmith_trainer.evaluation import folders, harness
from tunesmith_trainer.evaluation.folders import TaskCode
from tunesmith_trainer.evaluation.generation import Example, also_trained, load
from tunesmith_trainer.libraries import refused
from tunesmith_trainer.manifest import spec_digest
from tunesmith_trainer.methods.config import parameters_at, plan_method
from tunesmith_trainer.methods.servable import require as require_servable
from tunesmith_trainer.methods.start import check_base, check_method, check_probes, fetch, with_method, with_scales
from tunesmith_trainer.methods.targets import modules_of
from tunesmith_trainer.methods.tokens import check_tokens
from tunesmith_trainer.preflight import plan
from tunesmith_trainer.preflight import sizing as preflight
from tunesmith_trainer.process.activity import limited
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from tunesmith.api.finetunejob import FineTuneJob, FineTuneJobSpec
    from tunesmith.api.finetunejob_status import Preflight, Resolved
    from tunesmith.contracts.artifact import Ancestor
    from tunesmith.contracts.fingerprint import ModelFolder
    from tunesmith.contracts.safetensors import Tensor
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.data.loading import Rows
    from tunesmith_trainer.evaluation.folders import SuppliedTasks
    from tunesmith_trainer.methods.config import MethodPlan
    from tunesmith_trainer.methods.start import StartAdapter
    from tunesmith_trainer.methods.targets import Modules
    from tunesmith_trainer.preflight.fitting import RunSettings
    from tunesmith_trainer.store import Stores


_PLANNING_SECONDS = 600.0
"""Time limit: PEFT reads some names as regular expressions, which can backtrack forever."""


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs are checked, counted and tokenised.

    Args:
        job: the job, with the method of the adapter that it continues from if its manifest has none.
        spec_digest: digest of the manifest's spec.
        base: folder with the base's configuration and tokenizer, and its weights if they were requested.
        train: tokenised training rows: `input_ids` and `labels`, and `seq_lengths` if they are packed.
        validation: tokenised held-out rows.
        lengths: tokens of each element of `train`.
        pad: token for padding.
        preflight: counts and verdicts.
        resolved: decisions that were made.
        planned: the planned adapter.
        ends: tokens that end an answer.
        examples: prompts and expected answers, by generation suite.
        task_folders: supplied tasks, by suite.
        lineage: adapters that training starts from, the newest first.
    """

    job: FineTuneJob
    spec_digest: str
    base: Path
    train: Dataset
    validation: Dataset
    lengths: np.ndarray[Any, np.dtype[np.integer[Any]]]
    pad: int
    preflight: Preflight
    resolved: Resolved
    planned: MethodPlan
    ends: list[int]
    examples: dict[str, list[Example]]
    task_folders: dict[str, SuppliedTasks]
    lineage: list[Ancestor]


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
    write_line: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Check, count and tokenise the inputs of a job.

    Args:
        job: the manifest.
        stores: opens the locations that it names.
        work: folder for downloads and tokenised rows.
        weights: True to download the base's weights too; otherwise the fingerprint is computed with ranged reads.
        ranks: number of ranks that train together; None: the number that the manifest requests.
        gpu_memory: memory of the GPU, in bytes; None if it is unknown.
        tokens: keeps the tokenised rows for the next attempt.
        task_code: permission to run tasks supplied with the job.
        write_line: reports progress to a person.

    Raises:
        TrainerError: an input is missing, refused or unusable.
    """
    digest, start = spec_digest(job), _start(job.spec, stores, work)
    adopted = start is not None and job.spec.requested_method is None
    if start is not None:
        job = with_method(job, start)
    spec = job.spec if ranks is None else _with_ranks(job.spec, ranks)
    before = job.status.resolved
    folders.check_permission(spec.evaluation, task_code)
    remote = model.open_base(spec.base_model, stores)
    local = model.fetch_base(remote, work / "base", weights=weights)
    files = LocalModelFolder(local) if weights else remote
    # With decisions of the CPU stage, the weights are those that it has checked: the fingerprint must not differ.
    headers = _headers(spec, files, model.weight_files(remote)) if before is None else None
    base = _read_base(spec, local, headers)
    planned = _planned(spec, base)
    fingerprint = _fingerprint(spec, files)
    if start is not None:
        check_base(start, fingerprint, spec.base_model.uri)
        check_probes(start, base.vocabulary)
        if adopted:
            planned = with_scales(planned, start)
        check_method(start, planned, spec.method, base.modules)
        planned = replace(planned, identity=False, start=start.folder)
    rows = _rows(spec, base, planned, stores, work, tokens, write_line)
    check_tokens(planned.config, rows.train)
    examples = _examples(spec, base, stores, work)
    own = _own_tasks(spec, before, stores, work, write_line)
    sized = _sized(spec, base, planned, rows)
    shardable = spec.shardable and model.can_be_sharded(base.config, base.modules.stored)
    run, sizes = _settings(spec, before, sized, gpu_memory, shardable=shardable)
    now = plan.resolve(
        spec,
        rows=len(rows.train),
        held_out=len(rows.validation),
        targets=planned.targets,
        fingerprint=fingerprint,
        digest=rows.digest,
        start=None if start is None else ContinuedFrom(uri=start.uri, digest=start.digest),
        rank=None if start is None else start.manifest.adapter.rank,
        stored=base.modules.stored,
        folders={suite: tasks.digest for suite, tasks in own.items()},
        micro_batch_size=run.micro_batch_size,
        checkpointing=run.checkpointing,
        sharded=run.sharded,
    )
    resolved = plan.frozen(before, now)
    counted = _counts(spec, base, rows, planned, examples)
    counted = preflight.judge(counted, sized, spec, run, sizes, gpu_memory, shardable=shardable)
    return Prepared(
        job=job,
        spec_digest=digest,
        base=base.folder,
        train=rows.train,
        validation=rows.validation,
        lengths=rows.lengths,
        pad=model.pad_token(base.tokenizer, base.ends),
        preflight=counted,
        resolved=resolved,
        planned=planned,
        ends=base.ends,
        examples=examples,
        task_folders=own,
        lineage=[] if start is None else start.lineage,
    )


def _start(spec: FineTuneJobSpec, stores: Stores, work: Path) -> StartAdapter | None:
    """Return the adapter that training starts from; None: a new one."""
    return None if spec.continue_from is None else fetch(spec.continue_from, stores, work / "start")


@dataclass(frozen=True)
class _Base:
    """A base model without its weights.

    Args:
        folder: folder with its files.
        config: its configuration.
        tokenizer: its tokenizer.
        ends: tokens that end an answer.
        modules: its linear modules.
    """

    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    ends: list[int]
    modules: Modules

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the base has weights for."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def context(self) -> int | None:
        """Maximum number of tokens of the base; None if its configuration does not state it."""
        return getattr(self.config, "max_position_embeddings", None)


def _headers(spec: FineTuneJobSpec, folder: ModelFolder, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of the files that the base's weights are loaded from."""
    try:
        return {name: tensor for file in names for name, tensor in tensors_of(folder, file).items()}
    except ValueError as error:
        raise BaseModelNotFoundError(f"{spec.base_model.uri}: {error}") from None


def _read_base(spec: FineTuneJobSpec, folder: Path, headers: Mapping[str, Tensor] | None) -> _Base:
    uri = spec.base_model.uri
    config, stored = model.load_config(folder, uri), stored_quantization(folder)
    tokenizer = model.load_tokenizer(folder, uri)
    model_of = f"the model that config.json of the base model {uri} describes"
    with limited(f"building {model_of}", _PLANNING_SECONDS), refused(f"{model_of} cannot be built"):
        if headers is not None:
            check_headers(config, headers, stored)
        modules = modules_of(config, stored)
    return _Base(folder, config, tokenizer, model.end_tokens(folder, tokenizer, uri), modules)


def _planned(spec: FineTuneJobSpec, base: _Base) -> MethodPlan:
    """Return the adapter that the spec requests, on this base."""
    with limited("spec.method: finding the modules that its names and patterns match", _PLANNING_SECONDS):
        return _with_template(plan_method(spec, base.modules), spec, base.tokenizer)


def _fingerprint(spec: FineTuneJobSpec, folder: ModelFolder) -> str:
    try:
        return base_fingerprint(folder)
    except ValueError as error:
        raise BaseModelNotFoundError(f"{spec.base_model.uri}: {error}") from None


def _rows(
    spec: FineTuneJobSpec,
    base: _Base,
    planned: MethodPlan,
    stores: Stores,
    work: Path,
    tokens: Folder | None,
    write_line: Callable[[str], None],
) -> Rows:
    """Return the job's rows, tokenised."""
    dataset = spec.dataset
    encoder = data.Encoder(base.tokenizer, base.ends, chat_template=dataset.chat_template, loss_on=dataset.loss_on)
    # Tokens of a method precede each row, which therefore has to be whole.
    whole = planned.config is not None and planned.config.is_prompt_learning
    return load_rows(
        dataset,
        stores,
        work,
        encoder,
        forms=FORMS[spec.objective_name],
        tokenizer=_tokenizer_digest(base.folder, base.ends),
        seed=spec.hyperparameters.seed,
        context=base.context,
        share_prefixes=can_share_prefixes(base.config) and not whole,
        vocabulary=base.vocabulary,
        store=tokens,
        write_line=write_line,
    )


def _examples(spec: FineTuneJobSpec, base: _Base, stores: Stores, work: Path) -> dict[str, list[Example]]:
    """Return the prompts and expected answers of each generation suite."""
    dataset = spec.dataset
    answers = data.Encoder(base.tokenizer, base.ends, chat_template=dataset.chat_template, loss_on=LossOn.COMPLETION)
    found = {
        suite.name: load(suite, dataset, stores, work / "data", answers, base.tokenizer, base.context)
        for suite in spec.suites
        if suite.generation is not None
    }
    tokens = (token for examples in found.values() for example in examples for token in example.prompt)
    require_weights(max(tokens, default=-1), base.vocabulary)
    return found


def _own_tasks(
    spec: FineTuneJobSpec, before: Resolved | None, stores: Stores, work: Path, write_line: Callable[[str], None]
) -> dict[str, SuppliedTasks]:
    """Fetch and check the tasks of suites that run lm-evaluation-harness; return the supplied ones by suite.

    Args:
        spec: the job's spec.
        before: decisions of an earlier stage, with the digests of the task folders that it checked.
        stores: opens the locations of the folders.
        work: folder for the copies.
        write_line: reports progress to a person.
    """
    if spec.evaluation is None or all(suite.lm_eval is None for suite in spec.suites):
        return {}
    write_line("  fetching the tasks of lm-evaluation-harness")
    validated = {folder.suite: folder.digest for folder in (before.task_folders if before is not None else None) or []}
    own = folders.fetch(spec.evaluation, stores, work / "tasks", validated)
    harness.check(spec.evaluation, own)
    return own


def _sized(spec: FineTuneJobSpec, base: _Base, planned: MethodPlan, rows: Rows) -> preflight.Sizing | None:
    """Return the quantities that determine the peak of GPU memory; None if it cannot be estimated."""
    if planned.parameters is None:
        return None

    def trainable(rank: int | None) -> int:
        return parameters_at(rank, planned, spec, base.modules)

    return preflight.sizing(spec, base.config, base.modules, planned.modules, trainable, rows.lengths)


def _counts(
    spec: FineTuneJobSpec, base: _Base, rows: Rows, planned: MethodPlan, examples: dict[str, list[Example]]
) -> Preflight:
    """Return the counts of rows and parameters, with the scored examples that are trained on too."""
    by_suite = [also_trained(name, scored, rows.keys) for name, scored in examples.items()]
    found = [*(rows.counted.also_trained or []), *(overlap for overlap in by_suite if overlap is not None)]
    return rows.counted.model_copy(
        update={
            "trainable_parameters": planned.parameters,
            "adapted_percent": _percent(planned.adapted_weights, base.modules) if planned.adapted_weights else None,
            "quantized_percent": (
                _percent(base.modules.quantizable_weights, base.modules)
                if spec.method.quantization is not None
                else None
            ),
            "servable": planned.servable,
            "also_trained": found or None,
        }
    )


def _percent(weights: int, modules: Modules) -> int:
    """Return a number of weights as a share of those in the base's layers, in percent."""
    return 100 * weights // max(1, modules.layer_weights)


def _with_ranks(spec: FineTuneJobSpec, ranks: int) -> FineTuneJobSpec:
    """Return the spec with the actual number of nodes: outside a cluster it is one, whatever the manifest states."""
    nodes = max(1, ranks // max(1, spec.resources.gpus))
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"nodes": nodes})})


def _settings(
    spec: FineTuneJobSpec,
    frozen: Resolved | None,
    sized: preflight.Sizing | None,
    gpu_memory: int | None,
    *,
    shardable: bool,
) -> tuple[RunSettings, list[int]]:
    """Return micro-batch size, checkpointing and data parallelism of a run, and the possible micro-batch sizes.

    Raises:
        InvalidSpecError: recomputed activations or sharded weights are requested, but not possible.
    """
    requested = spec.hyperparameters.micro_batch_size
    before = frozen.micro_batch_size if frozen is not None else None
    sizes = plan.micro_batch_sizes(spec)
    recompute, possible = spec.hyperparameters.gradient_checkpointing, preflight.can_recompute(spec)
    if recompute and not possible:
        raise InvalidSpecError(
            f"hyperparameters.gradientCheckpointing: method.{spec.method.name} cannot be trained with recomputed"
            " activations: set it to false"
        )
    checkpointing = spec.resources.gpus > 0 and possible if recompute is None else recompute
    run = preflight.settings_of(spec, micro_batch_size=before or requested or max(sizes), checkpointing=checkpointing)
    if run.sharded and not shardable:
        raise InvalidSpecError(
            f"resources.dataParallelism: the layers of {spec.base_model.uri} are unknown, so FSDP2 cannot shard its"
            " weights: use DDP"
        )
    if before is not None and frozen is not None:
        sharded = frozen.data_parallelism is DataParallelism.FSDP2 and spec.resources.ranks > 1
        return replace(run, checkpointing=bool(frozen.gradient_checkpointing), sharded=sharded), sizes
    if sized is None or gpu_memory is None:
        return run, sizes
    choices = (False, True) if recompute is None and possible else (checkpointing,)
    sharding = spec.resources.data_parallelism is None and spec.resources.ranks > 1 and shardable
    return preflight.decide_settings(
        sized, run, [requested] if requested else sizes, choices, gpu_memory, sharding=sharding
    ), sizes


def _with_template(planned: MethodPlan, spec: FineTuneJobSpec, tokenizer: PreTrainedTokenizerFast) -> MethodPlan:
    """Return the adapter, with the verdict on the job's chat template: a pool uses that of its base model."""
    template = spec.dataset.chat_template
    if spec.method.full is not None or template is None or same_prompts(tokenizer, template):
        return planned
    reason = (
        "dataset.chatTemplate renders questions differently from the base model's chat template, which a pool of that"
        " base model uses: use the base model's own template, changed only by {% generation %} marks; or add the"
        " template to a copy of the base model as chat_template.jinja and use the copy as baseModel of the job and the"
        " pool; or serve the merged model"
    )
    planned = replace(planned, servable=ServableStatus(vllm=False, reason=reason))
    require_servable(spec, planned.servable)
    return planned


def _tokenizer_digest(base: Path, ends: list[int]) -> str:
    files = {file.name: file_sha256(file) for file in model.tokenizer_files(base)}
    return hashlib.sha256(json.dumps([files, ends], sort_keys=True).encode()).hexdigest()
