"""Rows of a data set: found, read, checked, rendered with the chat template, tokenised, packed."""

from tunesmith_trainer.data.encoding import IGNORED, Encoder, Tokens
from tunesmith_trainer.data.forms import RowForm
from tunesmith_trainer.data.rows import Row

__all__ = ["IGNORED", "Encoder", "Row", "RowForm", "Tokens"]
