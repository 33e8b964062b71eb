"""Names of environment variables, entries of Secrets and files by which the operator hands values to pods."""

from __future__ import annotations

from pathlib import PurePosixPath

ALLOWED_ADDRESSES = "TUNESMITH_ALLOWED_ADDRESSES"
"""Variable of the pods of jobs and pools: the networks that the platform lists."""
LM_EVAL_TASKS = "TUNESMITH_LM_EVAL_TASKS"
"""Variable of training pods: a folder of tasks for lm-evaluation-harness. Functions in it are run, so only the platform
may set it: the operator sets it in every pod, to an empty text if there is none."""
WORK_FOLDER = "TUNESMITH_WORK"
"""Variable of the trainer's image: the folder for downloads and temporary files."""
POD_UID = "TUNESMITH_POD_UID"
"""Variable of the agent and the engine: UID of their pod, from which its tokens are derived."""
SERVING_KEY_FILE = "TUNESMITH_SERVING_KEY_FILE"
"""Variable of the engine, as the next two: the file with the pool's serving keys."""
ADMIN_TOKEN_FILE = "TUNESMITH_ADMIN_TOKEN_FILE"  # noqa: S105 - a variable's name
REQUESTS = "TUNESMITH_REQUESTS"
"""The pool's `spec.requests`, as JSON."""

CONTROL_KEY, EVENTS_KEY, SERVING_KEY, METRICS_DIGEST = "control", "events", "serving", "metrics"
"""Entries of a pool's Secret, and names of their files. The engine's container gets `serving` only."""
AGENT_KEYS_FOLDER = PurePosixPath("/etc/tunesmith/agent")
"""Where the agent's container has the other entries."""
AGENT_STATE_FOLDER = PurePosixPath("/var/run/tunesmith")
"""Folder that the agent shares with the engine."""
ADMIN_TOKEN = "admin-token"  # noqa: S105 - a file's name
"""File of that folder: the token with which the agent reaches the engine's admin routes."""
