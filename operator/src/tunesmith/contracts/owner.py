"""`owner.json` in a FineTuneJob's folder of the store: identifies the owner after the FineTuneJob is deleted."""

from __future__ import annotations

from tunesmith.api.model import StatusModel

OWNER_FILE = "owner.json"


class Owner(StatusModel):
    """Owner of the folder, written by the validation. Clusters that share a store may have FineTuneJobs of one name."""

    cluster: str
    """UID of the cluster's namespace kube-system."""
    namespace: str
    name: str
    uid: str
    """UID of the FineTuneJob."""
