"""A user with the role `edit` in one namespace follows the first page, then deploys a second version."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from e2e.documentation import REPOSITORY, blocks, commands
from e2e.installation import (
    DEMO,
    STATE,
    SYSTEM,
    apply,
    condition,
    delete,
    environment,
    get,
    kubectl,
    restricted_namespace,
    store_environment,
    store_secret,
    tunesmith,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEAM, KEY = "team-a", "first-page"
LABEL = "first-page"
SECONDS = 1800
PAGES = ("docs/first-15-minutes.md", "docs/how-to/new-version.md")
NOT_RUN = ("uv tool install", "tunesmith --install-completion")


@pytest.fixture
def reader(tmp_path: Path, pool: str) -> Iterator[dict[str, str]]:
    """Return the environment of a user with an API key, and the role `edit` in a namespace that the pool admits."""
    namespace = restricted_namespace(TEAM)
    namespace["metadata"]["labels"][LABEL] = "true"
    apply(namespace, {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "alice", "namespace": TEAM}})
    bound = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "alice", "namespace": TEAM},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
        "subjects": [{"kind": "ServiceAccount", "name": "alice", "namespace": TEAM}],
    }
    apply(bound)
    selector = {"from": "Selector", "selector": {"matchLabels": {LABEL: "true"}}}
    admit(pool, selector)
    key = tunesmith("keys", "create", KEY, "--namespace", TEAM, "--gateway-namespace", SYSTEM)
    token = kubectl("create", "token", "alice", "--namespace", TEAM, "--duration=2h").strip()
    config = json.loads(kubectl("config", "view", "--raw", "--output", "json"))
    for user in config["users"]:
        user["user"] = {"token": token}
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    (tmp_path / "key").write_text(next(word for word in key.split() if word.startswith("sk-ts-")))
    path = f"{REPOSITORY / '.venv/bin'}:{STATE / 'bin'}:{environment()['PATH']}"
    yield {**environment(), "PATH": path, "KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path)}
    admit(pool, {"from": "Same", "selector": None})
    tunesmith("keys", "delete", KEY, "--gateway-namespace", SYSTEM)
    delete("namespace", TEAM, "")


def admit(pool: str, allowed: dict[str, object]) -> None:
    patch = json.dumps({"spec": {"allowedNamespaces": allowed}})
    kubectl("patch", "servingpool", pool, "--namespace", DEMO, "--type=merge", "--patch", patch)


@pytest.mark.long
def test_the_first_page_and_the_next_one_run_as_written(reader: dict[str, str], tmp_path: Path, pool: str) -> None:
    inside = store_secret(TEAM)["stringData"]
    outside = store_environment()
    own = {
        "AWS_ACCESS_KEY_ID=…": f"AWS_ACCESS_KEY_ID={inside['AWS_ACCESS_KEY_ID']}",
        "AWS_SECRET_ACCESS_KEY=…": f"AWS_SECRET_ACCESS_KEY={inside['AWS_SECRET_ACCESS_KEY']}",
        "https://s3.example": inside["AWS_ENDPOINT_URL"],
        "eu-central-1": inside.get("AWS_REGION", "us-east-1"),
        "TUNESMITH_API_KEY=…": f"TUNESMITH_API_KEY={(tmp_path / 'key').read_text()}",
        "s3://team-a-data/": "s3://tunesmith/team-a-data/",
        "tunesmith-system/small": f"{DEMO}/{pool}",
        "hf://HuggingFaceTB/SmolLM2-135M-Instruct": "s3://tunesmith/models/SmolLM2-135M-Instruct",
        "    gpus: 1\n": '    gpus: 0\n    cpu: "1"\n    memory: 4Gi\n',
    }
    # The store's address in the Secret is reachable inside the cluster only, as the page explains.
    variables = reader | {"AWS_ENDPOINT_URL": outside["AWS_ENDPOINT_URL"]}
    for page in PAGES:
        for block in blocks(REPOSITORY / page):
            script = "\n".join(command for command in commands(block) if not command.startswith(NOT_RUN))
            for written, used in own.items():
                script = script.replace(written, used)
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=tmp_path,
                env=variables,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
            if "export TUNESMITH_API_KEY" in script:
                variables["TUNESMITH_API_KEY"] = (tmp_path / "key").read_text()
                assert done.stdout.strip(), "the adapter answers"
    adapter = get("adapterdeployment", "support", TEAM)
    assert condition(adapter, "Ready")["status"] == "True"
    assert adapter["spec"]["adapterFrom"]["fineTuneJob"]["name"] == "support", "the last command rolls back"
