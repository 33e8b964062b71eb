#!/usr/bin/env python3
"""Writes docs/reference/rbac.md, the rights of every role and service account, from the rendered chart `tunesmith`.

helm comes from .cluster/bin or PATH; if it is in neither, it is built as for the local cluster. With `--check` nothing
is written: the exit code is 1 if the file would change.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
TARGET = REPOSITORY / "docs/reference/rbac.md"
NAMESPACE = "tunesmith-system"
Object = dict[str, Any]

_REASONS = {
    ("operator", "finetunejobs"): "the resources that it reconciles",
    ("operator", "finetunejobs/status"): "their observed state",
    ("operator", "servingpools/finalizers"): "owner references that block deletion, where the API server checks them",
    ("operator", "jobs"): "validation and attempts",
    ("operator", "workloads"): "why Kueue holds a Job back",
    ("operator", "deployments"): "pools",
    ("operator", "poddisruptionbudgets"): "pools",
    ("operator", "pods"): "state of pods and reasons for failures; the deletion cost of pool pods",
    ("operator", "pods/status"): "the readiness gate of pool pods",
    ("operator", "configmaps"): "the manifest that a training pod reads",
    ("operator", "services"): "addresses by which the pods of a job on several nodes connect",
    ("operator", "networkpolicies"): "permitted connections to pool and training pods",
    ("operator", "secrets"): "the keys of pools and gateways, written without being read",
    ("operator", "events"): "events of a resource",
    ("operator", "resourcequotas"): "why the pods of a Job are refused",
    ("operator", "namespaces"): "their labels, which pools match to decide who may attach",
    ("operator", "nodes"): "the memory of GPUs, from the nodes' labels",
    ("operator", "leases"): "leader election",
    ("gateway", "servingpools"): "models that can be called",
    ("gateway", "pods"): "addresses of pool pods",
    ("gateway", "namespaces"): "their labels, which pools match to decide who may call the base model",
    ("gateway", "configmaps"): "the hashes of API keys",
    ("every authenticated user", "configmaps"): "the gateway's address and the namespaces of shared pools",
    ("every authenticated user", "servingpools"): "pools in the namespaces of shared pools (`rbac.discovery`)",
    ("role view", "finetunejobs"): "in the built-in role `view` (and `edit`, `admin`)",
    ("role edit", "finetunejobs"): "in the built-in role `edit` (and `admin`)",
    ("role edit", "adapterdeployments/scale"): "in the built-in role `edit` (and `admin`)",
    ("role admin", "servingpools"): "in the built-in role `admin`: a pool uses GPUs",
    ("role admin", "servingpools/scale"): "in the built-in role `admin`",
}
_SPECIAL = {
    ("operator", "namespaces", "kube-system"): "the cluster's identity, written into folders of the store",
    ("operator", "secrets", "tunesmith-installation-key"): "the key that all other keys derive from",
    ("operator", "secrets", "tunesmith-gateway-key"): "the gateways' share of it, and the token of metrics",
}


class Row(NamedTuple):
    """A right."""

    who: str
    where: str
    group: str
    objects: str
    names: str
    verbs: str
    reason: str


def helm() -> str:
    """Return the path of helm, which is built if it is missing."""
    folders = os.pathsep.join([str(REPOSITORY / ".cluster/bin"), os.environ.get("PATH", "")])
    if found := shutil.which("helm", path=folders):
        return found
    sys.path.insert(0, str(REPOSITORY))
    from e2e.cluster import binaries  # noqa: PLC0415 - of the local cluster, only where it is needed

    return str(binaries.build("helm") / "helm")


def rendered(**values: object) -> list[Object]:
    """Return the documents of the chart with these values.

    Raises:
        subprocess.CalledProcessError: helm failed.
    """
    complete = {"store": "s3://bucket/store", "images": {"registry": "registry.example"}, **values}
    done = subprocess.run(  # noqa: S603 - helm and this repository's chart
        [
            *(helm(), "template", "tunesmith", str(REPOSITORY / "charts/tunesmith"), "--namespace", NAMESPACE),
            *("--kube-version", "1.34.0", "--values", "-"),
        ],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        input=json.dumps(complete),
    )
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def rows(documents: list[Object]) -> list[Row]:
    """Return the rights of every role of the documents, a row for each rule.

    Raises:
        KeyError: a right has no reason in this file: add it.
    """
    bindings = {}
    for item in documents:
        if item["kind"] in {"RoleBinding", "ClusterRoleBinding"}:
            place = (item["roleRef"]["kind"], item["metadata"].get("namespace"), item["roleRef"]["name"])
            subject = item["subjects"][0]
            bindings[place] = "every authenticated user" if subject["kind"] == "Group" else subject["name"]
    found = []
    for role in documents:
        if role["kind"] not in {"Role", "ClusterRole"}:
            continue
        name, namespace = role["metadata"]["name"], role["metadata"].get("namespace")
        subject = bindings.get((role["kind"], namespace, name))
        who = (subject or f"role {name.removeprefix('tunesmith-')}").removeprefix("tunesmith-")
        scope = "each listed namespace" if namespace else "the cluster"
        where = "the installation's namespace" if namespace == NAMESPACE else scope
        for rule in role["rules"]:
            names = rule.get("resourceNames", [])
            reason = _REASONS[who, rule["resources"][0]]
            if names:
                reason = _SPECIAL.get((who, rule["resources"][0], names[0]), reason)
            found.append(
                Row(
                    who,
                    where if subject else "where the built-in role is bound",
                    rule["apiGroups"][0] or "core",
                    ", ".join(rule["resources"]),
                    ", ".join(names) or "any",
                    ", ".join(rule["verbs"]),
                    reason,
                )
            )
    return found


def table(found: list[Row]) -> str:
    """Return a Markdown table."""
    lines = ["| Who | Where | API group | Objects | Names | May | For |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in found)])


def policies(documents: list[Object]) -> str:
    """Return what each admission policy demands, as a list."""
    found = []
    for item in documents:
        if item["kind"] != "ValidatingAdmissionPolicy":
            continue
        spec = item["spec"]
        resources = sorted({name for rule in spec["matchConstraints"]["resourceRules"] for name in rule["resources"]})
        found.append(f"**{item['metadata']['name']}** ({', '.join(resources)})\n")
        sentences = [" ".join(check["message"].split()) for check in spec["validations"] if "message" in check]
        found += [f"- {sentence}." for sentence in dict.fromkeys(sentences)] + [""]
    return "\n".join(found)


def page() -> str:
    """Return the page's text."""
    documents = rendered()
    limited = rendered(watchNamespaces=["team-a"], rbac={"aggregateToUserRoles": False})
    operator = [item for item in documents if item["metadata"]["name"].startswith("tunesmith-operator-")]
    return f"""# Who can do what

Generated by `make generate` from the chart: change `charts/tunesmith/templates`, not this file. Tests apply these
rights and policies to an API server, run the operator with nothing else, and try what goes beyond them
([tests](../../tests/controlplane/test_rights.py)).

No identity may read a Secret, except the operator its own installation key. `operator` and `gateway` are service
accounts of the release's namespace; `every authenticated user` is the group `system:authenticated`; `role …` are
ClusterRoles that aggregate into the cluster's built-in roles.

## In every namespace (the default)

{table(rows(documents))}

## With `watchNamespaces`

{table(rows(limited))}

## What the operator's rights are bounded by

RBAC knows no labels, owners or shapes. These ValidatingAdmissionPolicies apply to the operator's service account alone
(`admissionPolicies.enabled`, on by default):

{policies(operator)}
## Policies for users

These ValidatingAdmissionPolicies (`admissionPolicies.enabled`) bind everyone who creates objects:

| Policy | Refuses |
|---|---|
| `tunesmith-scheduling` | FineTuneJobs and ServingPools with scheduling that the value `scheduling` does not list |
| `tunesmith-credentials` | a `secretRef` to a Secret without the label `tunesmith.dev/credentials=true` |
| `tunesmith-credentials-pods` | a pod or Job of Tunesmith that mounts such a Secret |

## What remains possible

Whoever holds the operator's token can, in the namespaces that it works in and that `excludedNamespaces` does not list:

- read all pods, Jobs, Deployments and Tunesmith's resources, with the variables in their templates;
- run pods of the standard `restricted` with any image, which can mount ConfigMaps and volume claims of their namespace,
  but no Secret other than the key with which a pool's engine checks the gateway's tokens;
- overwrite the keys of pools and gateways, and the status of Tunesmith's resources; stop training by deleting its Jobs.

It can read no Secret directly, touch no workload of others and nothing in an excluded namespace, run no privileged pod,
execute nothing in a running pod, and give nobody a right. List namespaces with `watchNamespaces` to bound the rest.
"""


def main() -> int:
    """Command line: see the module's docstring."""
    text = page()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
    elif not TARGET.is_file() or TARGET.read_text() != text:
        print(f"{TARGET} is not what the chart renders: run `make generate`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
