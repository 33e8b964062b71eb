"""The operator's reconcilers of serving on an API server, a Deployment controller, a kubelet and agents in memory.

For counting work with more objects than a real API server takes in a test. The reconcilers, the controller's event
handling, the caches and the queue are the operator's own.
"""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from tunesmith.cluster.errors import ConflictError, NotFoundError
from tunesmith.contracts.agent import PodState, Residency, ResidencyState
from tunesmith.controller.context import Context
from tunesmith.controller.controller import Controller
from tunesmith.controller.reconciler import Key, Reconciler
from tunesmith.controller.serving.adapter import AdapterDeploymentReconciler
from tunesmith.controller.serving.pool import ServingPoolReconciler
from tunesmith.controller.serving.state import ServingState
from tunesmith.controller.settings import OperatorSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.controller.serving.agents import AgentLink

Object = dict[str, Any]
FINGERPRINT = "sha256:" + "f" * 64
START = datetime(2026, 1, 1, tzinfo=UTC)
GATE = "tunesmith.dev/adapters"


class Store:
    """The part of `Cluster` that writes, on a dictionary. Every write has a resourceVersion of its own."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.writes = 0
        self._kinds: dict[str, dict[tuple[str, str, str], Object]] = {}
        self._versions = itertools.count(1)

    def put(self, item: Object) -> Object:
        """Store a version of an object and return it."""
        metadata = item["metadata"]
        place = (item["kind"], metadata["namespace"], metadata["name"])
        old = self.objects.get(place)
        same = old is not None and old.get("spec") == item.get("spec")
        stored = {
            **item,
            "metadata": {
                "creationTimestamp": START.isoformat(),
                **metadata,
                "uid": old["metadata"]["uid"] if old else metadata.get("uid", f"uid-{len(self.objects)}"),
                "generation": old["metadata"]["generation"] + (not same) if old else 1,
                "resourceVersion": str(next(self._versions)),
            },
        }
        self.objects[place] = self._kinds.setdefault(item["kind"], {})[place] = stored
        return {**stored, "metadata": {**stored["metadata"]}}

    def of_kind(self, kind: str) -> list[Object]:
        """Return the objects of a kind."""
        return list(self._kinds.get(kind, {}).values())

    def find(self, kind: str, namespace: str, name: str) -> Object:
        """Return an object.

        Raises:
            NotFoundError: it does not exist.
        """
        try:
            return self.objects[kind, namespace, name]
        except KeyError:
            raise NotFoundError(f"{kind} {namespace}/{name}") from None

    async def apply(self, manifest: Object) -> Object:
        """Server-side apply."""
        self.writes += 1
        place = (manifest["kind"], manifest["metadata"]["namespace"], manifest["metadata"]["name"])
        old = self.objects.get(place, {})
        return self.put({**manifest, **({"status": old["status"]} if "status" in old else {})})

    async def overwrite(self, manifest: Object) -> None:
        """Create or replace a Secret."""
        await self.apply(manifest)

    async def replace_status(self, manifest: Object) -> Object:
        """PUT of the status."""
        self.writes += 1
        metadata = manifest["metadata"]
        stored = self.find(manifest["kind"], metadata["namespace"], metadata["name"])
        if stored["metadata"]["resourceVersion"] != metadata["resourceVersion"]:
            raise ConflictError("the object has been modified")
        return self.put({**stored, "status": manifest["status"]})

    async def patch(self, kind: str, name: str, namespace: str, body: Object, **_: object) -> Object:
        """Merge annotations, the number of replicas, or the conditions of a status."""
        self.writes += 1
        stored = self.find(kind, namespace, name)
        metadata, status = stored["metadata"], stored.get("status", {})
        annotations = {**metadata.get("annotations", {}), **body.get("metadata", {}).get("annotations", {})}
        conditions = {entry["type"]: entry for entry in status.get("conditions", ())}
        conditions |= {entry["type"]: entry for entry in body.get("status", {}).get("conditions", ())}
        return self.put(
            {
                **stored,
                "metadata": {**metadata, "annotations": annotations},
                "spec": {**stored.get("spec", {}), **body.get("spec", {})},
                "status": {**status, "conditions": list(conditions.values())},
            }
        )

    async def list(self, *_: object, **__: object) -> list[Object]:
        """List nodes: there are none."""
        return []


class Recorder:
    """Events that nobody reads."""

    async def event(self, *_: object, **__: object) -> None:
        """Forget an Event."""


class World:
    """A namespace `team` with adapters of one FineTuneJob each; pools are added by `add_pool`."""

    def __init__(self) -> None:
        self.store = Store()
        settings = OperatorSettings(
            store="s3://store", namespace="system", trainer_image="t", agent_image="a", engine_image="e"
        )
        self.context = Context(
            cluster=cast("Any", self.store), settings=settings, recorder=cast("Any", Recorder()), epoch=1
        )
        self.context.installation_keys = (b"k" * 32,)
        self.state = ServingState(self.context)
        self.reconcilers: dict[str, Reconciler] = {
            "ServingPool": ServingPoolReconciler(self.state),
            "AdapterDeployment": AdapterDeploymentReconciler(self.state),
        }
        self.controller = Controller(self.context, list(self.reconcilers.values()))
        self.passes: dict[str, int] = {}

    def observe(self, item: Object) -> None:
        """Deliver a watch event, as the API server would."""
        self.controller.observe("MODIFIED", item)

    def add_pool(self, name: str, **spec: Any) -> None:
        """Create a ServingPool."""
        self.observe(
            self.store.put(
                {
                    "apiVersion": "tunesmith.dev/v1alpha1",
                    "kind": "ServingPool",
                    "metadata": {"name": name, "namespace": "team"},
                    "spec": {"modelName": f"base-{name}", "baseModel": {"uri": "s3://models/smol"}, **spec},
                }
            )
        )

    def add_adapter(self, number: int, **spec: Any) -> None:
        """Create a complete FineTuneJob and an AdapterDeployment of it."""
        stamp = (START + timedelta(seconds=number)).isoformat()
        digest = f"sha256:{number:064x}"
        job = {
            "apiVersion": "tunesmith.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": f"job-{number}", "namespace": "team", "creationTimestamp": stamp},
            "spec": {
                "baseModel": {"uri": "s3://models/smol"},
                "dataset": {"train": [{"uri": "s3://data/rows.jsonl"}]},
                "method": {"lora": {}},
            },
            "status": {
                "conditions": [{"type": "Complete", "status": "True", "reason": "Done", "lastTransitionTime": stamp}],
                "artifact": {"uri": "s3://x/y", "digest": digest, "sizeBytes": 1, "servable": {"vllm": True}},
                "resolved": {"baseModelFingerprint": FINGERPRINT},
            },
        }
        adapter = {
            "apiVersion": "tunesmith.dev/v1alpha1",
            "kind": "AdapterDeployment",
            "metadata": {"name": f"adapter-{number}", "namespace": "team", "creationTimestamp": stamp},
            "spec": {"adapterFrom": {"fineTuneJob": {"name": f"job-{number}"}}, **spec},
        }
        self.observe(self.store.put(job))
        self.observe(self.store.put(adapter))

    def adapters(self) -> Iterator[Object]:
        """The stored AdapterDeployments."""
        return iter(self.store.of_kind("AdapterDeployment"))

    async def drain(self) -> None:
        """Reconcile what is due now, and what that makes due."""
        while self.context.queue.depth:
            await self.reconcile(await self.context.queue.get())

    async def reconcile(self, key: Key) -> None:
        """Reconcile one key as a worker does."""
        self.passes[key.kind] = self.passes.get(key.kind, 0) + 1
        if key.kind not in self.reconcilers:
            self.context.queue.done(key)
            return
        outcome = await self.reconcilers[key.kind].reconcile(key)
        self.context.queue.done(key, outcome.requeue_after)
        if key.kind == "ServingPool":
            self._make_pods(key)

    async def converge(self, batch: int = 1_000_000) -> None:
        """Reconcile until nothing changes; between the rounds each agent loads up to `batch` adapters."""
        await self.drain()
        while self._load(batch) or self._ready_pods():
            await self.drain()

    def reconcile_everything(self) -> None:
        """Make every ServingPool and AdapterDeployment due, as a new leader does."""
        for kind in self.reconcilers:
            for item in self.context.caches[kind].list():
                self.context.queue.add(Key(kind, item["metadata"]["namespace"], item["metadata"]["name"]))

    def _links(self) -> Iterator[tuple[Object, AgentLink]]:
        for pool in self.state.pools.list():
            links = self.state.agents.of(pool.metadata.uid)
            for pod in self.state.pod_manifests(pool):
                if pod["metadata"]["uid"] in links:
                    yield pod, links[pod["metadata"]["uid"]]

    def _load(self, batch: int) -> bool:
        """Let each agent report its next state; True if one did."""
        reported = False
        for pod, link in self._links():
            desired = {adapter.engine_name: adapter for adapter in link.desired or ()}
            held = {entry.engine_name for entry in link.state.adapters} if link.state is not None else set()
            missing = [name for name in desired if name not in held][:batch]
            if link.state is not None and not missing and held <= desired.keys():
                continue
            names = [*(name for name in held if name in desired), *missing]
            state = PodState(
                engine_ready=True,
                base_model_fingerprint=FINGERPRINT,
                adapters=[
                    Residency(engine_name=name, digest=desired[name].digest, state=ResidencyState.RESIDENT)
                    for name in sorted(names)
                ],
            )
            link.record_state(state, float("inf"))
            reported = True
            labels = pod["metadata"]["labels"]
            self.context.queue.add(Key("ServingPool", "team", labels["tunesmith.dev/pool"]))
        return reported

    def _make_pods(self, key: Key) -> None:
        """Do what the Deployment controller and the kubelet do."""
        for item in self.store.of_kind("Deployment"):
            template, namespace, name = item["spec"]["template"]["metadata"], "team", item["metadata"]["name"]
            if template["labels"].get("tunesmith.dev/pool") != key.name:
                continue
            for number in range(item["spec"]["replicas"]):
                if ("Pod", namespace, f"{name}-abc12-{number}") in self.store.objects:
                    continue
                owner = {"kind": "ReplicaSet", "name": f"{name}-abc12", "uid": f"rs-{name}", "controller": True}
                self.observe(
                    self.store.put(
                        {
                            "apiVersion": "v1",
                            "kind": "Pod",
                            "metadata": {
                                "name": f"{name}-abc12-{number}",
                                "namespace": namespace,
                                "labels": {**template["labels"], "pod-template-hash": "abc12"},
                                "annotations": template.get("annotations", {}),
                                "ownerReferences": [owner],
                            },
                            "status": {"phase": "Running", "podIP": f"10.0.{number // 250}.{number % 250 + 1}"},
                        }
                    )
                )

    def _ready_pods(self) -> bool:
        """Let the kubelet follow the readiness gates; True if a pod changed."""
        changed = False
        for item in self.store.of_kind("Pod"):
            conditions = {entry["type"]: entry for entry in item["status"].get("conditions", ())}
            gate = conditions.get(GATE, {}).get("status", "False")
            if conditions.get("Ready", {}).get("status", "False") != gate:
                conditions["Ready"] = {"type": "Ready", "status": gate}
                self.observe(
                    self.store.put({**item, "status": {**item["status"], "conditions": list(conditions.values())}})
                )
                changed = True
        return changed
