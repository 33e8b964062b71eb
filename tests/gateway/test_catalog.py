from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations
from typing import Any, cast

import pytest

from tests.gateway.gateway_rig import adapter_manifest, pool_manifest
from tunesmith.contracts.apikey import ApiKey, key_digest, key_record
from tunesmith.contracts.labels import POOL_LABEL, POOL_UID_LABEL
from tunesmith.gateway.catalog import Catalog
from tunesmith.gateway.errors import ApiError
from tunesmith.gateway.feed import Feed
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


def test_an_open_pool_outside_the_shared_namespaces_has_no_bare_name(catalog: Catalog) -> None:
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


def test_an_object_that_no_longer_fits_the_schema_is_removed(catalog: Catalog) -> None:
    put(catalog, adapter_manifest("a"), pool_manifest("small", "platform", model="gpt"))
    with pytest.raises(ValueError, match="spec"):
        catalog.put_adapter({**adapter_manifest("a"), "spec": {}})
    with pytest.raises(ValueError, match="spec"):
        catalog.put_pool({**pool_manifest("small", "platform"), "spec": {}})
    assert catalog.visible(KEY) == []


def _random_document(numbers: random.Random) -> dict[str, Any]:
    namespace, name = numbers.choice(["team", "platform"]), f"n{numbers.randrange(12)}"
    model = f"m{numbers.randrange(6)}"
    kind = numbers.choice(["AdapterDeployment", "AdapterDeployment", "ServingPool", "Pod"])
    if kind == "Pod":
        uid = numbers.choice([f"uid-pool-{namespace}-{name}", "uid-of-another"])
        labels = {POOL_LABEL: name, POOL_UID_LABEL: uid}
        metadata = {"name": f"p{numbers.randrange(4)}", "namespace": namespace, "uid": "u", "labels": labels}
        address = numbers.choice([{}, {"podIP": "10.0.0.1"}, {"podIP": "10.0.0.2", "phase": "Failed"}])
        return {"kind": "Pod", "metadata": metadata, "status": address}
    if kind == "ServingPool":
        document = pool_manifest(name, namespace, model=model, open_to=numbers.choice(["All", "Same"]))
        document["metadata"]["uid"] = f"uid-pool-{namespace}-{name}"
    else:
        document = adapter_manifest(name, namespace, model=model, digests=numbers.choice([(), ("a",), ("b", "a")]))
    document["metadata"]["creationTimestamp"] = numbers.choice([None, "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"])
    if numbers.random() < 0.1:
        document["spec"] = {"modelName": 7}
    return document


@pytest.mark.parametrize("seed", range(8))
def test_after_any_changes_the_catalog_equals_one_read_from_scratch(seed: int) -> None:
    numbers = random.Random(seed)  # noqa: S311 - repeatable, no secret
    catalog = Catalog({"platform"})
    feed = _feed(KeyTable(), catalog)
    objects: dict[tuple[str, str, str], dict[str, Any]] = {}
    for step in range(600):
        document = _random_document(numbers)
        place = (document["kind"], document["metadata"]["namespace"], document["metadata"]["name"])
        if numbers.random() < 0.3:
            objects.pop(place, None)
            feed.apply(document["kind"], "DELETED", document)
        else:
            objects[place] = document
            feed.apply(document["kind"], "MODIFIED", document)
        if step % 50 == 0:
            _assert_equal(catalog, objects, numbers)
    _assert_equal(catalog, objects, numbers)


def _assert_equal(catalog: Catalog, objects: dict[Any, dict[str, Any]], numbers: random.Random) -> None:
    fresh = Catalog({"platform"})
    feed = _feed(KeyTable(), fresh)
    for document in numbers.sample(list(objects.values()), len(objects)):
        feed.apply(document["kind"], "ADDED", document)
    for index in ("_models", "_by_namespace", "_open", "_shared", "_claims", "_claimed"):
        assert getattr(catalog, index) == getattr(fresh, index), index
    assert sorted(catalog.pods(), key=str) == sorted(fresh.pods(), key=str)
    keys = [replace(KEY, home=home, namespaces=frozenset({home})) for home in ("team", "platform", "other")]
    for key in keys:
        assert catalog.visible(key) == fresh.visible(key)
        for name in ("m1", "team/m2", "platform/m3", "n1"):
            assert _answer(catalog, name, key) == _answer(fresh, name, key)


def _answer(catalog: Catalog, name: str, key: ApiKey) -> object:
    try:
        return catalog.resolve(name, key)
    except ApiError as error:
        return error.status, error.message


@pytest.mark.parametrize("seed", range(8))
def test_after_any_changes_the_key_table_equals_one_read_from_scratch(seed: int) -> None:
    numbers = random.Random(seed)  # noqa: S311 - repeatable, no secret
    table, records = KeyTable(), dict[str, dict[str, Any]]()
    feed = _feed(table, Catalog())
    for _ in range(600):
        # Names share keys, and some records cannot be read: those are as good as gone.
        name, key = f"k{numbers.randrange(12)}", f"sk-ts-{numbers.randrange(6)}"
        record = key_record(name, "system", key, home="team", namespaces=["team"], models=["*"])
        if numbers.random() < 0.1:
            record["data"]["hash"] = "no digest"
        deleted = numbers.random() < 0.3
        feed.apply("ConfigMap", "DELETED" if deleted else "MODIFIED", record)
        if deleted:
            records.pop(name, None)
        else:
            records[name] = record
    fresh = KeyTable()
    feed = _feed(fresh, Catalog())
    for record in numbers.sample(list(records.values()), len(records)):
        feed.apply("ConfigMap", "ADDED", record)
    assert (table._by_record, table._by_prefix) == (fresh._by_record, fresh._by_prefix)
    for number in range(7):
        found, again = table.find(f"sk-ts-{number}"), fresh.find(f"sk-ts-{number}")
        assert (found is None) == (again is None)
        assert found is None or found.digest == again.digest


def _feed(keys: KeyTable, catalog: Catalog) -> Feed:
    """A feed that nothing but the test fills."""
    feed = Feed(cast("Any", None), "system", keys=keys, catalog=catalog, changed=lambda: None)
    feed._change_pending = True  # there is no event loop, and nobody to report changes to
    return feed


def test_a_change_reads_no_other_object(catalog: Catalog) -> None:
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
