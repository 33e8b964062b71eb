"""Modules that run inside vLLM; the agent copies them next to it."""
