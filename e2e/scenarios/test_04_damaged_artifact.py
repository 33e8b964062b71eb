"""A flipped bit in the store: the agent refuses the artifact, the adapter reports it, others keep running."""

from __future__ import annotations

from typing import TYPE_CHECKING

from e2e.custom_resources import adapter_manifest, ready_adapter
from e2e.installation import DEMO, apply, condition, delete, get, in_store, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from e2e.installation import Object

    Answer = Callable[[str, str], tuple[str, str]]


def test_a_damaged_artifact_is_refused_and_reported(
    second_job: Object, pool: str, answer: Answer, main_adapter: str, questions: list[str]
) -> None:
    weights = f"{second_job['status']['artifact']['uri']}/adapter_model.safetensors"
    before = answer(f"{DEMO}/{main_adapter}", questions[0])
    in_store("flip", weights)
    try:
        apply(adapter_manifest("damaged", second_job["metadata"]["name"], pool))

        def refused() -> Object | None:
            adapter = get("adapterdeployment", "damaged", DEMO) or {}
            revisions = adapter.get("status", {}).get("revisions", [])
            return adapter if revisions and revisions[0]["state"] == "Failed" else None

        adapter = until("the damaged artifact is refused", refused, 120)
        assert "adapter_model.safetensors" in adapter["status"]["revisions"][0]["message"]
        assert condition(adapter, "Ready")["status"] == "False"
        assert "adapter_model.safetensors" in condition(adapter, "Ready")["message"]
        assert adapter["status"].get("readyReplicas", 0) == 0
        assert answer(f"{DEMO}/{main_adapter}", questions[0]) == before
        assert ready_adapter(main_adapter)
    finally:
        delete("adapterdeployment", "damaged", DEMO)
        in_store("flip", weights)
