"""Checks, counts and decisions before training, without weights."""
