"""Stores that uris name: the table of schemes, credentials, and access to folders."""
