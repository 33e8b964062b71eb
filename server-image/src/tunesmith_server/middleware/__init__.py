"""Modules that run inside vLLM; the agent copies them to a folder that the engine's container mounts."""
