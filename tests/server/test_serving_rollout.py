"""Two revisions of one adapter in a real engine, behind a real gateway: weights, sessions and a shadow."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.gateway_rig import GATEWAY_KEYS
from tests.server.http_client import call, open_stream
from tests.server.server_rig import MissingPartError, S3Server, make_adapter, wait_until
from tests.server.test_serving_crash import PLACE, CrashingPod, GatewayProcess, served_adapter
from tunesmith.contracts.agent import EVENTS_WITH_TRAFFIC, events_keys, metrics_tokens, pod_tokens
from tunesmith.contracts.apikey import new_key
from tunesmith.contracts.podevents import EventReader
from tunesmith.contracts.traffic import served_between, shadow_between

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tunesmith.contracts.traffic import Traffic

pytestmark = pytest.mark.long


class RolledOut:
    """A pod with two revisions of `pirate`, and a gateway."""

    def __init__(self, folder: Path, pod: CrashingPod, new: dict[str, str], old: dict[str, str]) -> None:
        self.pod, self.entries, self.key = pod, (new, old), new_key()
        self.new, self.old = new["engineName"], old["engineName"]
        self.gateway = GatewayProcess(folder, self.key, [pod], [self.adapter(weights=(30, 70))])

    def adapter(self, **shares: Any) -> dict[str, Any]:
        return served_adapter("pirate", *self.entries, **shares)

    def complete(self, model: str = "team/pirate", **fields: Any) -> str:
        """Send a request and return the revision that answered."""
        body = {"model": model, "prompt": "Hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}
        answer = call(f"{self.gateway.url}/v1/completions", "POST", body, self.key, timeout=3600)
        assert answer.status == 200, answer.text
        text = answer.text.splitlines()[0].removeprefix("data: ") if body.get("stream") else answer.text
        return str(json.loads(text)["model"])

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Return the samples with the label `revision`: by name, revision and the remaining labels' values."""
        token = metrics_tokens(GATEWAY_KEYS)[0]
        text = call(f"{self.gateway.internal_url}/metrics", token=token).text
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = dict(sample.labels)
                revision = labels.pop("revision", "")
                labels.pop("model", None)
                found[(sample.name.removeprefix("tunesmith_gateway_"), revision, *labels.values())] = sample.value
        return found

    def traffic(self, name: str, served: int, shadow: int) -> Traffic:
        """Return the traffic that the agent reports for a revision once it has these numbers of requests."""
        token = pod_tokens(events_keys(GATEWAY_KEYS, *PLACE), self.pod.uid)[0]
        reader = EventReader()
        with open_stream(f"{self.pod.pod.agent_url}{EVENTS_WITH_TRAFFIC}", "GET", None, token) as lines:

            def counted() -> Traffic | None:
                reader.read(lines.readline())
                found = reader.state.traffic.get(name)
                if found is None or (found.served.requests, found.shadow.requests) != (served, shadow):
                    return None
                return found

            found = wait_until(counted, f"{name} has {served} requests and {shadow} mirrored ones", 300)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def rollout(
    tmp_path_factory: pytest.TempPathFactory, base: Path, fingerprint: str, store: S3Server
) -> Iterator[RolledOut]:
    folder = tmp_path_factory.mktemp("rollout")
    new, old = (
        make_adapter(folder / name, base, fingerprint, seed=seed).publish(store, model="pirate")
        for seed, name in enumerate(("new", "old"), 1)
    )
    try:
        pod = CrashingPod("one", folder / "pod", base, store, [new, old])
    except MissingPartError as error:
        pytest.fail(str(error), pytrace=False)
    try:
        pod.start()
        pod.wait_serving(0)
        running = RolledOut(folder / "gateway", pod, new, old)
        try:
            url, headers = f"{running.gateway.url}/v1/models/team%2Fpirate", running.key
            wait_until(lambda: call(url, token=headers).status == 200, "the gateway knows the adapter", 120)
            yield running
        finally:
            running.gateway.stop()
    finally:
        pod.stop()


def test_weights_sessions_and_a_shadow(rollout: RolledOut) -> None:
    wait_until(lambda: rollout.complete(rollout.old), "the gateway serves", 120)
    found = Counter(rollout.complete() for _ in range(40))
    assert found[rollout.new] == pytest.approx(12, abs=2)
    for session in ("a", "b", "c"):
        assert len({rollout.complete(user=session) for _ in range(3)}) == 1

    rollout.gateway.put(rollout.adapter(weights=(0, 100), shadow=100))
    wait_until(lambda: rollout.complete(stream=True) == rollout.old and mirrored(rollout, 1), "it has a shadow", 120)
    before = rollout.metrics()
    revision = rollout.new.partition("@")[2]
    for number in range(6):
        assert rollout.complete(stream=number % 2 == 0, logprobs=1) == rollout.old
    compared = before[("shadow_requests_total", revision, "compared")] + 6
    wait_until(lambda: mirrored(rollout, compared), "all are compared", 300)
    after = rollout.metrics()
    assert after[("shadow_requests_total", revision, "failed")] == 0
    assert after[("shadow_logprob_answers_total", revision)] == 6
    for answer in ("served", "shadow"):
        assert after[("shadow_tokens_total", revision, answer)] == 4 * compared
        assert after[("shadow_negative_logprob_nats_total", revision, answer)] > 0
        assert after[("shadow_refusals_total", revision, answer)] == 0
    served = int(sum(value for key, value in after.items() if key[:2] == ("requests_total", revision)))
    assert after[("shadow_requests_total", revision, "dropped")] == 0
    traffic = rollout.traffic(rollout.new, served, int(compared))
    assert served_between(None, traffic).error_rate == 0
    assert (shadow_between(None, traffic).first_token_p95 or 0) > 0
    assert (shadow_between(None, traffic).per_output_token_p95 or 0) > 0


def mirrored(rollout: RolledOut, count: float) -> bool:
    key = ("shadow_requests_total", rollout.new.partition("@")[2], "compared")
    return rollout.metrics().get(key, 0) >= count
