"""Inputs that are made to break the checks: each is refused with its place and fix, in bounded time and memory."""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from tests.trainer.tiny_model import CHAT_TEMPLATE
from tests.trainer.trainer_rig import Workbench, chat_row, chat_rows, job_manifest
from tunesmith.api.conditions import FailureReason
from tunesmith_trainer.data.formats import DataFile, records
from tunesmith_trainer.data.forms import RowForm
from tunesmith_trainer.data.rows import Row
from tunesmith_trainer.data.tokens import row_batches
from tunesmith_trainer.main import failure
from tunesmith_trainer.process.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.trainer.trainer_rig import Ran

_MIB = 2**20
_HALF = "\\ud800"
"""Half of a surrogate pair, in JSON."""
_ROW = '{"prompt": "a", "completion": "b"}'


def _lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _encoded() -> bytes:
    """A kilobyte that stands for 2 GiB of text."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 512, pa.int32()), pa.array(["a" * (4 * _MIB)]))
    sink = pa.BufferOutputStream()
    settings: dict[str, Any] = {"write_statistics": False, "dictionary_pagesize_limit": 2**30, "store_schema": False}
    pq.write_table(pa.table({"text": text}), sink, compression="zstd", **settings)
    return bytes(sink.getvalue())


def _nulls() -> bytes:
    """A kilobyte that stands for a list of two thousand million nulls."""
    count = 2_000_000_000
    lists = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.nulls(count))
    sink = pa.BufferOutputStream()
    table = pa.table({"messages": lists})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _nested(depth: int) -> bytes:
    kind = pa.string()
    for _ in range(depth):
        kind = pa.list_(kind)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"messages": pa.nulls(3, kind)}), sink)
    return bytes(sink.getvalue())


def _damaged() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(chat_rows(4)), sink)
    content = bytearray(sink.getvalue())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[footer : footer + 40] = b"\xff" * 40
    return bytes(content)


def _with_time() -> bytes:
    tool = {"name": "lookup", "parameters": {"since": datetime(2026, 1, 1, tzinfo=UTC)}}
    sink = pa.BufferOutputStream()
    rows = [{**chat_row(f"Who is {number}?", "Marta."), "tools": [tool]} for number in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a part whose type is a list": (
        "rows.jsonl",
        lambda: _lines({"messages": [{"role": "user", "content": [{"type": []}]}]}),
        "line 1: message 1 (user): 'content' has a part that is not text",
    ),
    "a role as large as the row": (
        "rows.jsonl",
        lambda: _lines({"messages": [{"role": "a" * _MIB, "content": "b"}]}),
        "expected one of system, developer, user, assistant",
    ),
    "a header of 100,000 columns": (
        "rows.csv",
        lambda: ",".join(f"c{number}" for number in range(100_000)).encode() + b"\nx\n",
        "line 2: has 1 cells, but the first line names 100000 columns",
    ),
    "a line without an end": (
        "rows.csv.gz",
        lambda: gzip.compress(b"prompt,completion\na," + b"b" * (70 * _MIB), 1),
        "rows.csv.gz line 2 ends a row that is longer than 64 MiB",
    ),
    "quotes without an end": (
        "rows.csv.gz",
        lambda: gzip.compress(b'prompt,completion\na,"' + (b"b" * 1023 + b"\n") * (70 * 1024), 1),
        "ends a row that is longer than 64 MiB: put each row on its own line, and close the quotes",
    ),
    "rows below keys that are not text": (
        "rows.json",
        f'{{"{_HALF}": [{_ROW}], "b": [{_ROW}]}}'.encode,
        "has rows below several keys, '\\ud800' and 'b'",
    ),
    "a number of 100,000 digits": (
        "rows.json",
        lambda: b"[" + b"9" * 100_000 + b"]",
        "row 1 is not JSON: it is nested too deeply, or a number is too long",
    ),
    "blank lines": (
        "rows.jsonl.gz",
        lambda: gzip.compress(b"\n" * (2 * _MIB), 1),
        "rows.jsonl.gz line 1048577 follows more than 1 MiB of blank text: remove it",
    ),
    "blanks in a list": (
        "rows.json.gz",
        lambda: gzip.compress(b"[" + b" " * (2 * _MIB), 1),
        "rows.json.gz: a row follows more than 1 MiB of blank text: remove it",
    ),
    "blank lines of a table": (
        "rows.csv.gz",
        lambda: gzip.compress(b"text\n" + b"\n" * (2 * _MIB), 1),
        "follows more than 1 MiB of blank text: remove it",
    ),
    "a row of millions of objects": (
        "rows.jsonl.gz",
        lambda: gzip.compress(b'{"messages": [' + b"{}," * (5 * _MIB) + b"{}]}\n", 1),
        "rows.jsonl.gz line 1: has more than 8 million values: divide it into several rows",
    ),
    "a list of billions of nulls": (
        "rows.arrow",
        _nulls,
        "rows.arrow row 1: is longer than 64 MiB, or has more than 8 million values",
    ),
    "lists of a thousand levels": (
        "rows.parquet",
        lambda: _nested(1000),
        "rows.parquet cannot be read as parquet: Parquet schema too deeply nested",
    ),
    "a damaged footer": ("rows.parquet", _damaged, "rows.parquet cannot be read as parquet: Couldn't deserialize"),
    "a time in a tool": ("rows.parquet", _with_time, "Object of type datetime is not JSON serializable"),
}


def _validated(bench: Workbench, name: str, content: bytes, **spec: Any) -> Ran:
    file = bench.folder / name
    file.write_bytes(content)
    return bench.run("validate", job_manifest(f"file://{bench.base}", f"file://{file}", **spec))


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused(bench: Workbench, name: str) -> None:
    file, content, expected = FILES[name]
    ran = _validated(bench, file, content())
    assert expected in ran.result.message
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.DATASET_INVALID, False)
    assert len(ran.result.message) < 3000


def test_an_answer_whose_role_is_a_list_is_refused(bench: Workbench) -> None:
    row = {"prompt": "a", "chosen": [{"role": [], "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}
    ran = _validated(bench, "rows.jsonl", _lines(row), objective={"dpo": {}})
    assert "line 1: message 1: unknown role []" in ran.result.message
    assert ran.result.reason is FailureReason.DATASET_INVALID


def test_a_row_of_megabytes_is_dropped_before_it_is_tokenised(bench: Workbench) -> None:
    rows = [*chat_rows(12), chat_row("Why?", "blue " * (2 * _MIB))]
    ran = _validated(bench, "rows.jsonl", _lines(*rows))
    assert ran.code == 0, ran.result.message
    assert ran.result.preflight is not None
    (dropped,) = ran.result.preflight.dropped or []
    assert (dropped.reason, dropped.rows) == ("Overlong", 1)
    assert "line 13: has 10485" in (dropped.examples or [""])[0]


def test_rows_that_are_all_too_long_to_be_tokenised_are_refused(bench: Workbench) -> None:
    ran = _validated(
        bench, "rows.jsonl", _lines(*(chat_row(f"Why {number}?", "blue " * (2 * _MIB)) for number in (1, 2)))
    )
    assert "2 of 2 rows are too long, the first is rows.jsonl line 1: has 10485" in ran.result.message
    assert ran.result.reason is FailureReason.DATASET_INVALID


def test_encoded_values_are_decoded_few_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.write_bytes(_encoded())
    before = pa.total_allocated_bytes()
    found = 0
    for record in records(DataFile(file.name, file)):
        found += len(record.value["text"])
        assert pa.total_allocated_bytes() - before < 256 * _MIB
    assert found == 512 * 4 * _MIB


def test_a_template_whose_text_is_too_long_rejects_the_row(bench: Workbench) -> None:
    job = bench.job()
    job["spec"]["dataset"]["chatTemplate"] = "{% for a in range(99999) %}{{ messages[0].content * 99 }}{% endfor %}"
    ran = bench.run("validate", job)
    assert "rejects the row: its text has more than 8388608 characters" in ran.result.message
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.DATASET_INVALID, False)


def test_a_row_that_is_nested_deeply_is_dropped(bench: Workbench) -> None:
    deep = f'{{"messages": [{{"role": "user", "content": {"[" * 950}{"]" * 950}}}, {{"role": "assistant"}}]}}'
    ran = _validated(bench, "rows.jsonl", _lines(*chat_rows(12)) + deep.encode())
    assert ran.code == 0, ran.result.message
    assert ran.result.preflight is not None
    (dropped,) = ran.result.preflight.dropped or []
    assert (dropped.reason, dropped.rows) == ("Undecodable", 1)


def test_a_chat_of_thousands_of_messages_is_dropped(bench: Workbench) -> None:
    long = {"messages": chat_row("Who?", "Marta.")["messages"] * 600}
    ran = _validated(bench, "rows.jsonl", _lines(*chat_rows(12), long))
    assert ran.code == 0, ran.result.message
    assert ran.result.preflight is not None
    (dropped,) = ran.result.preflight.dropped or []
    assert dropped.reason == "Overlong"
    assert "'messages' has 1200 messages, more than 1024" in (dropped.examples or [""])[0]


def test_batches_end_before_their_tokens_fill_the_memory() -> None:
    rows = [Row(RowForm.TEXT, {"text": ""}, "rows.jsonl", size=size) for size in (3 * _MIB, 3 * _MIB, 1, *[1] * 600)]
    assert [len(batch) for batch in row_batches(iter(rows))] == [2, 512, 89]


def test_a_template_that_chooses_at_random_is_refused(bench: Workbench) -> None:
    job = bench.job()
    job["spec"]["dataset"]["chatTemplate"] = CHAT_TEMPLATE + "{{ ['a', 'b'] | random }}"
    ran = bench.run("validate", job)
    assert "random and lipsum render another text each time: remove them" in ran.result.message
    assert (ran.code, ran.result.retryable) == (2, False)


def test_a_pipe_is_not_read(bench: Workbench) -> None:
    os.mkfifo(bench.folder / "rows.jsonl")
    ran = bench.run("validate", job_manifest(f"file://{bench.base}", f"file://{bench.folder}/rows.jsonl"))
    assert "rows.jsonl is neither a file nor a folder: use a file" in ran.result.message
    assert (ran.code, ran.result.retryable) == (2, False)


def test_links_lead_to_the_base_model_and_the_rows(bench: Workbench) -> None:
    """The cache of the Hub's client consists of links."""
    (bench.folder / "rows.jsonl").write_bytes(_lines(*chat_rows(12)))
    for name, files in (("base", [*bench.base.iterdir()]), ("data", [bench.folder / "rows.jsonl"])):
        (bench.folder / "links" / name).mkdir(parents=True)
        for file in files:
            (bench.folder / "links" / name / file.name).symlink_to(file)
    job = job_manifest(f"file://{bench.folder}/links/base", f"file://{bench.folder}/links/data")
    ran = bench.run("validate", job)
    assert ran.code == 0, ran.result.message


