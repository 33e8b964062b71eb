from __future__ import annotations

import random
from itertools import permutations
from typing import Any

import pytest

from gateway_rig import adapter_manifest, pool_manifest
from tunesmith.contracts.apikey import ApiKey, key_digest
from tunesmith.gateway.catalog import Catalog
from tunesmith.gateway.errors import ApiError
from tunesmith.gateway.keys import KeyTable

KEY = ApiKey(name="k", digest=b"", home="team", namespaces=frozenset({"team"}), models=None)


@pytest.fixture
def catalog() -> Catalog:
    return Catalog({"platform"})


def put(catalog: Catalog, *documents: dict[str, Any]) -> None:
    for document in documents:
        if document["kind"] == "ServingPool":
            catalog.put_pool(document)
        else:
            catalog.put_adapter(document)


def test_a_foreign_pool_that_is_open_to_all_claims_no_bare_name(catalog: Catalog) -> None:
    put(catalog, pool_manifest("trap", "attacker", model="gpt"))
    with pytest.raises(ApiError, match="gpt"):
        catalog.resolve("gpt", KEY)
    assert catalog.resolve("attacker/gpt", KEY).id == "attacker/gpt", "its id still names it"
    put(catalog, pool_manifest("small", "platform", model="gpt"))
    assert catalog.resolve("gpt", KEY).id == "platform/gpt"
    put(catalog, adapter_manifest("gpt"))
    assert catalog.resolve("gpt", KEY).id == "team/gpt", "the home namespace comes first"


def test_a_shared_pool_that_is_not_open_has_no_bare_name(catalog: Catalog) -> None:
    put(catalog, pool_manifest("small", "platform", model="gpt", open_to="Same"))
    with pytest.raises(ApiError):
        catalog.resolve("gpt", KEY)


def test_a_base_is_callable_from_namespaces_whose_labels_match(catalog: Catalog) -> None:
    base = pool_manifest("small", "platform", model="gpt", open_to="Selector")
    base["spec"]["allowedNamespaces"]["selector"] = {"matchLabels": {"tier": "paid"}}
    put(catalog, base)
    for name in ("gpt", "platform/gpt"):
        with pytest.raises(ApiError):
            catalog.resolve(name, KEY)
    assert catalog.visible(KEY) == []
    catalog.put_namespace({"kind": "Namespace", "metadata": {"name": "team", "labels": {"tier": "paid"}}})
    assert [catalog.resolve(name, KEY).id for name in ("gpt", "platform/gpt")] == ["platform/gpt"] * 2
    assert [model.id for model in catalog.visible(KEY)] == ["platform/gpt"]
    catalog.put_namespace({"kind": "Namespace", "metadata": {"name": "team"}})
    assert catalog.visible(KEY) == []
    catalog.put_namespace({"kind": "Namespace", "metadata": {"name": "team", "labels": {"tier": "paid"}}})
    catalog.remove_namespace({"kind": "Namespace", "metadata": {"name": "team"}})
    with pytest.raises(ApiError):
        catalog.resolve("platform/gpt", KEY)


def test_the_older_claim_wins_in_any_order_and_the_next_follows_it() -> None:
    old = adapter_manifest("b", model="pirate", digests=("a",), created="2026-01-02T00:00:00Z")
    same = adapter_manifest("c", model="pirate", digests=("b",), created="2026-01-02T00:00:00Z")
    base = pool_manifest("pirate", "team", model="pirate")
    base["metadata"]["creationTimestamp"] = "2026-01-03T00:00:00Z"
    for order in permutations([old, same, base]):
        catalog = Catalog()
        put(catalog, *order)
        assert catalog.resolve("pirate", KEY).engine_names == ("team/pirate@aaaaaaaaaaaa",), "the first by its UID"
        catalog.remove_adapter(old)
        assert catalog.resolve("pirate", KEY).engine_names == ("team/pirate@bbbbbbbbbbbb",)
        catalog.remove_adapter(same)
        assert catalog.resolve("pirate", KEY).is_base
        catalog.remove_pool(base)
        with pytest.raises(ApiError):
            catalog.resolve("pirate", KEY)
        assert catalog.visible(KEY) == []


def test_an_adapter_that_changes_its_name_leaves_the_old_one(catalog: Catalog) -> None:
    put(catalog, adapter_manifest("a", model="pirate"))
    put(catalog, adapter_manifest("a", model="sailor"))
    assert [model.id for model in catalog.visible(KEY)] == ["team/sailor"]


def test_what_does_not_fit_the_schema_is_forgotten(catalog: Catalog) -> None:
    put(catalog, adapter_manifest("a"), pool_manifest("small", "platform", model="gpt"))
    with pytest.raises(ValueError, match="spec"):
        catalog.put_adapter({**adapter_manifest("a"), "spec": {}})
    with pytest.raises(ValueError, match="spec"):
        catalog.put_pool({**pool_manifest("small", "platform"), "spec": {}})
    assert catalog.visible(KEY) == []


def test_random_changes_leave_the_indexes_as_a_fresh_catalog_has_them() -> None:
    numbers = random.Random(7)  # noqa: S311 - repeatable, no secret
    changed, objects = Catalog({"platform"}), dict[tuple[str, str, str], dict[str, Any]]()
    for _ in range(2000):
        namespace, name = numbers.choice(["team", "platform"]), f"n{numbers.randrange(12)}"
        model, created = f"m{numbers.randrange(6)}", f"2026-01-0{numbers.randrange(1, 5)}T00:00:00Z"
        if numbers.random() < 0.5:
            document = adapter_manifest(name, namespace, model=model, created=created)
        else:
            document = pool_manifest(name, namespace, model=model, open_to=numbers.choice(["All", "Same"]))
            document["metadata"]["creationTimestamp"] = created
        place = (document["kind"], namespace, name)
        if numbers.random() < 0.3:
            objects.pop(place, None)
            remove = changed.remove_pool if document["kind"] == "ServingPool" else changed.remove_adapter
            remove(document)
        else:
            objects[place] = document
            put(changed, document)
    fresh = Catalog({"platform"})
    put(fresh, *objects.values())
    for index in ("_models", "_by_namespace", "_open", "_shared"):
        assert getattr(changed, index) == getattr(fresh, index)


def test_a_change_among_many_touches_no_other_object(catalog: Catalog) -> None:
    keys = KeyTable()
    for number in range(300):
        put(catalog, adapter_manifest(f"a{number}"))
        keys.put(f"s{number}", ApiKey("k", key_digest(f"key-{number}"), "team", frozenset(), None))
    walks: list[str] = []

    class Counting(dict[str, Any]):
        def __iter__(self) -> Any:
            walks.append("keys")
            return super().__iter__()

        def values(self) -> Any:
            walks.append("values")
            return super().values()

        def items(self) -> Any:
            walks.append("items")
            return super().items()

    catalog._models, catalog._claims = Counting(catalog._models), Counting(catalog._claims)
    keys._by_record = Counting(keys._by_record)
    walks.clear()
    put(catalog, adapter_manifest("a5"))
    catalog.remove_adapter(adapter_manifest("a6"))
    keys.put("s5", ApiKey("k", key_digest("new"), "team", frozenset(), None))
    keys.remove("s6")
    assert keys.find("key-5") is None
    assert keys.find("key-6") is None
    assert keys.find("new") is not None
    assert catalog.resolve("a5", KEY).id == "team/a5"
    assert walks == []
