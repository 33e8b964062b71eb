"""Tunesmith: trains adapters from FineTuneJob manifests and serves them by AdapterDeployment manifests."""
