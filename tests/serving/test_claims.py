from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.contracts.claims import model_name_claim, older_claim, winner

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.servingpool import ServingPool


def test_the_older_of_two_adapters_holds_the_name(adapter: Callable[..., AdapterDeployment]) -> None:
    old, young = adapter("old", age=60, modelName="pirate"), adapter("young", modelName="pirate")
    claims = [model_name_claim(young), model_name_claim(old)]
    assert older_claim(old, claims) is None
    taken = older_claim(young, claims)
    assert taken is not None
    assert taken.holder == "AdapterDeployment team/old"


def test_the_uid_decides_between_claims_of_equal_age(adapter: Callable[..., AdapterDeployment]) -> None:
    claims = [model_name_claim(adapter("b", modelName="pirate")), model_name_claim(adapter("a", modelName="pirate"))]
    first = winner("team/pirate", claims)
    assert first is not None
    assert first.uid == "uid-a"


def test_a_claim_without_a_creation_time_comes_last(adapter: Callable[..., AdapterDeployment]) -> None:
    known, unknown = adapter("known", modelName="pirate"), adapter("a-unknown", modelName="pirate")
    unknown.metadata.creation_timestamp = None
    claims = [model_name_claim(unknown), model_name_claim(known)]
    assert older_claim(known, claims) is None
    assert older_claim(unknown, claims) == model_name_claim(known)
    assert winner("team/pirate", claims[:1]) == model_name_claim(unknown)


def test_a_base_and_an_adapter_share_the_names(
    adapter: Callable[..., AdapterDeployment], pool: Callable[..., ServingPool]
) -> None:
    base, late, early = (
        pool("base", age=30),
        adapter("late", modelName="smol"),
        adapter("early", age=60, modelName="smol"),
    )
    assert older_claim(late, [model_name_claim(base), model_name_claim(late)]) == model_name_claim(base)
    assert older_claim(base, [model_name_claim(base), model_name_claim(early)]) == model_name_claim(early)


def test_the_same_name_in_two_namespaces_does_not_conflict(adapter: Callable[..., AdapterDeployment]) -> None:
    here, there = adapter("here", modelName="pirate"), adapter("there", namespace="other", age=60, modelName="pirate")
    assert older_claim(here, [model_name_claim(here), model_name_claim(there)]) is None
