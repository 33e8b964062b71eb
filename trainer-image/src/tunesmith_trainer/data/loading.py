"""Load the rows of a job: fetched, checked, tokenised or read from the cache, divided, weighted and packed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.api.dataset import Overlong
from tunesmith.api.finetunejob_status import AlsoTrained, Preflight, ReadSource
from tunesmith_trainer.data.cache import TokenCache, key_of
from tunesmith_trainer.data.report import EXAMPLES, RowReport, shortened
from tunesmith_trainer.data.rows import read, require_columns
from tunesmith_trainer.data.selection import held_out, trained_too, weighted
from tunesmith_trainer.data.sources import Part, add_content, fetch
from tunesmith_trainer.data.tokens import measure, open_rows, pack, tokenise
from tunesmith_trainer.errors import DatasetInvalidError, InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from datasets import Dataset

    from tunesmith.api import dataset as api
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.data.cache import Cached
    from tunesmith_trainer.data.encoding import Encoder
    from tunesmith_trainer.data.forms import RowForm
    from tunesmith_trainer.data.sources import Source
    from tunesmith_trainer.data.tokens import Counted, Sizes
    from tunesmith_trainer.store import Stores

    IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]

_ENCODING = 5
"""Version of the encoding: increased when the same rows produce different tokens."""
_SHOWN_SOURCES = 8
_SHOWN_SPLITS = 8
_TOKEN_FIELDS = {"format", "columns", "chat_template", "loss_on", "max_length", "overlong", "unusable", "duplicates"}
"""Fields of the data set that the tokens depend on."""


@dataclass(frozen=True)
class Rows:
    """The tokenised rows of a job.

    Args:
        train: rows of an epoch, or the sequences that they are packed into, which also have `seq_lengths`.
        validation: rows held out.
        lengths: tokens of each element of `train`.
        keys: `Row.key` of the rows that are trained on.
        digest: `sha256:<64 hex>` of the content of all files.
        counted: their share of `status.preflight`.
    """

    train: Dataset
    validation: Dataset
    lengths: IntArray
    keys: IntArray
    digest: str
    counted: Preflight


def load(
    dataset: api.Dataset,
    stores: Stores,
    work: Path,
    encoder: Encoder,
    *,
    forms: Collection[RowForm],
    tokenizer: str,
    seed: int,
    context: int | None,
    share_prefixes: bool = False,
    vocabulary: int | None = None,
    store: Folder | None = None,
    write_line: Callable[[str], None] = lambda _: None,
) -> Rows:
    """Load the rows that a manifest names, ready to train on.

    Args:
        dataset: their locations, and settings for reading them.
        stores: opens the locations.
        work: local folder for downloads and tokens.
        encoder: turns rows into tokens.
        forms: row forms that the objective can learn from.
        tokenizer: digest of the tokenizer, its chat template and its end tokens.
        seed: seed for choosing the held-out rows and the rows of a fractional weight.
        context: maximum tokens of the base model; None if its configuration does not state it.
        share_prefixes: True if the base model can compute prefixes that packed rows of a chat share once.
        vocabulary: number of tokens that the base model has weights for; None: not checked.
        store: keeps the tokens for the next attempt.
        write_line: reports progress to a person.

    Raises:
        TrainerError: an input is missing, refused or unusable.
    """
    sources = _fetch(dataset, stores, work)
    content = _content_digest(sources)

    def make(folder: Path) -> dict[str, Counted]:
        counted = {
            name: tokenise(group, dataset, forms, encoder, folder / f"{name}.arrow", write_line)
            for name, group in sources.items()
        }
        missing = counted["train"].report.missing_columns
        others = [counts.report.missing_columns for counts in counted.values()]
        missing = {name: column for name, column in missing.items() if all(name in other for other in others)}
        require_columns(missing, sources["train"])
        return counted

    key = _token_key(dataset, sources, content, forms, tokenizer)
    cached = TokenCache(work / "tokens", store).get(key, make)
    divided = _divide(cached, dataset, seed, context)
    if vocabulary is not None:
        scored = -1 if divided.scored is None else divided.scored.highest
        require_weights(max(divided.sizes.highest, scored), vocabulary)
    indices = _epoch_indices(divided, cached, dataset, seed)
    train, lengths = _select(divided.rows, indices), divided.sizes.lengths[indices]
    packed = None
    if dataset.packing:
        path = work / "packed.arrow"
        packed = pack(
            cached.path("train"), indices, divided.sizes, dataset.max_length, path, share_prefixes=share_prefixes
        )
        train = open_rows(path)
    keys = divided.sizes.keys[np.unique(indices)]
    return Rows(
        train=train,
        validation=divided.validation,
        lengths=lengths if packed is None else packed.lengths,
        keys=keys,
        digest=f"sha256:{content}",
        counted=Preflight(
            rows=len(indices),
            validation_rows=len(divided.validation),
            dropped_rows=divided.report.dropped,
            dropped=divided.report.status(),
            also_trained=_also_trained(divided, keys, sources, dataset, forms),
            truncated_rows=divided.report.truncated if dataset.overlong is Overlong.TRUNCATE else None,
            split_chats=divided.report.split_chats or None,
            split_rows=divided.report.split_rows or None,
            chunked_rows=divided.report.chunked if dataset.overlong is Overlong.CHUNK else None,
            ignored_keys=divided.report.ignored(),
            files=sum(len(source.files) for group in sources.values() for source in group),
            skipped_files=sum(sum(source.skipped.values()) for group in sources.values() for source in group) or None,
            sources=_read_sources(sources, cached),
            packed_sequences=None if packed is None else len(packed.lengths),
            tokens=int(lengths.sum()),
            shared_tokens=(packed.shared or None) if packed is not None else None,
            target_tokens=int(divided.sizes.targets[indices].sum()),
        ),
    )


def _fetch(dataset: api.Dataset, stores: Stores, work: Path) -> dict[str, list[Source]]:
    """Fetch the files by part of the data set: `train`, and `validation` if there is one.

    Raises:
        TrainerError: a file is missing, or its store cannot be read.
    """
    sources = {"train": fetch(dataset.train, stores, work / "data/train")}
    if dataset.validation:
        sources["validation"] = fetch(dataset.validation, stores, work / "data/validation", Part.VALIDATION)
    return sources


def _read_sources(sources: Mapping[str, list[Source]], cached: Cached) -> list[ReadSource]:
    """Return the value of `status.preflight.sources`."""
    read = [
        ReadSource(
            uri=shortened(source.uri),
            files=len(source.files),
            names=[shortened(file.name) for file in source.files[:EXAMPLES]],
            rows=rows,
            split=source.split and source.split[:128],
            skipped_splits=[name[:128] for name in sorted(source.skipped)[:_SHOWN_SPLITS]] or None,
        )
        for name, group in sources.items()
        for source, rows in zip(group, cached.counted[name].per_source, strict=True)
    ]
    return read[:_SHOWN_SOURCES]


def _content_digest(sources: Mapping[str, list[Source]]) -> str:
    """Return 64 hex digits of the content of all files."""
    digest = hashlib.sha256()
    for name, group in sources.items():
        digest.update(f"{name}\n".encode())
        add_content(group, digest)
    return digest.hexdigest()


def _token_key(
    dataset: api.Dataset,
    sources: Mapping[str, list[Source]],
    content: str,
    forms: Collection[RowForm],
    tokenizer: str,
) -> str:
    """Return the key under which the rows' tokens are cached: it covers everything that they depend on."""
    return key_of(
        {
            "encoding": [_ENCODING, version("transformers"), version("tokenizers")],
            "content": content,
            "files": {name: [len(source.files) for source in group] for name, group in sources.items()},
            "tokenizer": tokenizer,
            "forms": sorted(forms),
            "dataset": dataset.model_dump(mode="json", include=_TOKEN_FIELDS),
        }
    )


