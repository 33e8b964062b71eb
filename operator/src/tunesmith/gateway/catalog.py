"""Models by id, their pools and the pools' pods, as observed from the API server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.api.adapterdeployment import AdapterDeployment, RevisionState
from tunesmith.api.conditions import AdapterDeploymentCondition, find
from tunesmith.api.engine_arguments import max_sequences
from tunesmith.api.servingpool import ServingPool
from tunesmith.contracts.claims import ModelNameClaim, model_name_claim, winner
from tunesmith.contracts.labels import POOL_LABEL, POOL_UID_LABEL
from tunesmith.gateway import errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tunesmith.api.adapter_limits import AdapterLimits
    from tunesmith.api.servingpool import AllowedNamespaces
    from tunesmith.contracts.apikey import ApiKey

PoolKey = tuple[str, str]
"""Namespace and name of a ServingPool."""


@dataclass(frozen=True, slots=True)
class Model:
    """A base model or an adapter that clients can call.

    Attributes:
        id: the global id, `<namespace>/<modelName>`.
        pool: the pool that serves it; None if it is not chosen yet.
        engine_names: names in the engine, newest first; a base has one, its id.
        is_base: True for the pool's base model, False for an adapter.
        is_whole: True for a revision that is the base model of the pods that hold it, and needs no adapter slot.
        open_to: for a base, the namespaces that its pool admits; None: only the model's own namespace.
        created: Unix time in seconds.
        not_ready: reason why it cannot be called yet; None if a pod holds it or will soon.
        weights: share of the requests, in percent, of each engine name during a rollout; empty: the newest one that a
            pod holds answers all.
        shadow: engine name of the revision that also answers a share of the requests, and this share in percent.
        deployed: False for a revision that the AdapterDeployment does not list, or no longer lists.
        limits: highest use by all API keys together; None: no limit.
    """

    id: str
    namespace: str
    pool: PoolKey | None
    engine_names: tuple[str, ...]
    is_base: bool
    open_to: AllowedNamespaces | None
    created: int
    not_ready: str | None = None
    is_whole: bool = False
    weights: tuple[int, ...] = ()
    shadow: tuple[str, int] | None = None
    deployed: bool = True
    limits: AdapterLimits | None = None

    @property
    def bare_name(self) -> str:
        """Name without the namespace."""
        return self.id.partition("/")[2]

    def visible_to(self, key: ApiKey, labels: Mapping[str, Mapping[str, str]]) -> bool:
        """Return True if the key may know that the model exists; `labels` are those of the namespaces, by name."""
        if self.namespace in key.namespaces:
            return True
        return self.open_to is not None and any(
            self.open_to.admits(self.namespace, namespace, labels.get(namespace)) for namespace in key.namespaces
        )


@dataclass(frozen=True, slots=True)
class Pool:
    """A ServingPool.

    Attributes:
        base: global id of its base model.
        max_length: longest request with its answer, in tokens; None: the base model's own limit.
    """

    key: PoolKey
    uid: str
    base: str = ""
    max_length: int | None = None


@dataclass(frozen=True, slots=True)
class PoolStart:
    """Start of a pool's pods.

    Attributes:
        hold_seconds: time for which a request may wait for a pod; None if it is not known.
        start_seconds: measured time from the start of the engine until it accepts adapters; None if it is not known.
        from_zero: True if a request makes the pool start its first pod.
    """

    hold_seconds: float | None = None
    start_seconds: float | None = None
    from_zero: bool = False


@dataclass(frozen=True, slots=True)
class Pod:
    """A pool's pod that has an address. `ready`: its Ready condition is True and it is not being deleted."""

    uid: str
    name: str
    address: str
    pool: Pool
    ready: bool


class _Claimant(NamedTuple):
    """A resource that claims a global id."""

    kind: str
    namespace: str
    name: str


class _PodRecord(NamedTuple):
    """The fields of a pod that routing depends on."""

    uid: str
    namespace: str
    name: str
    address: str
    pool: str
    pool_uid: str
    ready: bool


