"""The `tunesmith` command."""
