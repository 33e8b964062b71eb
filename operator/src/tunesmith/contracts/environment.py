"""Names of environment variables, Secret entries and files through which the operator passes values to pods."""

from __future__ import annotations

from pathlib import PurePosixPath

ALLOWED_ADDRESSES = "TUNESMITH_ALLOWED_ADDRESSES"
"""Variable of the pods of jobs and pools: networks that the platform allows."""
LM_EVAL_TASKS = "TUNESMITH_LM_EVAL_TASKS"
"""Variable of training pods: a folder of tasks for lm-evaluation-harness. Functions in it are executed, so only the
platform may set it: the operator sets it in every pod, to an empty text if there is no folder."""
WORK_FOLDER = "TUNESMITH_WORK"
"""Variable of the trainer's image: the folder for downloads and temporary files."""
POD_UID = "TUNESMITH_POD_UID"
"""Variable of the agent and the engine: UID of their pod, from which its tokens are derived."""
SERVING_KEY_FILE = "TUNESMITH_SERVING_KEY_FILE"
"""Variable of the engine, as are the next three: the file with the pool's serving keys."""
ADMIN_TOKEN_FILE = "TUNESMITH_ADMIN_TOKEN_FILE"  # noqa: S105 - a variable's name
REQUESTS = "TUNESMITH_REQUESTS"
"""The pool's `spec.requests`, as JSON."""
ADAPTER_MEMORY = "TUNESMITH_ADAPTER_MEMORY"
"""Highest number of bytes of the engine's cache of adapters in main memory."""
AGENT_URL = "TUNESMITH_AGENT_URL"
"""URL of the agent, to which the engine's supervisor reports exits."""

CONTROL_KEY, EVENTS_KEY, SERVING_KEY, METRICS_DIGEST = "control", "events", "serving", "metrics"
"""Entries of a pool's Secret, and names of their files. The engine's container gets only `serving`."""
AGENT_KEYS_FOLDER = PurePosixPath("/etc/tunesmith/agent")
"""Mount path of the other entries in the agent's container."""
AGENT_STATE_FOLDER = PurePosixPath("/var/run/tunesmith")
"""Folder that the agent shares with the engine."""
ADMIN_TOKEN = "admin-token"  # noqa: S105 - a file's name
"""File in AGENT_STATE_FOLDER: the token with which the agent calls the engine's admin routes."""
