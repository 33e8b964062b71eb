"""What exists: models by id, their pools and the pools' pods, as the API server tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.api.adapterdeployment import AdapterDeployment, RevisionState
from tunesmith.api.conditions import AdapterDeploymentCondition, AdapterDeploymentReason, find
from tunesmith.api.servingpool import ServingPool
from tunesmith.gateway import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tunesmith.contracts.apikey import ApiKey

POOL_LABEL = "tunesmith.dev/pool"
POOL_UID_LABEL = "tunesmith.dev/pool-uid"

PoolKey = tuple[str, str]
"""Namespace and name of a ServingPool."""


@dataclass(frozen=True, slots=True)
class Model:
    """Something that can be called.

    Attributes:
        id: the global id, `<namespace>/<modelName>`.
        pool: the pool that serves it; None: not decided yet.
        engine_names: names in the engine, newest first; a base has one, its id.
        is_base: the pool's own model, not an adapter.
        open_to_all: callable from every namespace (a base whose pool allows all).
        created: seconds since 1970.
        not_ready: why there is nothing to call yet; None: it is, or is about to be, on a pod.
        deployed: False for a revision that the AdapterDeployment does not list (any more).
    """

    id: str
    namespace: str
    pool: PoolKey | None
    engine_names: tuple[str, ...]
    is_base: bool
    open_to_all: bool
    created: int
    not_ready: str | None = None
    deployed: bool = True

    @property
    def bare_name(self) -> str:
        """The name without its namespace."""
        return self.id.partition("/")[2]

    def visible_to(self, key: ApiKey) -> bool:
        """Whether the key may know that the model exists."""
        return self.open_to_all or self.namespace in key.namespaces


@dataclass(frozen=True, slots=True)
class Pool:
    """A ServingPool."""

    key: PoolKey
    uid: str


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of a pool that can be talked to. `ready`: the API server says so and it is not being deleted."""

    uid: str
    name: str
    address: str
    pool: Pool
    ready: bool


@dataclass(frozen=True, slots=True)
class _Claim:
    """A resource that claims a global id."""

    created: str
    uid: str
    model: Model


