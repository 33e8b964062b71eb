"""`owner.json` in a FineTuneJob's folder of the store: whose it is, once the FineTuneJob is gone."""

from __future__ import annotations

from tunesmith.api.model import StatusModel

OWNER_FILE = "owner.json"


class Owner(StatusModel):
    """Written by the validation. Several clusters may share a store, and their FineTuneJobs may share names."""

    cluster: str
    """Uid of the cluster's namespace kube-system."""
    namespace: str
    name: str
    uid: str
    """Of the FineTuneJob."""
