"""Decisions about a FineTuneJob: observe, plan, render, status. Pure: no I/O."""
