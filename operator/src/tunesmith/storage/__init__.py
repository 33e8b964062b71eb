"""Stores that uris name: the table of their schemes, credentials, and reading and writing their folders."""
