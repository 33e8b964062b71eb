from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from jsonschema import Draft7Validator
from pydantic import Field

from tests.controlplane.manifests import job
from tunesmith.api import crd
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.model import ApiModel, ObjectMeta
from tunesmith.api.schema import UnboundedError, json_schema, structural_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = (
    *("--output", str(ROOT / "crds"), "--output", str(ROOT / "charts/tunesmith/files/crds")),
    *("--schemas", str(ROOT / "crds/schemas"), "--reference", str(ROOT / "docs/reference/api.md")),
)


def nodes(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for child in schema.get("properties", {}).values():
        yield from nodes(child)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key])


def test_committed_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert crd.main(["--check", *COMMITTED]) == 0, capsys.readouterr().out


def test_check_names_what_would_change_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path / "crds"), "--reference", str(tmp_path / "api.md")]
    assert crd.main(["--check", *arguments]) == 1
    assert not list(tmp_path.iterdir())
    assert crd.main(arguments) == 0
    assert crd.main(["--check", *arguments]) == 0
    stale = tmp_path / "crds" / "tunesmith.dev_servingpools.yaml"
    stale.write_text(stale.read_text().replace("maximum: 3600", "maximum: 10"))
    capsys.readouterr()
    assert crd.main(["--check", *arguments]) == 1
    assert capsys.readouterr().out == f"{stale} is out of date: run make generate\n"


@pytest.mark.parametrize("kind", crd.KINDS, ids=lambda kind: kind.name)
def test_every_field_is_described_and_bounded(kind: crd.CustomResourceKind) -> None:
    root = structural_schema(kind.model)["properties"]
    for node in (*nodes(root["spec"]), *nodes(root["status"])):
        assert not {"$ref", "title", "const", "nullable"} & node.keys()
        assert not ("properties" in node and "additionalProperties" in node)
        for name, child in node.get("properties", {}).items():
            assert child.get("description"), name


def test_a_field_without_a_maximum_is_an_error() -> None:
    class Spec(ApiModel):
        note: str = Field(description="A note.")

    class Unbounded(ApiModel):
        """A resource."""

        metadata: ObjectMeta
        spec: Spec
        status: Spec = Field(default_factory=lambda: Spec(note=""))

    with pytest.raises(UnboundedError, match=r"Unbounded\.spec\.note needs a maximum: one of maxLength"):
        structural_schema(Unbounded)


def test_objects_whose_fields_have_defaults_default_to_an_empty_object() -> None:
    spec = structural_schema(FineTuneJob)["properties"]["spec"]["properties"]
    assert spec["hyperparameters"]["default"] == {}
    assert spec["method"]["properties"]["qlora"]["properties"]["quantization"]["default"] == {}
    assert "default" not in spec["method"]["properties"]["lora"]
    assert "default" not in spec["dataset"]


def test_json_schema_knows_every_field_and_no_other() -> None:
    validator = Draft7Validator(json_schema(FineTuneJob))
    assert validator.is_valid(job("team"))
    assert validator.is_valid(job("team", resources={"cpu": 2}))
    assert not validator.is_valid(job("team", methd={}))
    assert not validator.is_valid(job("team", method__lora__rank=0))
    assert not validator.is_valid(job("team") | {"kind": "Job"})


def test_crds_are_yaml_that_names_the_kind() -> None:
    for kind in crd.KINDS:
        document = yaml.safe_load((ROOT / "crds" / f"tunesmith.dev_{kind.plural}.yaml").read_text())
        assert document["metadata"]["name"] == f"{kind.plural}.tunesmith.dev"
        assert document == crd.crd(kind)
