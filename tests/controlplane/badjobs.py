"""Bad jobs: what is wrong with each, where it must be refused, for which reason, and the words that name the mend.

tests/controlplane/test_bad_jobs.py applies those that the API server must refuse, tests/trainer/test_bad_jobs.py runs
the others. What is refused at Apply or at Validation never takes a training pod.
"""

from __future__ import annotations

import gzip
import json
import struct
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tests.trainer.sparse_weights import enlarge
from tunesmith.api.conditions import FailureReason

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Stage(StrEnum):
    """The earliest that can know."""

    APPLY = "Apply"
    VALIDATION = "Validation"
    TRAINING = "Training"


@dataclass(frozen=True)
class BadJob:
    """One row of the table.

    Args:
        stage: where it is refused.
        mend: words of the message, those that name the mend where the message does.
        spec: what is changed in a good job, such as {"method__lora__rank": 0}.
        reason: why it fails; None at Apply, where the API server's is always Invalid.
        locally: the mend's words in a local run, where the API server words its own schema's errors.
        name: of the job.
        files: of the data set's folder, by name; a good train.jsonl where empty.
        train: which of them is the data set.
        breaks: damages a copy of the base model.
        gpu_memory: bytes of the GPU, as the operator tells them.
        environment: of the process, beside the credentials of the store; None takes a variable away.
        secrets: mounted ones, by name: what differs from the right credentials.
        guarded: whether it runs as in a cluster, where base model and data are in the store, and the store's address is
            the only one of this machine that the platform lists.
    """

    stage: Stage
    mend: str
    spec: dict[str, Any] = field(default_factory=dict)
    reason: FailureReason | None = None
    locally: str = ""
    name: str = "bad"
    files: dict[str, bytes] = field(default_factory=dict)
    train: str = "train.jsonl"
    breaks: Callable[[Path], None] | None = None
    gpu_memory: int | None = None
    environment: dict[str, str | None] = field(default_factory=dict)
    secrets: dict[str, dict[str, Any]] = field(default_factory=dict)
    guarded: bool = False


GOOD_ROWS = [
    {"messages": [{"role": "user", "content": f"Door {door}?"}, {"role": "assistant", "content": "It is blue."}]}
    for door in range(8)
]
_SUITE = {"name": "rows", "heldOutLoss": {}}


def apply(mend: str, locally: str = "", name: str = "bad", **spec: Any) -> BadJob:
    return BadJob(Stage.APPLY, mend, spec, locally=locally, name=name)


def invalid(mend: str, **spec: Any) -> BadJob:
    """What only the base model's configuration or the data can tell."""
    return BadJob(Stage.VALIDATION, mend, spec, FailureReason.INVALID_SPEC)


def data(mend: str, *rows: Any, **spec: Any) -> BadJob:
    return rows_of(mend, lines(*rows), **spec)


def rows_of(mend: str, content: bytes, train: str = "train.jsonl", **spec: Any) -> BadJob:
    files = {train: content}
    return BadJob(Stage.VALIDATION, mend, spec, FailureReason.DATASET_INVALID, files=files, train=train)


def base(mend: str, breaks: Callable[[Path], None], reason: FailureReason = FailureReason.INVALID_SPEC) -> BadJob:
    return BadJob(Stage.VALIDATION, mend, reason=reason, breaks=breaks)


def store(mend: str, reason: FailureReason, **rest: Any) -> BadJob:
    uri = rest.pop("uri", "s3://tunesmith/data/train.jsonl")
    source = {"uri": uri} | ({"secretRef": {"name": rest.pop("secret")}} if "secret" in rest else {})
    return BadJob(Stage.VALIDATION, mend, {"dataset__train": [source]}, reason, **rest)


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def rewrite(name: str, **changes: Any) -> Callable[[Path], None]:
    """Changes keys of a JSON file of the base; None removes one."""

    def change(folder: Path) -> None:
        document = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in document.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return change