@dataclass(frozen=True)
class _Divided:
    """Tokenised rows, divided into those to train on and those held out.

    Args:
        rows: rows of the training files.
        sizes: keys, tokens and target tokens of each row of `rows`.
        chosen: indices in `rows` to train on, ascending.
        validation: rows held out.
        scored: keys and tokens of each row of validation files; None if the held-out rows are taken from `rows`.
        report: counts over all files.
    """

    rows: Dataset
    sizes: Sizes
    chosen: IntArray
    validation: Dataset
    scored: Sizes | None
    report: RowReport


def _divide(cached: Cached, dataset: api.Dataset, seed: int, context: int | None) -> _Divided:
    """Divide the tokenised rows into training and held-out rows.

    Raises:
        DatasetInvalidError: there are too few rows.
        InvalidSpecError: a row is longer than the base model's context.
    """
    counted, limit = cached.counted["train"], dataset.max_length
    counted.require("training rows", limit, minimum=1 if dataset.validation else 2)
    rows, sizes = open_rows(cached.path("train")), measure(cached.path("train"))
    chosen, out = held_out(sizes.keys, dataset, seed)
    _check_context(sizes.longest, context)
    if not dataset.validation:
        return _Divided(rows, sizes, chosen, _select(rows, out), None, counted.report)
    held = cached.counted["validation"]
    held.require("held-out rows", limit)
    validation, scored = open_rows(cached.path("validation")), measure(cached.path("validation"))
    _check_context(scored.longest, context)
    return _Divided(rows, sizes, chosen, validation, scored, counted.report.add(held.report))


