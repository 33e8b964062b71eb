"""The main job on a real cluster: installs Tunesmith, trains an adapter, serves it, and compares it with its base.

`make demo` runs it once the cluster has the images. Everything keeps running; a repeated run does only what is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from e2e.installation import (
    DEMO,
    GATEWAY,
    REPOSITORY,
    STATE,
    STORE,
    SYSTEM,
    InstallationError,
    Object,
    apply,
    condition,
    delete,
    environment,
    gateway_address,
    get,
    helm,
    image_values,
    images,
    in_store,
    kubectl,
    restricted_namespace,
    store_network,
    store_secret,
    tunesmith,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

JOB = REPOSITORY / "examples/finetunejob.yaml"
DATA = REPOSITORY / "examples/data"
VALUES = REPOSITORY / "examples/values-demo.yaml"
MODEL = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith/models/SmolLM2-135M-Instruct"
QUESTIONS = REPOSITORY / "examples/questions.txt"
KEY = STATE / "demo-key"
NODE_PORT = 30080
RELEASE = "tunesmith"


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print the block's name and elapsed time."""
    begin = time.monotonic()
    yield
    print(f"ok {time.monotonic() - begin:4.0f} s  {name}", flush=True)


def install() -> None:
    """Install namespaces, credentials and the chart `tunesmith`, with requests that fit a node of two cores."""
    reference = images()
    small = {"requests": {"cpu": "20m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}}
    apply(restricted_namespace(SYSTEM), restricted_namespace(DEMO))
    apply(store_secret(DEMO))
    helm(
        *("upgrade", RELEASE, str(REPOSITORY / "charts/tunesmith"), "--install", "--namespace", SYSTEM),
        values={
            "store": STORE,
            "images": {name: image_values(reference[name]) for name in ("operator", "trainer", "agent", "engine")},
            "operator": {"replicas": 2, "resources": small},
            "trainer": {"allowedAddresses": [store_network()]},
            "gateway": {
                "replicas": 1,
                "resources": small | {"requests": {"cpu": "250m", "memory": "128Mi"}},
                "service": {"type": "NodePort", "port": 80, "nodePort": NODE_PORT},
                "externalUrl": gateway_address(NODE_PORT),
            },
        },
    )
    for deployment in ("tunesmith-operator", GATEWAY):
        kubectl("rollout", "status", f"deployment/{deployment}", "--namespace", SYSTEM, "--timeout=180s", seconds=200)


def train(manifest: Object) -> None:
    """Submit the job and show its progress until it finishes; do nothing if it is complete.

    Raises:
        InstallationError: the job failed, for the reason in the message.
    """
    name = manifest["metadata"]["name"]
    existing = get("finetunejob", name, DEMO)
    if condition(existing, "Failed")["status"] == "True" or changed(manifest):
        print(f"The FineTuneJob {name} failed, or its manifest has changed: it is created again.")
        delete("finetunejob", name, DEMO)
    command = [REPOSITORY / ".venv/bin/tunesmith", "submit", "--filename", JOB, "--namespace", DEMO, "--watch"]
    subprocess.run(command, check=False, env=environment(), cwd=REPOSITORY)
    job = get("finetunejob", name, DEMO)
    if condition(job, "Complete")["status"] != "True":
        failure = condition(job, "Failed")
        raise InstallationError(f"the FineTuneJob {name} did not complete: {failure['reason']} {failure['message']}")


def changed(manifest: Object) -> bool:
    """Return True if the cluster has the job with another spec, which cannot be changed in place."""
    document = yaml.safe_dump({**manifest, "metadata": {**manifest["metadata"], "namespace": DEMO}})
    try:
        kubectl("apply", "--server-side", "--dry-run=server", "--force-conflicts", "--filename", "-", stdin=document)
    except InstallationError as error:
        if "immutable" in str(error):
            return True
        raise
    return False


def api_key() -> str:
    """Return the demo's API key, which is created once and kept in a file that only this user can read."""
    if KEY.is_file() and get("configmap", "api-key-demo", SYSTEM):
        return KEY.read_text().strip()
    delete("configmap", "api-key-demo", SYSTEM)
    printed = tunesmith("keys", "create", "demo", "--namespace", DEMO, "--gateway-namespace", SYSTEM)
    key = next((word for word in printed.split() if word.startswith("sk-ts-")), "")
    if not key:
        raise InstallationError(f"`tunesmith keys create` printed no key: {printed}")
    KEY.touch(mode=0o600)
    KEY.write_text(key + "\n")
    return key


def answer_of(client: OpenAI, model: str, question: str) -> str:
    """Return the greedy answer."""
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=60, temperature=0
    )
    return (reply.choices[0].message.content or "").strip()


def compare(client: OpenAI, base: str, adapter: str) -> None:
    """Send both models the same questions and print the answers side by side."""
    table = Table("question", f"base ({base})", f"adapter ({adapter})", show_lines=True)
    for question in QUESTIONS.read_text().splitlines():
        table.add_row(question, answer_of(client, base, question), answer_of(client, adapter, question))
    Console(width=max(100, Console().width)).print(table)


def main() -> None:
    """Run the steps in the order in which a user would."""
    manifest = yaml.safe_load(JOB.read_text())
    values = yaml.safe_load(VALUES.read_text())
    [pool], [name] = values["pools"].values(), values["adapters"]
    with step("base model and data in the store"):
        in_store("put", str(MODEL), "s3://tunesmith/models/SmolLM2-135M-Instruct")
        for file in sorted(DATA.glob("*.jsonl")):
            in_store("put", str(file), f"s3://tunesmith/data/{file.name}")
    with step("Tunesmith installed (helm upgrade --install)"):
        install()
    with step("FineTuneJob trained"):
        train(manifest)
    with step("pool and adapter deployed (helm upgrade --install)"):
        chart = str(REPOSITORY / "charts/adapters")
        helm("upgrade", "adapters", chart, "--install", "--namespace", DEMO, "--values", str(VALUES))
        until(
            f"adapter {name} ready",
            lambda: condition(get("adapterdeployment", name, DEMO), "Ready")["status"] == "True",
            seconds=600,
        )
    key = api_key()
    endpoint = f"{gateway_address(NODE_PORT)}/v1"
    base, adapter = f"{DEMO}/{pool['modelName']}", f"{DEMO}/{name}"
    with (
        OpenAI(base_url=endpoint, api_key=key, timeout=120, max_retries=3) as client,
        step("base and adapter compared"),
    ):
        compare(client, base, adapter)
    print_summary(get("finetunejob", manifest["metadata"]["name"], DEMO) or {}, endpoint, adapter)


def print_summary(job: Object, endpoint: str, model: str) -> None:
    """Print the results and the next commands."""
    evaluation = job["status"]["evaluation"]
    question = QUESTIONS.read_text().splitlines()[0]
    key, kubeconfig = KEY.relative_to(REPOSITORY), (STATE / "kubeconfig").relative_to(REPOSITORY)
    message = f'{{"role": "user", "content": "{question}"}}'
    before, after, less = evaluation["baseLoss"], evaluation["loss"], evaluation["lossReductionPercent"]
    print(
        f"""
Held-out loss: {before:.3f} before, {after:.3f} after ({less:.0f} % less).

Everything is still running; `make cluster-down` stops it. Send the adapter a request yourself:

  curl {endpoint}/chat/completions -H "Authorization: Bearer $(cat {key})" \\
    -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "messages": [{message}]}}'

  .venv/bin/python - <<'END'
  from openai import OpenAI
  client = OpenAI(base_url="{endpoint}", api_key=open("{key}").read().strip())
  reply = client.chat.completions.create(model="{model}", messages=[{message}], stream=True)
  for part in reply:
      print(part.choices[0].delta.content or "", end="", flush=True)
  END

  export KUBECONFIG=$PWD/{kubeconfig}
  .cluster/bin/kubectl --namespace {DEMO} get ftj,spool,adep"""
    )


if __name__ == "__main__":
    try:
        main()
    except (InstallationError, subprocess.TimeoutExpired) as error:
        sys.exit(f"demo: {error}")
