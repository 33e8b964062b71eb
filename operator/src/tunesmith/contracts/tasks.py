"""Where the platform's own evaluation tasks are, told to training pods by the operator."""

LM_EVAL_TASKS = "TUNESMITH_LM_EVAL_TASKS"
"""Environment variable with a folder of tasks for lm-evaluation-harness. Functions in it are run, so that only the
platform may set it; the operator sets it in every pod, empty where there is none."""
