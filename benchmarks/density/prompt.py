"""Prompt of the benchmark, and the size of a marker; for several environments."""

PROMPT = [11, 503, 1207, 64, 907, 330, 1999, 1024, 77, 18, 640, 1500]
TOKENS = 8
"""Number of tokens of a marker: an adapter's greedy continuation of the prompt."""
