"""A bounded run of the fuzzer over manifests; `make verify-fuzz-manifests` runs 10,000."""

from __future__ import annotations

from tests.finetune.manifest_fuzzer import run


def test_every_manifest_is_refused_or_gets_a_plan_with_a_condition() -> None:
    found = run(seed=2026, count=600)
    for kind in ("FineTuneJob", "ServingPool", "AdapterDeployment"):
        assert found[kind, "planned"] > 5
        assert found[kind, "refused"] > 5
