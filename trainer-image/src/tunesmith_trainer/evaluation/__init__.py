"""Scores of base and adapter, taken in the same run, and the gates over them."""
