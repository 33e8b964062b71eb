from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.contracts.claims import claim_of, lost_to, owner

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.servingpool import ServingPool


def test_the_older_of_two_adapters_holds_the_name(adapter: Callable[..., AdapterDeployment]) -> None:
    old, young = adapter("old", age=60, modelName="pirate"), adapter("young", modelName="pirate")
    claims = [claim_of(young), claim_of(old)]
    assert lost_to(old, claims) is None
    taken = lost_to(young, claims)
    assert taken is not None
    assert taken.holder == "AdapterDeployment team/old"


def test_of_two_of_one_age_the_uid_decides(adapter: Callable[..., AdapterDeployment]) -> None:
    claims = [claim_of(adapter("b", modelName="pirate")), claim_of(adapter("a", modelName="pirate"))]
    first = owner("team/pirate", claims)
    assert first is not None
    assert first.uid == "uid-a"


def test_a_claim_without_a_creation_time_comes_last(adapter: Callable[..., AdapterDeployment]) -> None:
    known, unknown = adapter("known", modelName="pirate"), adapter("a-unknown", modelName="pirate")
    unknown.metadata.creation_timestamp = None
    claims = [claim_of(unknown), claim_of(known)]
    assert lost_to(known, claims) is None
    assert lost_to(unknown, claims) == claim_of(known)
    assert owner("team/pirate", claims[:1]) == claim_of(unknown)


def test_a_base_and_an_adapter_share_the_names(
    adapter: Callable[..., AdapterDeployment], pool: Callable[..., ServingPool]
) -> None:
    base, late, early = (
        pool("base", age=30),
        adapter("late", modelName="smol"),
        adapter("early", age=60, modelName="smol"),
    )
    assert lost_to(late, [claim_of(base), claim_of(late)]) == claim_of(base)
    assert lost_to(base, [claim_of(base), claim_of(early)]) == claim_of(early)


def test_the_same_name_in_two_namespaces_is_no_conflict(adapter: Callable[..., AdapterDeployment]) -> None:
    here, there = adapter("here", modelName="pirate"), adapter("there", namespace="other", age=60, modelName="pirate")
    assert lost_to(here, [claim_of(here), claim_of(there)]) is None
