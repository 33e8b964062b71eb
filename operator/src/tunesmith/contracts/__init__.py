"""Formats and rules shared by processes: progress, results, artifacts, the agent protocol, fingerprints, locations."""
