"""`owner.json` in a folder of the store: identifies its FineTuneJob or AdapterDeployment after that is deleted."""

from __future__ import annotations

from tunesmith.api.model import StatusModel

OWNER_FILE = "owner.json"


class Owner(StatusModel):
    """Owner of the folder, written first. Clusters that share a store may have resources of one name."""

    cluster: str
    """UID of the cluster's namespace kube-system."""
    namespace: str
    name: str
    uid: str
    """UID of the FineTuneJob, or of the AdapterDeployment whose adapter was imported."""
