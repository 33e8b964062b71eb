from __future__ import annotations

from typing import Any

import pytest

from tunesmith.finetune.quota import quota_shortage

Object = dict[str, Any]
POD = {
    "priorityClassName": "low",
    "containers": [
        {
            "resources": {
                "requests": {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "1"},
                "limits": {"memory": "8Gi", "nvidia.com/gpu": "1"},
            }
        }
    ],
}


def quota(hard: dict[str, str], used: dict[str, str] | None = None, **spec: Any) -> Object:
    return {"metadata": {"name": "team"}, "spec": {"hard": hard, **spec}, "status": {"hard": hard, "used": used or {}}}


def priority(operator: str, *values: str) -> Object:
    return {"matchExpressions": [{"scopeName": "PriorityClass", "operator": operator, "values": list(values)}]}


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ([], ""),
        ([quota({"pods": "3"}, {"pods": "2"})], ""),
        ([quota({"pods": "3"}, {"pods": "3"})], "ResourceQuota team allows 3 of pods, 3 are used, and a pod needs 1:"),
        ([quota({"count/pods": "0"})], "allows 0 of count/pods, 0 are used"),
        ([quota({"requests.nvidia.com/gpu": "0"})], "allows 0 of requests.nvidia.com/gpu, 0 are used"),
        ([quota({"requests.memory": "10Gi"}, {"requests.memory": "4Gi"})], "allows 10Gi of requests.memory, 4Gi are"),
        ([quota({"memory": "16Gi"}, {"memory": "8Gi"})], ""),
        ([quota({"limits.cpu": "9"})], "needs limits.cpu on every container, which this pod does not set: add a Limit"),
        ([quota({"requests.ephemeral-storage": "0"})], ""),
        ([quota({"count/jobs.batch": "0"})], ""),
        ([quota({"pods": "5"}), quota({"pods": "0"})], "allows 0 of pods"),
        ([quota({"pods": "0"}, scopes=["BestEffort"])], ""),
        ([quota({"pods": "0"}, scopes=["NotBestEffort", "NotTerminating"])], "allows 0 of pods"),
        ([quota({"pods": "0"}, scopes=["Terminating"])], ""),
        ([quota({"pods": "0"}, scopeSelector=priority("In", "low", "idle"))], "allows 0 of pods"),
        ([quota({"pods": "0"}, scopeSelector=priority("In", "high"))], ""),
        ([quota({"pods": "0"}, scopeSelector=priority("NotIn", "high"))], "allows 0 of pods"),
        ([quota({"pods": "0"}, scopeSelector=priority("Exists"))], "allows 0 of pods"),
        ([quota({"pods": "0"}, scopeSelector=priority("DoesNotExist"))], ""),
        ([{"metadata": {"name": "new"}, "spec": {"hard": {"pods": "0"}}}], ""),
    ],
)
def test_the_message_names_the_quota_without_room(quotas: list[Object], expected: str) -> None:
    found = quota_shortage(POD, quotas)
    assert expected in found
    assert bool(found) is bool(expected)