def _epoch_indices(divided: _Divided, cached: Cached, dataset: api.Dataset, seed: int) -> IntArray:
    """Return the row indices of an epoch, each as often as the weight of its source specifies.

    Raises:
        DatasetInvalidError: no row is left.
    """
    weights = [source.weight for source in dataset.train]
    indices = weighted(divided.chosen, cached.counted["train"].per_source, weights, seed)
    if not len(indices):
        raise DatasetInvalidError("the weights of dataset.train leave no row to train on: raise them")
    return indices


def _also_trained(
    divided: _Divided,
    keys: IntArray,
    sources: Mapping[str, list[Source]],
    dataset: api.Dataset,
    forms: Collection[RowForm],
) -> list[AlsoTrained] | None:
    """Return the number of validation rows that are trained on too, with examples; None if there are none.

    Args:
        divided: tokenised rows.
        keys: keys of the rows that are trained on.
        sources: downloaded files.
        dataset: settings for reading them.
        forms: row forms that the objective can learn from.
    """
    if divided.scored is None:
        return None
    shared = divided.scored.keys[trained_too(divided.scored.keys, keys)]
    if not len(shared):
        return None
    examples = _first_locations(set(shared.tolist()), sources["validation"], dataset, forms)
    return [AlsoTrained(rows=len(shared), scored_rows=len(divided.validation), examples=examples)]


def _select(rows: Dataset, indices: IntArray) -> Dataset:
    """Return the rows at these indices; the fingerprint only keeps `datasets` from hashing them."""
    return rows.select(indices, new_fingerprint="selected")


def _first_locations(
    keys: Collection[int], sources: list[Source], dataset: api.Dataset, forms: Collection[RowForm]
) -> list[str]:
    """Read the files again to locate the first rows with these keys: the cache does not store locations."""
    found: dict[str, None] = {}
    for row in read(sources, dataset, RowReport(), forms=forms):
        if row.key in keys:
            found[row.where] = None
        if len(found) == EXAMPLES:
            break
    return [shortened(where) for where in found]


def require_weights(token: int, vocabulary: int) -> None:
    """Raise InvalidSpecError if the base model has no weights for a token."""
    if token >= vocabulary:
        raise InvalidSpecError(
            f"the base model's tokenizer turns rows into the token {token}, and the model has only"
            f" {vocabulary} tokens (vocab_size in config.json): tokens were added to the tokenizer only; use the"
            " tokenizer of the model, or enlarge the model's embedding on a machine of yours"
        )


def _check_context(longest: int, context: int | None) -> None:
    if context is not None and longest > context:
        raise InvalidSpecError(
            f"a row has {longest} tokens, more than the base model's context of {context}: set dataset.maxLength "
            f"to at most {context}, which drops such rows"
        )