class Catalog:
    """The objects observed so far, by kind. Reads and changes cost a dictionary look-up each.

    Args:
        shared_namespaces: namespaces whose pools' bases may be called by their bare name from any namespace.
    """

    def __init__(self, shared_namespaces: Iterable[str] = ()) -> None:
        self._shared_namespaces = frozenset(shared_namespaces)
        self._claims: dict[str, dict[_Claimant, tuple[ModelNameClaim, Model]]] = {}
        self._claimed: dict[_Claimant, str] = {}
        self._pools: dict[PoolKey, Pool] = {}
        self._starts: dict[PoolKey, PoolStart] = {}
        self._max_sequences: dict[PoolKey, int | None] = {}
        self._pods: dict[tuple[str, str], _PodRecord] = {}
        self._models: dict[str, Model] = {}
        self._by_namespace: dict[str, dict[str, Model]] = {}
        self._open: dict[str, Model] = {}
        self._shared: dict[str, dict[str, Model]] = {}
        self._labels: dict[str, Mapping[str, str]] = {}

    def put_namespace(self, document: Mapping[str, Any]) -> None:
        """Set the labels of a namespace."""
        metadata = document["metadata"]
        self._labels[metadata["name"]] = metadata.get("labels") or {}

    def remove_namespace(self, document: Mapping[str, Any]) -> None:
        """Forget a namespace."""
        self._labels.pop(document["metadata"]["name"], None)

    def put_adapter(self, document: Mapping[str, Any]) -> None:
        """Add or replace an AdapterDeployment.

        Raises:
            ValueError: it does not fit the schema; the earlier version is removed.
        """
        claimant = _Claimant("AdapterDeployment", *_key_of(document))
        try:
            adapter = AdapterDeployment.model_validate(document)
        except ValueError:
            self._withdraw(claimant)
            raise
        self._claim(claimant, model_name_claim(adapter), _adapter_model(adapter))

    def remove_adapter(self, document: Mapping[str, Any]) -> None:
        """Forget an AdapterDeployment."""
        self._withdraw(_Claimant("AdapterDeployment", *_key_of(document)))

    def put_pool(self, document: Mapping[str, Any]) -> None:
        """Add or replace a ServingPool.

        Raises:
            ValueError: it does not fit the schema; the earlier version is removed.
        """
        key = _key_of(document)
        try:
            pool = ServingPool.model_validate(document)
        except ValueError:
            self.remove_pool(document)
            raise
        base, rule = _base_model(pool), pool.spec.autoscaling
        self._pools[key] = Pool(key, pool.metadata.uid, base.id, pool.spec.engine.max_model_length)
        self._starts[key] = PoolStart(
            pool.hold_seconds, pool.status.engine_start_seconds, from_zero=rule is not None and rule.min_replicas == 0
        )
        self._max_sequences[key] = max_sequences(pool.spec.engine.args or ())
        self._claim(_Claimant("ServingPool", *key), model_name_claim(pool), base)

    def remove_pool(self, document: Mapping[str, Any]) -> None:
        """Forget a ServingPool."""
        key = _key_of(document)
        self._pools.pop(key, None)
        self._starts.pop(key, None)
        self._max_sequences.pop(key, None)
        self._withdraw(_Claimant("ServingPool", *key))

    def put_pod(self, document: Mapping[str, Any]) -> None:
        """Add or replace a pod of a pool."""
        metadata, status = document["metadata"], document.get("status") or {}
        key, labels = _key_of(document), metadata.get("labels") or {}
        address = status.get("podIP")
        if not address or status.get("phase") in {"Succeeded", "Failed"}:
            self._pods.pop(key, None)
            return
        ready = not metadata.get("deletionTimestamp") and any(
            condition.get("type") == "Ready" and condition.get("status") == "True"
            for condition in status.get("conditions") or ()
        )
        pool, pool_uid = labels.get(POOL_LABEL, ""), labels.get(POOL_UID_LABEL, "")
        self._pods[key] = _PodRecord(metadata["uid"], *key, address, pool, pool_uid, ready)

    def remove_pod(self, document: Mapping[str, Any]) -> None:
        """Forget a pod."""
        self._pods.pop(_key_of(document), None)

    def pods(self) -> Iterator[Pod]:
        """Yield the pods that have an address and whose pool exists.

        The pool's UID comes from the ServingPool, so a pod cannot claim another pool's token through its labels.
        """
        for pod in self._pods.values():
            pool = self._pools.get((pod.namespace, pod.pool))
            if pool is not None and pod.pool_uid == pool.uid:
                name = f"{pod.namespace}/{pod.name}"
                yield Pod(uid=pod.uid, name=name, address=pod.address, pool=pool, ready=pod.ready)

    def pool(self, key: PoolKey | None) -> Pool | None:
        """Return a pool; None if it does not exist."""
        return None if key is None else self._pools.get(key)

    def pool_uid(self, key: PoolKey | None) -> str | None:
        """Return the UID of a pool; None if it does not exist."""
        pool = None if key is None else self._pools.get(key)
        return None if pool is None else pool.uid

    def start_of(self, key: PoolKey) -> PoolStart:
        """Return how long a pool's pods take to start."""
        return self._starts.get(key, PoolStart())

    def max_sequences(self, key: PoolKey) -> int | None:
        """Return the number of sequences that a pod of the pool computes at once; None if its spec does not set it."""
        return self._max_sequences.get(key)

    def exists(self, name: str) -> bool:
        """Return True if there is a model with this global id, or one with this engine name of a revision."""
        model_id, at, _ = name.partition("@")
        model = self._models.get(model_id)
        return model is not None and (not at or name in model.engine_names)

    def visible(self, key: ApiKey) -> list[Model]:
        """Return the models that the key may call, sorted by id."""
        found = {name: model for name, model in self._open.items() if model.visible_to(key, self._labels)}
        for namespace in key.namespaces:
            found.update(self._by_namespace.get(namespace, {}))
        return [model for _, model in sorted(found.items()) if key.may_call(model.id) and model.engine_names]

    def resolve(self, name: str, key: ApiKey) -> Model:
        """Return the model that a request names: a global id, a bare name, or either with `@<revision>`.

        A bare name is looked up in the key's home namespace, then among the bases that the pools of the shared
        namespaces open to others: a pool of any other namespace cannot attract requests by a bare name. The model of a
        revision has only that engine name; the caller checks whether a pod holds it.

        Raises:
            ApiError: the model is unknown (or in a namespace that is closed to the key), forbidden, or ambiguous.
        """
        alias, at, revision = name.partition("@")
        model = self._models.get(alias if "/" in alias else f"{key.home}/{alias}")
        if "/" not in alias and (model is None or not model.visible_to(key, self._labels)):
            model = self._shared_base(alias, key)
        if model is None or not model.visible_to(key, self._labels):
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
            open_to=None,
            created=model.created,
            is_whole=model.is_whole,
            deployed=f"{model.id}@{revision}" in model.engine_names,
            limits=model.limits,
        )

    def _shared_base(self, bare_name: str, key: ApiKey) -> Model | None:
        shared = self._shared.get(bare_name, {})
        found = {name: model for name, model in shared.items() if model.visible_to(key, self._labels)}
        if len(found) > 1:
            raise errors.model_ambiguous(bare_name, sorted(found))
        return next(iter(found.values()), None)

    def _claim(self, claimant: _Claimant, claim: ModelNameClaim, model: Model) -> None:
        if self._claimed.get(claimant, claim.model) != claim.model:
            self._withdraw(claimant)
        self._claimed[claimant] = claim.model
        self._claims.setdefault(claim.model, {})[claimant] = (claim, model)
        self._decide(claim.model)

    def _withdraw(self, claimant: _Claimant) -> None:
        model_id = self._claimed.pop(claimant, None)
        if model_id is None:
            return
        claims = self._claims[model_id]
        del claims[claimant]
        if not claims:
            del self._claims[model_id]
        self._decide(model_id)

    def _decide(self, model_id: str) -> None:
        """Update the indexes to the claim that owns an id now."""
        old = self._models.pop(model_id, None)
        if old is not None:
            _drop(self._by_namespace, old.namespace, model_id)
            _drop(self._shared, old.bare_name, model_id)
            self._open.pop(model_id, None)
        claims = self._claims.get(model_id, {}).values()
        holder = winner(model_id, (claim for claim, _ in claims))
        model = next((model for claim, model in claims if claim is holder), None)
        if model is None:
            return
        self._models[model_id] = model
        self._by_namespace.setdefault(model.namespace, {})[model_id] = model
        if model.open_to is not None:
            self._open[model_id] = model
            if model.namespace in self._shared_namespaces:
                self._shared.setdefault(model.bare_name, {})[model_id] = model


