"""What crosses a process boundary: progress, results, artifacts, the agent protocol, fingerprints, locations."""