class Catalog:
    """The objects seen so far, by kind. Reading it costs a dictionary look-up; the indexes follow each change."""

    def __init__(self) -> None:
        self._adapters: dict[tuple[str, str], _Claim] = {}
        self._bases: dict[PoolKey, _Claim] = {}
        self._pools: dict[PoolKey, Pool] = {}
        self._pods: dict[tuple[str, str], dict[str, Any]] = {}
        self._models: dict[str, Model] = {}

    def put_adapter(self, document: Mapping[str, Any]) -> None:
        """Add or replace an AdapterDeployment.

        Raises:
            ValueError: it does not fit the schema; what was known of it is forgotten.
        """
        key = _key_of(document)
        self._adapters.pop(key, None)
        try:
            model = _adapter_model(AdapterDeployment.model_validate(document))
            if model is not None:
                self._adapters[key] = _claim(document, model)
        finally:
            self._index()

    def remove_adapter(self, document: Mapping[str, Any]) -> None:
        """Forget an AdapterDeployment."""
        self._adapters.pop(_key_of(document), None)
        self._index()

    def put_pool(self, document: Mapping[str, Any]) -> None:
        """Add or replace a ServingPool.

        Raises:
            ValueError: it does not fit the schema; what was known of it is forgotten.
        """
        key = _key_of(document)
        self._bases.pop(key, None)
        self._pools.pop(key, None)
        try:
            pool = ServingPool.model_validate(document)
            self._pools[key] = Pool(key=key, uid=pool.metadata.uid)
            self._bases[key] = _claim(document, _base_model(pool))
        finally:
            self._index()

    def remove_pool(self, document: Mapping[str, Any]) -> None:
        """Forget a ServingPool."""
        self._bases.pop(_key_of(document), None)
        self._pools.pop(_key_of(document), None)
        self._index()

    def put_pod(self, document: Mapping[str, Any]) -> None:
        """Add or replace a pod of a pool."""
        self._pods[_key_of(document)] = dict(document)

    def remove_pod(self, document: Mapping[str, Any]) -> None:
        """Forget a pod."""
        self._pods.pop(_key_of(document), None)

    def pods(self) -> Iterator[Pod]:
        """The pods that have an address and whose pool exists.

        The pool's UID comes from the ServingPool, so a pod cannot claim another pool's token by its labels.
        """
        for (namespace, name), document in self._pods.items():
            metadata, status = document["metadata"], document.get("status") or {}
            labels = metadata.get("labels") or {}
            pool = self._pools.get((namespace, labels.get(POOL_LABEL, "")))
            address = status.get("podIP")
            if pool is None or labels.get(POOL_UID_LABEL) != pool.uid or not address:
                continue
            if status.get("phase") in {"Succeeded", "Failed"}:
                continue
            ready = not metadata.get("deletionTimestamp") and any(
                condition.get("type") == "Ready" and condition.get("status") == "True"
                for condition in status.get("conditions") or ()
            )
            yield Pod(uid=metadata["uid"], name=f"{namespace}/{name}", address=address, pool=pool, ready=ready)

    def visible(self, key: ApiKey) -> list[Model]:
        """The models that the key may call, by id."""
        return [
            model
            for _, model in sorted(self._models.items())
            if model.visible_to(key) and key.may_call(model.id) and model.engine_names
        ]

    def resolve(self, name: str, key: ApiKey) -> Model:
        """The model that a request names: a global id, a bare name, or either with `@<revision>`.

        A bare name is looked up in the key's home namespace, then among the bases that are open to all. The model of a
        revision has that one engine name; whether a pod holds it is for the caller to find out.

        Raises:
            ApiError: unknown (or in a namespace that is closed to the key), forbidden, or ambiguous.
        """
        alias, at, revision = name.partition("@")
        model = self._models.get(alias if "/" in alias else f"{key.home}/{alias}")
        if "/" not in alias and (model is None or not model.visible_to(key)):
            model = self._open_base(alias)
        if model is None or not model.visible_to(key):
            raise errors.model_not_found(name)
        if not key.may_call(model.id):
            raise errors.model_forbidden(model.id)
        if not at:
            return model
        if model.is_base or not revision:
            raise errors.model_not_found(name)
        return Model(
            id=model.id,
            namespace=model.namespace,
            pool=model.pool,
            engine_names=(f"{model.id}@{revision}",),
            is_base=False,
            open_to_all=False,
            created=model.created,
            deployed=f"{model.id}@{revision}" in model.engine_names,
        )

    def _open_base(self, bare_name: str) -> Model | None:
        found = [model for model in self._models.values() if model.open_to_all and model.bare_name == bare_name]
        if len(found) > 1:
            raise errors.model_ambiguous(bare_name, sorted(model.id for model in found))
        return found[0] if found else None

    def _index(self) -> None:
        claims = sorted(
            [*self._adapters.values(), *self._bases.values()],
            key=lambda claim: (claim.created, claim.uid),
            reverse=True,
        )
        # The oldest claim on an id wins: it is written last.
        self._models = {claim.model.id: claim.model for claim in claims}


def _key_of(document: Mapping[str, Any]) -> tuple[str, str]:
    metadata = document["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _claim(document: Mapping[str, Any], model: Model) -> _Claim:
    metadata = document["metadata"]
    return _Claim(created=metadata.get("creationTimestamp") or "", uid=metadata.get("uid", ""), model=model)


def _base_model(pool: ServingPool) -> Model:
    model_id = f"{pool.metadata.namespace}/{pool.spec.model_name}"
    created = pool.metadata.creation_timestamp
    return Model(
        id=model_id,
        namespace=pool.metadata.namespace,
        pool=(pool.metadata.namespace, pool.metadata.name),
        engine_names=(model_id,),
        is_base=True,
        open_to_all=pool.spec.allowed_namespaces.from_ == "All",
        created=int(created.timestamp()) if created else 0,
    )


def _adapter_model(adapter: AdapterDeployment) -> Model | None:
    """The model of an AdapterDeployment; None: another one has its name."""
    conditions = adapter.status.conditions
    resolved = find(conditions, AdapterDeploymentCondition.RESOLVED)
    if any(condition.reason == AdapterDeploymentReason.MODEL_NAME_TAKEN for condition in conditions):
        return None
    namespace = adapter.metadata.namespace
    pool = adapter.status.pool
    revisions = adapter.status.revisions
    created = adapter.metadata.creation_timestamp
    not_ready = None
    # A source that vanished leaves its revisions serving: what counts is whether there are any, not `Resolved`.
    if not revisions or pool is None:
        not_ready = (resolved.message or resolved.reason) if resolved else "it was created a moment ago"
    elif all(revision.state is RevisionState.FAILED for revision in revisions):
        not_ready = revisions[0].message or "no pod could load it"
    return Model(
        id=adapter.model,
        namespace=namespace,
        pool=(pool.namespace or namespace, pool.name) if pool else None,
        engine_names=tuple(revision.engine_name for revision in revisions),
        is_base=False,
        open_to_all=False,
        created=int(created.timestamp()) if created else 0,
        not_ready=not_ready,
    )
