"""Methods that train the embeddings of a few tokens: find the tokens, and check that training rows contain them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig

_READ_ROWS = 1000


def check_tokens(config: PeftConfig | None, rows: Dataset) -> None:
    """Raise unless every token to be trained is in a row: the embedding of any other would never be learned.

    Args:
        config: PEFT's configuration of the adapter; None if all weights are trained.
        rows: tokenised training rows.

    Raises:
        InvalidSpecError: some tokens are in no row; names them.
    """
    name, trained = _trained_tokens(config)
    missing = set(trained)
    for part in rows.select_columns("input_ids").with_format("arrow").iter(_READ_ROWS) if missing else ():
        missing -= set(np.unique(part["input_ids"].combine_chunks().flatten().to_numpy()).tolist())
        if not missing:
            return
    if missing:
        raise InvalidSpecError(
            f"method.peft.config.{name} has {', '.join(str(token) for token in sorted(missing))}, which no "
            "training row contains: remove these token ids, or add rows that contain them"
        )


def _trained_tokens(config: PeftConfig | None) -> tuple[str, list[int]]:
    """Return the name of the setting and the token ids; empty if the method trains no tokens."""
    for name in ("token_indices", "trainable_token_indices"):
        given = getattr(config, name, None)
        if given:
            lists = given.values() if isinstance(given, dict) else [given]
            return name, [token for ids in lists for token in ids]
    return "", []