def _change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _tokenizer(**changes: Any) -> Callable[[Path], None]:
    return lambda base: _change(base / "tokenizer.json", **changes)


def _add_token(base: Path, word: str) -> None:
    """Add a token for a word of the rows to the tokenizer."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    token = {"id": json.loads((base / "config.json").read_text())["vocab_size"], "content": word, **flags}
    _change(base / "tokenizer.json", added_tokens=[*added, token])


def _file(name: str, content: str) -> Callable[[Path], None]:
    return lambda base: (base / name).write_text(content) and None


BASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tokenizer without its unknown token": (
        _tokenizer(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}),
        "the base model's tokenizer cannot encode the rows: Exception: WordLevel error: Missing [UNK] token",
    ),
    "a tokenizer of another kind": (_file("tokenizer.json", "[]"), "cannot be loaded"),
    "a generation configuration that is a list": (
        _file("generation_config.json", "[]"),
        "the generation_config.json of the base model",
    ),
    "a tokenizer with more tokens than the model": (
        lambda base: _add_token(base, "door"),
        "turns rows into the token 382, and the model has only 382 tokens",
    ),
    "a tokenizer with a token beyond 32 bits": (
        _tokenizer(model={"type": "WordLevel", "vocab": {"<unk>": 0, "door": 2**32 - 1}, "unk_token": "<unk>"}),
        "has the token id 4294967295",
    ),
    "a million layers": (
        lambda base: _change(base / "config.json", num_hidden_layers=10**6),
        "has 1000000 layers according to its config.json, more than 1024: correct num_hidden_layers",
    ),
    "no attention heads": (
        lambda base: _change(base / "config.json", num_attention_heads=0, head_dim=None),
        "config.json",
    ),
    "a configuration nested deeply": (
        _file("config.json", '{"model_type": "llama", "x": ' + "[" * 50_000 + "]" * 50_000 + "}"),
        "the config.json of the base model",
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_a_hostile_base_model_is_refused(bench: Workbench, name: str) -> None:
    breaks, expected = BASES[name]
    bench.base = shutil.copytree(bench.base, bench.folder / "base")
    breaks(bench.base)
    ran = bench.run("validate", bench.job())
    assert expected in ran.result.message
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.INVALID_SPEC, False)


def _weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(base: Path) -> None:
        weights = load_file(base / "model.safetensors")
        change(weights)
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    return damage


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda base: _change(base / "config.json", **changes)


def _index(*shards: str) -> Callable[[Path], None]:
    def rename(base: Path) -> None:
        (base / "model.safetensors").rename(base / "weights.safetensors")
        (base / "pytorch_model.bin").write_bytes(b"a pickle")
        weight_map = {f"weight {number}": shard for number, shard in enumerate(shards)}
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return rename


_QUERIES = "model.layers.0.self_attn.q_proj.weight"
MISFITS: dict[str, tuple[Callable[[Path], None], str, FailureReason]] = {
    "without some weights": (
        # Its library would fill them with random numbers.
        _weights(lambda weights: weights.pop("model.norm.weight")),
        "the files of the base model lack weights: model.norm.weight: copy",
        FailureReason.INVALID_SPEC,
    ),
    "a size in the billions": (
        _config(hidden_size=10**9),
        "config.json: lm_head.weight has the shape [382, 64] in the files and [382, 1000000000] according to",
        FailureReason.INVALID_SPEC,
    ),
    "another number of heads": (_config(num_key_value_heads=1), "do not fit its config", FailureReason.INVALID_SPEC),
    "more layers": (_config(num_hidden_layers=3), "lack weights: model.layers.2.", FailureReason.INVALID_SPEC),
    "another architecture": (_config(model_type="gpt2"), "lack weights: transformer.", FailureReason.INVALID_SPEC),
    "eight bits without their settings": (
        _weights(lambda weights: weights.update({_QUERIES: weights[_QUERIES].char()})),
        "is of the type I8), but its config.json has no quantization_config",
        FailureReason.INVALID_SPEC,
    ),
    "settings of eight bits without them": (
        _config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "is published in 8 bits (bitsandbytes int8), but none of its weights is: remove quantization_config",
        FailureReason.INVALID_SPEC,
    ),
    "settings of four bits without them": (
        _config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "is published in 4 bits (bitsandbytes fp4), but none of its weights is",
        FailureReason.INVALID_SPEC,
    ),
    "a number that is none": (_config(rms_norm_eps=math.nan), "has rms_norm_eps nan", FailureReason.INVALID_SPEC),
    "a share above one": (_config(attention_dropout=5), "has attention_dropout 5", FailureReason.INVALID_SPEC),
    "an encoder": (_config(is_encoder_decoder=True), "has an encoder besides its", FailureReason.INVALID_SPEC),
    "labels by the billion": (_config(num_labels=10**9), "has num_labels 1000000000", FailureReason.INVALID_SPEC),
    "weights in a file of their own name": (
        _config(transformers_weights="others.safetensors"),
        "names its file with weights (transformers_weights), which engines do not read: rename",
        FailureReason.INVALID_SPEC,
    ),
    "an adapter beside": (
        _file("adapter_config.json", '{"peft_type": "LORA"}'),
        "has an adapter beside the base model (adapter_config.json), which would be loaded into it",
        FailureReason.INVALID_SPEC,
    ),
    "weights under another name": (
        lambda base: (base / "model.safetensors").rename(base / "weights.safetensors") and None,
        "has neither model.safetensors nor model.safetensors.index.json",
        FailureReason.BASE_MODEL_NOT_FOUND,
    ),
    "an index that names nothing": (_index(), "index.json in file", FailureReason.BASE_MODEL_NOT_FOUND),
    "an index that names a pickle": (
        _index("weights.safetensors", "pytorch_model.bin"),
        "names pytorch_model.bin, and only .safetensors files are loaded",
        FailureReason.BASE_MODEL_NOT_FOUND,
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_are_not_those_of_the_configuration_need_no_gpu(bench: Workbench, name: str) -> None:
    breaks, expected, reason = MISFITS[name]
    bench.base = shutil.copytree(bench.base, bench.folder / "base")
    breaks(bench.base)
    ran = bench.run("validate", bench.job())
    assert expected in ran.result.message
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, reason, False)


def test_settings_for_generation_reach_the_artifact_and_nothing_else(bench: Workbench) -> None:
    """Some would fail hours later, when the artifact is packaged; others would change the recorded answers."""
    bench.base = shutil.copytree(bench.base, bench.folder / "base")
    settings = {"eos_token_id": [2], "temperature": 0.6, "repetition_penalty": -1.0, "max_new_tokens": 0, "dola": "x"}
    text = json.dumps(settings | {"penalty_alpha": 0.6, "cache_implementation": "none", "stop_strings": ["a"]})
    _file("generation_config.json", text)(bench.base)
    ran = bench.run("train", bench.job(method={"full": {}}))
    assert ran.code == 0, ran.result.message
    assert (bench.output / "artifact/generation_config.json").read_text() == text


def test_end_tokens_that_the_tokenizer_does_not_have_are_ignored(bench: Workbench) -> None:
    bench.base = shutil.copytree(bench.base, bench.folder / "base")
    _file("generation_config.json", json.dumps({"eos_token_id": [-5, 2, 2**63, True, []]}))(bench.base)
    ran = bench.run("validate", bench.job())
    assert ran.code == 0, ran.result.message


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), FailureReason.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device", "rows.arrow"), FailureReason.OUT_OF_DISK),
        (RuntimeError("cannot write: No space left on device (os error 28)"), FailureReason.OUT_OF_DISK),
        (Exception("WordLevel error: Missing [UNK] token"), FailureReason.INTERNAL_ERROR),
        (OSError(errno.EROFS, "Read-only file system", "out/metrics.csv"), FailureReason.INTERNAL_ERROR),
    ],
    ids=["memory", "disk", "disk of a library", "tokenizer", "read-only disk"],
)
def test_what_would_fail_again_is_not_retried(error: Exception, reason: FailureReason) -> None:
    result = failure(error, Ranks())
    assert (result.reason, result.retryable) == (reason, False)
