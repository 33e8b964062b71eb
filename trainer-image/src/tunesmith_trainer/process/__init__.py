"""The trainer as an operating system process: ranks, signals, progress, result."""
