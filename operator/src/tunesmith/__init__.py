"""Tunesmith: FineTuneJob manifests become trained adapters, AdapterDeployment manifests become endpoints."""
