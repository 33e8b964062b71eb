"""The rows of a job: fetched, checked, tokenised or found tokenised, divided, weighted and packed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.api.dataset import Overlong
from tunesmith.api.finetunejob_status import AlsoTrained, Preflight
from tunesmith_trainer.data.cache import TokenCache, key_of
from tunesmith_trainer.data.report import EXAMPLES, RowReport, shortened
from tunesmith_trainer.data.rows import read
from tunesmith_trainer.data.selection import held_out, trained_too, weighted
from tunesmith_trainer.data.sources import add_content, fetch
from tunesmith_trainer.data.tokens import measure, open_rows, pack, tokenise
from tunesmith_trainer.errors import DatasetInvalidError, InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from datasets import Dataset

    from tunesmith.api import dataset as api
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.data.encoding import Encoder
    from tunesmith_trainer.data.rows import RowForm
    from tunesmith_trainer.data.sources import Source
    from tunesmith_trainer.data.tokens import Counted
    from tunesmith_trainer.store import Stores

    IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]

_ENCODING = 2
"""Raised when the same rows give other tokens than before."""
_DECIDING = {"format", "columns", "chat_template", "loss_on", "max_length", "overlong", "unusable", "duplicates"}
"""Fields of the data set on which the tokens depend."""


@dataclass(frozen=True)
class Rows:
    """The tokenised rows of a job.

    Args:
        train: rows of an epoch, or sequences that they are packed into, which have `seq_lengths` too.
        validation: rows held out.
        lengths: tokens of each of `train`.
        keys: of the rows that are trained on, as `Row.key`.
        digest: `sha256:<64 hex>` of the content of all files.
        counted: what stands in `status.preflight` about them.
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
    store: Folder | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Rows:
    """The rows that a manifest names, ready to train on.

    Args:
        dataset: where they are, and how they are read.
        stores: opens the places.
        work: folder of this machine for downloads and tokens.
        encoder: turns rows into tokens.
        forms: what the objective can learn from.
        tokenizer: digest of the tokenizer, its chat template and its end tokens.
        seed: chooses the rows that are held out, and those that a weight takes.
        context: tokens that the base model can take; None where it does not say.
        store: keeps the tokens for the next attempt.
        say: tells a person how far it is.

    Raises:
        TrainerError: something is missing, refused or not usable.
    """
    sources = {"train": fetch(dataset.train, stores, work / "data/train")}
    if dataset.validation:
        sources["validation"] = fetch(dataset.validation, stores, work / "data/validation")
    digest = hashlib.sha256()
    for name, some in sources.items():
        digest.update(f"{name}\n".encode())
        add_content(some, digest)
    key = key_of(
        {
            "encoding": [_ENCODING, version("transformers"), version("tokenizers")],
            "content": digest.hexdigest(),
            "files": {name: [len(source.files) for source in some] for name, some in sources.items()},
            "tokenizer": tokenizer,
            "forms": sorted(forms),
            "dataset": dataset.model_dump(mode="json", include=_DECIDING),
        }
    )

    def make(folder: Path) -> dict[str, Counted]:
        return {
            name: tokenise(some, dataset, forms, encoder, folder / f"{name}.arrow", say)
            for name, some in sources.items()
        }

    cached = TokenCache(work / "tokens", store).get(key, make)
    counted = cached.counted["train"]
    limit = dataset.max_length
    counted.require("training rows", limit, least=1 if dataset.validation else 2)
    report = counted.report
    rows = open_rows(cached.path("train"))
    sizes = measure(cached.path("train"))
    chosen, out = held_out(sizes.keys, dataset, seed)
    _check_context(sizes.longest, context)
    if dataset.validation:
        cached.counted["validation"].require("held-out rows", limit)
        validation = open_rows(cached.path("validation"))
        scored = measure(cached.path("validation"))
        _check_context(scored.longest, context)
        report = report.add(cached.counted["validation"].report)
    else:
        scored = None
        validation = _at(rows, out)
    places = weighted(chosen, counted.per_source, [source.weight for source in dataset.train], seed)
    if not len(places):
        raise DatasetInvalidError("the weights of dataset.train leave no row to train on: raise them")
    train, lengths = _at(rows, places), sizes.lengths[places]
    packed = None
    if dataset.packing:
        packed = pack(cached.path("train"), places, lengths, limit, work / "packed.arrow")
        train = open_rows(work / "packed.arrow")
    keys = sizes.keys[np.unique(places)]
    shared = scored.keys[trained_too(scored.keys, keys)] if scored is not None else keys[:0]
    also_trained = None
    if len(shared):
        examples = _first_of(set(shared.tolist()), sources["validation"], dataset, forms)
        also_trained = [AlsoTrained(rows=len(shared), scored_rows=len(validation), examples=examples)]
    return Rows(
        train=train,
        validation=validation,
        lengths=lengths if packed is None else packed,
        keys=keys,
        digest=f"sha256:{digest.hexdigest()}",
        counted=Preflight(
            rows=len(places),
            validation_rows=len(validation),
            dropped_rows=report.dropped,
            dropped=report.status(),
            also_trained=also_trained,
            truncated_rows=report.truncated if dataset.overlong is Overlong.TRUNCATE else None,
            packed_sequences=None if packed is None else len(packed),
            tokens=int(lengths.sum()),
            target_tokens=int(sizes.targets[places].sum()),
        ),
    )


def _at(rows: Dataset, places: IntArray) -> Dataset:
    """The rows at places; the name only tells `datasets` not to hash them."""
    return rows.select(places, new_fingerprint="selected")


def _first_of(
    keys: Collection[int], sources: list[Source], dataset: api.Dataset, forms: Collection[RowForm]
) -> list[str]:
    """Where the first rows of some keys stand, read again: what the tokens are kept with does not say it."""
    found: dict[str, None] = {}
    for row in read(sources, dataset, RowReport(), forms=forms):
        if row.key in keys:
            found[row.where] = None
        if len(found) == EXAMPLES:
            break
    return [shortened(where) for where in found]


def _check_context(longest: int, context: int | None) -> None:
    if context is not None and longest > context:
        raise InvalidSpecError(
            f"a row has {longest} tokens and the base model's context has {context}: set dataset.maxLength "
            f"to at most {context}, which drops such rows"
        )