def large(folder: Path) -> None:
    enlarge(folder, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, head_dim=128)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def parts_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"lm_head.weight": "../../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_end(folder: Path) -> None:
    rewrite("tokenizer_config.json", eos_token=None)(folder)
    rewrite("generation_config.json", eos_token_id=None)(folder)
    for name in ("special_tokens_map.json", "config.json"):
        if (folder / name).exists():
            rewrite(name, eos_token=None, eos_token_id=None)(folder)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def not_a_number(folder: Path) -> None:
    """Writes a NaN into the last norm."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    start = 8 + size + json.loads(content[8 : 8 + size])["model.norm.weight"]["data_offsets"][0]
    content[start : start + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(content)


BAD_JOBS: dict[str, BadJob] = {
    # the spec, refused by the API server with the operator down
    "no method": apply("keep one and remove the other", method={}),
    "two methods": apply("keep one and remove the other", method__qlora={}),
    "a rank of 0": apply("greater than or equal to 1", "it must be at least 1", method__lora__rank=0),
    "a rank of 1024": apply("less than or equal to 512", "it must be at most 512", method__lora__rank=1024),
    "all modules and one": apply("remove it or the other names", method__lora__targetModules=["all-linear", "q_proj"]),
    "DoRA over PiSSA": apply(
        "use one of them, or remove dora", method={"lora": {"dora": True, "initialization": "PiSSA"}}
    ),
    "PiSSA in 4 bits": apply("use them with method.lora", method={"qlora": {"initialization": "PiSSA"}}),
    "3 bits": apply('supported values: "nf4"', "it must be nf4", method={"qlora": {"quantization": {"type": "int3"}}}),
    "a misspelt field": apply("spec.hyperparameters.learningrate", "learningRate?", hyperparameters__learningrate=0.1),
    "epochs and steps": apply("remove one of them", hyperparameters={"epochs": 1, "maxSteps": 10}),
    "a micro-batch that does not divide": apply(
        "change one of them", hyperparameters={"batchSize": 8, "microBatchSize": 3}
    ),
    "a learning rate of 10": apply("less than or equal to 1", "it must be at most 1", hyperparameters__learningRate=10),
    "no rows at all": apply("at least 1 items", "Sources of the training rows", dataset__train=[]),
    "held out twice": apply(
        "remove one of them",
        dataset__validation=[{"uri": "s3://data/held.jsonl"}],
        dataset__validationFraction=0.1,
    ),
    "answers of plain text": apply("remove dataset.lossOn", dataset__format="Text", dataset__lossOn="Completion"),
    "a web address": apply("a uri is hf://organisation/name", dataset__train=[{"uri": "http://example.org/a.jsonl"}]),
    "a folder of the web": apply("https://host/path/rows.jsonl", dataset__train=[{"uri": "https://example.org/a/"}]),
    "a signed web address": apply("https://host/path/", dataset__train=[{"uri": "https://example.org/a.jsonl?sig=x"}]),
    "a model of the web": apply("a uri is hf://organisation/name", baseModel__uri="https://example.org/model"),
    "credentials of a web address": apply(
        "remove the secretRef",
        dataset__train=[{"uri": "https://example.org/a.jsonl", "secretRef": {"name": "mine"}}],
    ),
    "a bucket alone": apply("s3://bucket/path", baseModel__uri="s3://models"),
    "a path that climbs": apply("write the resolved path", baseModel__uri="pvc://claim/../other"),
    "a file of this machine": apply("in a cluster use hf://, s3://", baseModel__uri="file:///models/base"),
    "a model as a data set": apply("hf://datasets/organisation/name", dataset__train=[{"uri": "hf://org/base"}]),
    "a revision of a bucket": apply("set the uri to a copy of that revision", baseModel__revision="main"),
    "memory without a unit": apply("add its unit, as in 8Gi", resources={"memory": 8}),
    "a GPU without a domain": apply("such as nvidia.com/gpu", resources={"gpuResource": "gpu"}),
    "a Secret with capitals": apply("lower-case letters", baseModel__secretRef={"name": "Store"}),
    "a queue that is no name": apply("begins and ends with a letter or digit", scheduling__queue="-team"),
    "a toleration of nothing": apply("set the operator, or the key", scheduling={"tolerations": [{"value": "a"}]}),
    "a gate on no suite": apply(
        "correct its name",
        evaluation={"suites": [_SUITE], "gates": [{"suite": "rwos", "metric": "Loss", "max": 1}]},
    ),
    "a gate without a limit": apply(
        "must have min or max", evaluation={"suites": [_SUITE], "gates": [{"suite": "rows", "metric": "Loss"}]}
    ),
    "a task that there is not": invalid(
        "did you mean arc_easy?", evaluation={"suites": [{"name": "tasks", "lmEval": {"tasks": ["arc_esay"]}}]}
    ),
    "tasks in a model's repository": apply(
        "is hf://datasets/organisation/name",
        evaluation={"suites": [{"name": "t", "lmEval": {"tasks": ["a"], "taskFolder": {"uri": "hf://org/tasks"}}}]},
    ),
    "tasks that the platform does not run": BadJob(
        Stage.VALIDATION,
        "to set the chart's value trainer.allowTaskFolders, or remove taskFolder",
        {"evaluation": {"suites": [{"name": "t", "lmEval": {"tasks": ["a"], "taskFolder": {"uri": "s3://a/tasks"}}}]}},
        FailureReason.INVALID_SPEC,
        guarded=True,
    ),
    "dequantised merge of a base that is not quantised": apply("use Original", output={"merge": "Dequantized"}),
    "a copy to a claim": apply(
        "a uri of a copy is s3://bucket/path", output={"exports": [{"uri": "pvc://claim/copy"}]}
    ),
    "a copy to two places in one": apply(
        "remove the other", output={"exports": [{"uri": "s3://copies/a", "hub": "org/a"}]}
    ),
    "a copy to no repository": apply("is organisation/name", output={"exports": [{"hub": "name"}]}),
    "checkpoints by steps and by time": apply("keep one of them", checkpoint={"everySteps": 5, "everyMinutes": 1}),
    "a deadline of no time": apply("greater than or equal to 1", "it must be at least 1", activeDeadlineSeconds=0),
    "a name of 41 letters": apply("at most 40 characters", name="n" * 41),
    "two objectives": apply("keep one and remove the others", objective={"dpo": {}, "kto": {}}),
    "packed pairs": apply("set it to false", objective={"dpo": {}}, dataset__packing=True),
    "chats for preferences": apply("change one of them", objective={"dpo": {}}, dataset__format="Messages"),
    "nothing to compare with": apply(
        "set hyperparameters.batchSize to 2 or more", objective={"kto": {}}, hyperparameters={"batchSize": 1}
    ),
    "more GPUs than rows of a step": apply("must be at least resources.nodes", resources={"gpus": 16}),
    # the spec, refused on the CPU: the base model must be looked at
    "a misspelt module": invalid("did you mean q_proj?", method__lora__targetModules=["q_prj"]),
    "the output layer": invalid("remove it", method__lora__targetModules=["lm_head"]),
    "an embedding": invalid("is not a linear module", method__lora__targetModules=["embed_tokens"]),
    "a template that is none": invalid("is not a valid Jinja template: line 1", dataset__chatTemplate="{% if %}"),
    "columns of another format": invalid(
        "which has history, messages, system, tools: remove it",
        dataset__format="Messages",
        dataset__columns={"chosen": "better"},
    ),
    "no method of PEFT": invalid("did you mean VERA?", method={"peft": {"type": "VERRA"}}),
    "no field of PEFT's": invalid(
        "has no field d_inital; did you mean d_initial?", method={"peft": {"type": "VERA", "config": {"d_inital": 1}}}
    ),
    "a path in PEFT's configuration": invalid(
        "names files or code, which a job cannot use: remove it",
        method={"peft": {"type": "LORA", "config": {"megatron_core": "os"}}},
    ),
    "a method that 4 bits make learn nothing": invalid(
        "remove quantization, or use method.qlora", method={"peft": {"type": "UNILORA", "quantization": {}}}
    ),
    "a merge of what cannot be merged": invalid(
        "remove output.merge, or use another method", method={"promptTuning": {}}, output={"merge": "Original"}
    ),
    "an adapter that vLLM cannot load": BadJob(
        Stage.VALIDATION,
        "or set servable to Ignored",
        {"method": {"lora": {"dora": True}}, "servable": "Required"},
        FailureReason.NOT_SERVABLE,
    ),
    # the data
    "an empty file": rows_of("a data set needs at least one row", b"\n"),
    "no JSON": data("line 1: is not JSON", b"{", b"{"),
    "no UTF-8": data("is not UTF-8", b'{"messages": "\xff"}', b'{"messages": "\xff"}'),
    "one list": rows_of("is not JSON", json.dumps(GOOD_ROWS, indent=1).encode()),
    "columns that say nothing": data(
        "a row needs 'messages', or 'prompt' and 'completion'", {"question": "Who?", "reply": "Marta."}
    ),
    "columns that say two things": data(
        "select one of them with dataset.format", {"text": "a", "prompt": "b", "completion": "c"}
    ),
    "an unknown role": data("expected one of", chat(("narrator", "a"), ("assistant", "b"))),
    "no answer": data("it must be the assistant's", chat(("user", "Who?"))),
    "an answer to nothing": data("a message of the user must precede it", chat(("assistant", "Marta."))),
    "a picture": data(
        "only text can be learned: remove it",
        chat(("user", [{"type": "image", "image": "a.png"}]), ("assistant", "A door.")),
    ),
    "null for an answer": data("is null, not a string", {"prompt": "Who?", "completion": None}),
    "pairs for plain fine-tuning": data(
        "choose another objective", {"prompt": "Who?", "chosen": "Marta.", "rejected": "Nobody."}
    ),
    "chats for preferences, unnamed": data("choose another objective", *GOOD_ROWS, objective={"dpo": {}}),
    "one row": data("need at least 2", GOOD_ROWS[0]),
    "rows that are too long": data("more than maxLength 16 tokens", *GOOD_ROWS, dataset__maxLength=16),
    "one row that is too long": data(
        "overlong",
        *GOOD_ROWS,
        chat(("user", "Why?"), ("assistant", "blue " * 200)),
        dataset__maxLength=128,
        dataset__overlong="Error",
    ),
    "one bad row, where none may be": data("line 9", *GOOD_ROWS, b"{", dataset__unusable="Error"),
    "a table without columns": rows_of("must contain the names of the columns", b",\n1,2\n", "train.csv"),
    "half a gzip file": rows_of("not a complete gzip file", gzip.compress(lines(*GOOD_ROWS))[:40], "train.jsonl.gz"),
    "a file of no known format": rows_of("use one of the extensions", lines(*GOOD_ROWS), "train.txt"),
    "a file that is not there": BadJob(
        Stage.VALIDATION,
        "none.jsonl does not exist",
        reason=FailureReason.DATASET_NOT_FOUND,
        train="none.jsonl",
    ),
    "a folder of other files": BadJob(
        Stage.VALIDATION,
        "has no data files, whose names end with",
        reason=FailureReason.DATASET_NOT_FOUND,
        files={"rows/readme.md": b"rows"},
        train="rows",
    ),
    "a folder of two formats": BadJob(
        Stage.VALIDATION,
        "choose one format with a glob",
        reason=FailureReason.DATASET_INVALID,
        files={"rows/a.jsonl": lines(*GOOD_ROWS), "rows/b.csv": b"text\na\n"},
        train="rows",
    ),
    # the base model
    "a folder without a model": base(
        "it needs config.json, tokenizer.json and *.safetensors",
        without("config.json"),
        FailureReason.BASE_MODEL_NOT_FOUND,
    ),
    "pickled weights": base("convert them on a machine of yours", pickled, FailureReason.BASE_MODEL_NOT_FOUND),
    "an unknown architecture": base("config.json of the base model", rewrite("config.json", model_type="warp-drive")),
    "no language model": base(
        "is not a causal language model that this release can train", rewrite("config.json", model_type="vit")
    ),
    "no chat template": base("use a chat model, set dataset.chatTemplate", without("chat_template.jinja")),
    "answers that never stop": base("has no end token", without_end),
    "a base whose parts lie elsewhere": base(
        "names ../../other/model.safetensors, which the folder does not contain: copy the whole base model",
        parts_elsewhere,
        FailureReason.BASE_MODEL_NOT_FOUND,
    ),
    "a base that will not fit": BadJob(
        Stage.VALIDATION,
        "it fits with method.qlora instead of lora (about",
        {"resources": {"gpus": 1}},
        FailureReason.WILL_NOT_FIT,
        breaks=large,
        gpu_memory=5 * 2**30,
    ),
    # the credentials
    "a Secret that is not there": store(
        "create it, or remove the secretRef", FailureReason.SECRET_NOT_FOUND, secret="absent"
    ),
    "a Secret with wrong keys": store(
        "the Secret mine", FailureReason.ACCESS_DENIED, secret="mine", secrets={"mine": {"AWS_SECRET_ACCESS_KEY": "no"}}
    ),
    "wrong keys of the store": store(
        "the Secret tunesmith-store", FailureReason.ACCESS_DENIED, environment={"AWS_SECRET_ACCESS_KEY": "no"}
    ),
    "no keys": store(
        "must have AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        FailureReason.ACCESS_DENIED,
        environment={"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
    ),
    "a Secret of another store": store(
        "the Secret mine has no GOOGLE_SERVICE_ACCOUNT_KEY, which gs:// requires: add the key, or remove",
        FailureReason.SECRET_NOT_FOUND,
        uri="gs://data/rows.jsonl",
        secret="mine",
        secrets={"mine": {}},
    ),
    "a key that is none": store(
        "GOOGLE_SERVICE_ACCOUNT_KEY of the Secret mine cannot be used for gs://: it is not JSON; use the whole value",
        FailureReason.ACCESS_DENIED,
        uri="gs://data/rows.jsonl",
        secret="mine",
        secrets={"mine": {"GOOGLE_SERVICE_ACCOUNT_KEY": "key.json"}},
    ),
    "a Secret for a claim": apply(
        "remove the secretRef", dataset__train=[{"uri": "pvc://claim/rows.jsonl", "secretRef": {"name": "mine"}}]
    ),
    "an endpoint at the cloud's metadata": store(
        "169.254.169.254, a link-local or cloud metadata address, which jobs and pools may not reach",
        FailureReason.ACCESS_DENIED,
        secret="mine",
        secrets={"mine": {"AWS_ENDPOINT_URL": "http://169.254.169.254/latest"}},
        guarded=True,
    ),
    "an endpoint in the cluster": store(
        "ask the platform's administrators to add it to the chart's value trainer.allowedAddresses",
        FailureReason.ACCESS_DENIED,
        secret="mine",
        secrets={"mine": {"AWS_ENDPOINT_URL": "http://10.96.0.10:9000"}},
        guarded=True,
    ),
    "a copy to an address of the pod": BadJob(
        Stage.VALIDATION,
        "127.0.0.2, an address of the pod itself, which jobs and pools may not reach",
        {"output": {"exports": [{"hub": "org/a", "secretRef": {"name": "mine"}}]}},
        FailureReason.ACCESS_DENIED,
        secrets={"mine": {"HF_TOKEN": "hf_x", "HF_ENDPOINT": "http://127.0.0.2:8080"}},
        guarded=True,
    ),
    "a bucket that is not there": store(
        "s3://no-such-bucket/a.jsonl does not exist",
        FailureReason.DATASET_NOT_FOUND,
        uri="s3://no-such-bucket/a.jsonl",
    ),
    "a copy with a Secret that is not there": BadJob(
        Stage.VALIDATION,
        "the Secret absent does not exist, is empty or has no known key",
        {"output": {"exports": [{"hub": "org/a", "secretRef": {"name": "absent"}}]}},
        FailureReason.SECRET_NOT_FOUND,
    ),
    "a copy to the Hub without a token": BadJob(
        Stage.VALIDATION,
        "put HF_TOKEN, a token that may write to it, into the Secret mine",
        {"output": {"exports": [{"hub": "org/a", "secretRef": {"name": "mine"}}]}},
        FailureReason.ACCESS_DENIED,
        secrets={"mine": {}},
    ),
    "a copy to a bucket that is not there": BadJob(
        Stage.VALIDATION,
        "the export s3://no-such-bucket/copy does not exist: check the uri",
        {"output": {"exports": [{"uri": "s3://no-such-bucket/copy"}]}},
        FailureReason.INVALID_SPEC,
    ),
    # only training can find it
    "no GPU on the node": BadJob(
        Stage.TRAINING, "set it to 0 to train on the CPU", {"resources": {"gpus": 1}}, FailureReason.INVALID_SPEC
    ),
    "weights that are no numbers": BadJob(
        Stage.TRAINING,
        "the base model's weights are damaged",
        reason=FailureReason.LOSS_DIVERGED,
        breaks=not_a_number,
    ),
}


def changed(spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The spec with changes whose paths are written with `__`."""
    result: dict[str, Any] = json.loads(json.dumps(spec))
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return result