def _drop(index: dict[str, dict[str, Model]], key: str, model_id: str) -> None:
    entries = index.get(key)
    if entries is not None:
        entries.pop(model_id, None)
        if not entries:
            del index[key]


def _key_of(document: Mapping[str, Any]) -> tuple[str, str]:
    metadata = document["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _base_model(pool: ServingPool) -> Model:
    model_id = f"{pool.metadata.namespace}/{pool.spec.model_name}"
    created = pool.metadata.creation_timestamp
    return Model(
        id=model_id,
        namespace=pool.metadata.namespace,
        pool=(pool.metadata.namespace, pool.metadata.name),
        engine_names=(model_id,),
        is_base=True,
        open_to=pool.spec.allowed_namespaces if pool.spec.allowed_namespaces.from_ != "Same" else None,
        created=int(created.timestamp()) if created else 0,
    )


def _adapter_model(adapter: AdapterDeployment) -> Model:
    resolved = find(adapter.status.conditions, AdapterDeploymentCondition.RESOLVED)
    namespace = adapter.metadata.namespace
    pool = adapter.status.pool
    revisions = adapter.status.revisions
    created = adapter.metadata.creation_timestamp
    not_ready = None
    # Revisions keep serving after their source is deleted, so their presence counts, not `Resolved`.
    if not revisions or pool is None:
        not_ready = (resolved.message or resolved.reason) if resolved else "it was just created"
    elif all(revision.state is RevisionState.FAILED for revision in revisions):
        not_ready = revisions[0].message or "no pod could load it"
    return Model(
        id=adapter.model,
        namespace=namespace,
        pool=(pool.namespace or namespace, pool.name) if pool else None,
        engine_names=tuple(revision.engine_name for revision in revisions),
        is_base=False,
        open_to=None,
        created=int(created.timestamp()) if created else 0,
        not_ready=not_ready,
        is_whole=bool(revisions and revisions[0].base_model),
        weights=tuple(revision.weight or 0 for revision in revisions) if any(r.weight for r in revisions) else (),
        shadow=next(((r.engine_name, r.shadow_percent) for r in revisions if r.shadow_percent), None),
        limits=adapter.spec.limits,
    )
