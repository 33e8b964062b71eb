"""The CPU stage: everything that can be known without weights is checked and counted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, Features, Sequence, Value
from datasets.arrow_writer import ArrowWriter

from tunesmith.api.finetunejob_status import Preflight, Resolved
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith_trainer import data, model, plan, preflight
from tunesmith_trainer.errors import BaseModelNotFoundError, InvalidSpecError
from tunesmith_trainer.evaluation.generation import Example, load

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.contracts.fingerprint import ModelFolder
    from tunesmith_trainer.store import Stores

_FEATURES = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))})


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs are checked, counted and tokenised.

    Args:
        base: folder with the base's configuration and tokenizer, and its weights where they were asked for.
        train: rows to train on, tokenised.
        validation: rows held out, tokenised.
        pad: token for padding.
        preflight: what was counted.
        resolved: what was decided.
        modules: modules that get an adapter, with their (in, out) features.
        ends: tokens that end an answer.
        examples: by generation suite, what is asked and answered.
    """

    base: Path
    train: Dataset
    validation: Dataset
    pad: int
    preflight: Preflight
    resolved: Resolved
    modules: dict[str, tuple[int, int]]
    ends: list[int]
    examples: dict[str, list[Example]]


def prepare(job: FineTuneJob, stores: Stores, work: Path, *, weights: bool, gpu_memory: int | None = None) -> Prepared:
    """Checks, counts and tokenises the inputs of a job.

    Args:
        job: the manifest.
        stores: opens the places that it names.
        work: folder for downloads and tokenised rows.
        weights: download the base's weights too; without them the fingerprint is read with ranged reads.
        gpu_memory: of the GPU, bytes; None where it is not known.

    Raises:
        TrainerError: an input is missing, refused or not usable.
    """
    spec = job.spec
    remote = model.open_base(spec.base_model, stores)
    base = model.fetch_base(remote, work / "base", weights=weights)
    config = model.load_config(base, spec.base_model.uri)
    tokenizer = model.load_tokenizer(base, spec.base_model.uri)
    ends = model.end_tokens(base, tokenizer, spec.base_model.uri)
    modules = model.modules_of(config)
    targets = model.resolve_targets(spec.method.fields.target_modules, modules)
    adapted = model.adapted(targets, modules)
    folder: ModelFolder = LocalModelFolder(base) if weights else remote
    try:
        fingerprint = base_fingerprint(folder)
    except ValueError as error:
        raise BaseModelNotFoundError(f"{spec.base_model.uri}: {error}") from None

    encoder = data.Encoder(tokenizer, ends)
    digest = hashlib.sha256(b"train\n")
    limit = spec.dataset.max_length
    train, kept = _tokenise(
        data.fetch(spec.dataset.train, stores, work / "data/train"), encoder, digest, limit, work / "train.arrow"
    )
    kept.require("training rows", limit, least=1 if spec.dataset.validation else 2)
    chosen, out = data.held_out(len(kept.lengths), spec.dataset, spec.hyperparameters.seed)
    _check_context(config, kept)
    dropped = kept.dropped
    if spec.dataset.validation:
        digest.update(b"validation\n")
        files = data.fetch(spec.dataset.validation, stores, work / "data/validation")
        validation, kept_out = _tokenise(files, encoder, digest, limit, work / "validation.arrow")
        kept_out.require("held-out rows", limit)
        _check_context(config, kept_out)
        dropped += kept_out.dropped
    else:
        validation, train = train.select(out), train.select(chosen)
    context = getattr(config, "max_position_embeddings", None)
    examples = {
        suite.name: load(suite, stores, work / "data", encoder, tokenizer, context)
        for suite in (spec.evaluation.suites if spec.evaluation else [])
        if suite.generation is not None
    }
    lengths = np.asarray(kept.lengths)[chosen]

    def trainable(rank: int | None) -> int:
        return model.adapter_parameters(rank or spec.method.fields.rank, list(adapted.values()))

    sized = preflight.sizing(spec, config, modules, adapted, trainable, lengths)
    run, sizes = _settings(job, sized, gpu_memory)
    now = plan.resolve(
        spec,
        rows=len(train),
        targets=targets,
        fingerprint=fingerprint,
        digest=f"sha256:{digest.hexdigest()}",
        micro_batch_size=run.micro_batch_size,
        checkpointing=run.checkpointing,
    )
    resolved = plan.frozen(job.status.resolved, now)
    counted = Preflight(
        rows=len(train),
        validation_rows=len(validation),
        dropped_rows=dropped,
        tokens=int(lengths.sum()),
        trainable_parameters=trainable(None),
    )
    if sized is not None:
        counted = preflight.judge(counted, sized, spec, run, sizes, gpu_memory)
    pad = model.pad_token(tokenizer, ends)
    return Prepared(base, train, validation, pad, counted, resolved, adapted, ends, examples)


def _settings(
    job: FineTuneJob, sized: preflight.Sizing | None, gpu_memory: int | None
) -> tuple[preflight.Settings, list[int]]:
    """The micro-batch size and the checkpointing of a run, and the sizes that are possible."""
    spec, frozen = job.spec, job.status.resolved
    asked = spec.hyperparameters.micro_batch_size
    before = frozen.micro_batch_size if frozen is not None else None
    sizes = plan.micro_batch_sizes(spec)
    again = spec.hyperparameters.gradient_checkpointing
    checkpointing = spec.resources.gpus > 0 if again is None else again
    run = preflight.settings_of(spec, micro_batch_size=before or asked or max(sizes), checkpointing=checkpointing)
    if before is not None and frozen is not None:
        return replace(run, checkpointing=bool(frozen.gradient_checkpointing)), sizes
    if sized is None or gpu_memory is None:
        return run, sizes
    ways = (False, True) if again is None else (again,)
    return preflight.decided(sized, run, [asked] if asked else sizes, ways, gpu_memory), sizes


def _check_context(config: PretrainedConfig, kept: data.Kept) -> None:
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and max(kept.lengths) > context:
        raise InvalidSpecError(
            f"a row has {max(kept.lengths)} tokens and the base model's context has {context}: set dataset.maxLength "
            f"to at most {context}, which drops such rows"
        )


def _tokenise(
    files: list[data.DataFile], encoder: data.Encoder, digest: hashlib._Hash, limit: int, path: Path
) -> tuple[Dataset, data.Kept]:
    """The rows of the files on disk, tokenised: memory does not grow with them."""
    kept = data.Kept()
    with ArrowWriter(path=str(path), features=_FEATURES, writer_batch_size=256) as writer:
        for row in data.read(files, digest):
            tokens = encoder.encode(row)
            if kept.add(len(tokens.input_ids), limit):
                writer.write({"input_ids": tokens.input_ids, "labels": tokens.labels})
        writer.finalize()
    if not kept.lengths:
        kept.require("rows", limit)
    return Dataset.from_file(str(path)), kept
