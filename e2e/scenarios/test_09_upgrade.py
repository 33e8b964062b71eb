"""`helm upgrade` of both charts: no custom resource is lost, no job is repeated, the adapter keeps answering."""

from __future__ import annotations

from typing import TYPE_CHECKING

from e2e.custom_resources import ready_adapter
from e2e.demo import RELEASE, VALUES
from e2e.installation import DEMO, GATEWAY, REPOSITORY, SYSTEM, get, helm, items, kubectl

if TYPE_CHECKING:
    from collections.abc import Callable

    from e2e.installation import Object

    Answer = Callable[[str, str], tuple[str, str]]


def test_an_upgrade_keeps_resources_and_repeats_no_job(
    main_job: Object, answer: Answer, main_adapter: str, questions: list[str]
) -> None:
    def identities() -> dict[tuple[str, str], str]:
        found = items("finetunejobs,servingpools,adapterdeployments", DEMO)
        return {(item["kind"], item["metadata"]["name"]): item["metadata"]["uid"] for item in found}

    before, message = identities(), answer(f"{DEMO}/{main_adapter}", questions[0])
    chart = str(REPOSITORY / "charts/tunesmith")
    helm(*("upgrade", RELEASE, chart, "--namespace", SYSTEM, "--reuse-values", "--set", "operator.leaseSeconds=6"))
    helm(*("upgrade", "adapters", str(REPOSITORY / "charts/adapters"), "--namespace", DEMO, "--values", str(VALUES)))
    for deployment in ("tunesmith-operator", GATEWAY):
        kubectl("rollout", "status", f"deployment/{deployment}", "--namespace", SYSTEM, "--timeout=180s", seconds=200)
    assert identities() == before
    assert ready_adapter(main_adapter)
    assert answer(f"{DEMO}/{main_adapter}", questions[0]) == message
    job = get("finetunejob", main_job["metadata"]["name"], DEMO) or {}
    assert job["status"]["artifact"] == main_job["status"]["artifact"]
    assert len(job["status"]["attempts"]) == 1
