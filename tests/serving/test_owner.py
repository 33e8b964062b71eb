"""Which objects count as a pool's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.serving.render import deployment, deployment_name, is_owned_by, is_pod_of
from tunesmith.serving.settings import PoolSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.api.servingpool import ServingPool


@pytest.fixture
def made(pool: Callable[..., ServingPool]) -> dict[str, Any]:
    """A pod as the Deployment's controller makes it."""
    template = deployment(pool("base"), PoolSettings(store="s3://x", agent_image="a", engine_image="e"), 1)["spec"][
        "template"
    ]["metadata"]
    owner = {"kind": "ReplicaSet", "name": f"{deployment_name(pool('base'))}-abc12", "uid": "rs", "controller": True}
    return {
        "metadata": {
            "name": "p",
            "namespace": "team",
            "labels": {**template["labels"], "pod-template-hash": "abc12"},
            "ownerReferences": [owner],
        }
    }


def test_a_pod_of_the_pool(made: dict[str, Any], pool: Callable[..., ServingPool]) -> None:
    assert is_pod_of(pool("base"), made)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda pod: pod.update(namespace="other"), id="another namespace"),
        pytest.param(
            lambda pod: pod["labels"].update({"tunesmith.dev/pool-uid": "uid-other"}), id="another pool's uid"
        ),
        pytest.param(lambda pod: pod["labels"].pop("tunesmith.dev/pool-uid"), id="no uid"),
        pytest.param(lambda pod: pod["labels"].update({"tunesmith.dev/pool": "other"}), id="another pool's name"),
        pytest.param(lambda pod: pod.pop("ownerReferences"), id="no owner"),
        pytest.param(lambda pod: pod["ownerReferences"][0].pop("controller"), id="not its controller"),
        pytest.param(lambda pod: pod["ownerReferences"][0].update(kind="Job"), id="another kind of owner"),
        pytest.param(lambda pod: pod["ownerReferences"][0].update(name="other-abc12"), id="another ReplicaSet"),
    ],
)
def test_a_pod_that_only_resembles_one_of_the_pool(
    change: Callable[[dict[str, Any]], object], made: dict[str, Any], pool: Callable[..., ServingPool]
) -> None:
    change(made["metadata"])
    assert not is_pod_of(pool("base"), made)


def test_a_deployment_of_that_name_with_another_owner(pool: Callable[..., ServingPool]) -> None:
    item = deployment(pool("base"), PoolSettings(store="s3://x", agent_image="a", engine_image="e"), 1)
    assert is_owned_by(pool("base"), item)
    assert not is_owned_by(pool("base", namespace="other"), item)
    item["metadata"]["ownerReferences"][0]["uid"] = "uid-of-an-earlier-pool"
    assert not is_owned_by(pool("base"), item)
