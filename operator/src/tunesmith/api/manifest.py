"""Read a FineTuneJob from a YAML text without a cluster, by the CRD's rules, with a sentence per mistake."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.method import METHODS
from tunesmith.api.model import API_VERSION
from tunesmith.api.schema import resolved_schema
from tunesmith.api.uri import LOCAL_ONLY

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from pydantic_core import ErrorDetails

    from tunesmith.api.schema import Schema

_MAX_SHOWN = 60
_MAX_VALUES = 200_000
"""Highest number of values in a YAML document; a few lines of aliases can stand for billions."""
_EXACT = 2**53
"""Whole numbers below it are exact as floats."""


class ManifestError(ValueError):
    """A manifest that cannot be used. `problems` has one sentence per mistake: where, what, and how to fix it."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def parse_manifest(text: str, *, allow_file: bool = True) -> FineTuneJob:
    """Return the FineTuneJob in a YAML (or JSON) text, which must not contain other documents.

    Args:
        text: The manifest, as `kubectl apply` accepts it.
        allow_file: True if file:// uris are allowed, as in a local run.

    Raises:
        ManifestError: the text is not a FineTuneJob that the API server would accept; it lists all mistakes.
    """
    document = load_document(text)
    schema = _schema()
    problems = [*_envelope(document), *_nulls(document.get("spec"), "spec", _node(schema, ("spec",)))]
    if problems:
        raise ManifestError(problems)
    try:
        job = FineTuneJob.model_validate_json(json.dumps(document), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise ManifestError(dict.fromkeys(_sentence(detail, schema) for detail in error.errors())) from None
    if not allow_file and (
        local := [path for path, uri in _uris(document["spec"], "spec") if uri.startswith("file://")]
    ):
        raise ManifestError(f"{path}: {LOCAL_ONLY}" for path in local)
    return job


@cache
def _schema() -> Schema:
    return resolved_schema(FineTuneJob)


class _Loader(yaml.SafeLoader):
    """YAML loader that reads as Kubernetes does: 2e-4 is a number, dates and times are text, keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} appears twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
"""Plain scalars that are numbers, without YAML 1.1's times such as 1:30. An integer matches both and is an integer."""
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in {*_NUMBERS, "tag:yaml.org,2002:timestamp"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list("-+.0123456789"))


def load_document(text: str) -> dict[str, Any]:
    """Return the only YAML (or JSON) document in a text. As in Kubernetes, 8.0 is the whole number 8.

    Raises:
        ManifestError: the text is not a single mapping.
    """
    try:
        document = _json_document(text)
        documents = [document] if document is not None else _yaml_documents(text)
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}" if error.problem_mark else "the manifest"
        raise ManifestError([f"{place}: the manifest is not valid YAML: {error.problem or error}"]) from None
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ManifestError([f"the manifest is not valid YAML: {error}"]) from None
    if not documents:
        raise ManifestError(["the manifest is empty: write a FineTuneJob into it"])
    if len(documents) > 1:
        raise ManifestError([f"the manifest has {len(documents)} documents: keep one FineTuneJob"])
    if not isinstance(documents[0], dict):
        raise ManifestError(["the manifest is not a mapping: it begins with apiVersion and kind"])
    return documents[0]


def _json_document(text: str) -> dict[str, Any] | None:
    """Return the JSON object in a text; None if the text is not JSON, which is then read as YAML.

    Raises:
        ValueError: a key appears twice.
    """
    if not text.lstrip().startswith("{"):
        return None
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        return dict(pairs)

    try:
        document = json.loads(text, object_pairs_hook=unique, parse_constant=_refuse)
    except json.JSONDecodeError:
        return None
    if repeated:
        raise ValueError(f"{repeated[0]} appears twice")
    found: dict[str, Any] = _with_whole_numbers(document)
    return found


def _refuse(constant: str) -> None:
    raise json.JSONDecodeError(f"{constant} is not JSON", constant, 0)


def _yaml_documents(text: str) -> list[Any]:
    loader = _Loader(text)
    documents = []
    try:
        while loader.check_node():
            node: Any = loader.get_node()
            _require_size(node, {})
            documents.append(loader.construct_document(node))
    finally:
        loader.dispose()
    documents = [document for document in documents if document is not None]
    json.dumps(documents)  # raises an error for values that JSON does not have
    return [_with_whole_numbers(document) for document in documents]


def _require_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of values of a document, in which each alias stands for all values of its anchor.

    Args:
        node: root of the document, or a part of it.
        sizes: numbers of the parts that were counted, by id; 0: of a part around this one.

    Raises:
        ValueError: there are too many values, or an alias stands for a part around it.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError("an alias (*) refers to a part that contains it: remove the alias")
        return sizes[id(node)]
    sizes[id(node)] = 0
    children: Iterable[yaml.Node] = ()
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = (child for pair in node.value for child in pair)
    size = 1
    for child in children:
        size += _require_size(child, sizes)
        if size > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES} values, counting those of each alias (*)")
    sizes[id(node)] = size
    return size


def _with_whole_numbers(node: Any) -> Any:  # noqa: ANN401 - any YAML value
    """Return the node with floats that are whole numbers as integers, as the API server stores them."""
    if isinstance(node, dict):
        return {key: _with_whole_numbers(child) for key, child in node.items()}
    if isinstance(node, list):
        return [_with_whole_numbers(child) for child in node]
    return int(node) if isinstance(node, float) and node.is_integer() and abs(node) < _EXACT else node


def _envelope(document: dict[str, Any]) -> Iterator[str]:
    """Yield the mistakes in the fields around spec, which Kubernetes checks before the CRD's schema."""
    for field, expected in (("apiVersion", API_VERSION), ("kind", "FineTuneJob")):
        found = document.get(field)
        if found is None:
            yield f"{field} is missing: write {field}: {expected}"
        elif found != expected:
            yield f"{field} is {_shown(found)}: it must be {expected}"
    known = ("apiVersion", "kind", "metadata", "spec", "status")
    yield from (_unknown(str(field), str(field), known) for field in document if field not in known)
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not metadata.get("name"):
        yield "metadata.name is missing: give the job a name"
    if not isinstance(document.get("spec"), dict):
        yield "spec is missing: it must contain baseModel, dataset and method"


def _nulls(node: object, path: str, schema: Schema) -> Iterator[str]:
    """Yield a sentence per field without a value: the API server refuses it; dropping it could change the meaning."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(node, dict):
        for key, child in node.items():
            if child is None:
                yield f"{path}.{key} has no value: give it one (an object with all defaults is {{}}) or remove the line"
            yield from _nulls(child, f"{path}.{key}", _node(schema, (str(key),)))
    if isinstance(node, list):
        for index, child in enumerate(node):
            yield from _nulls(child, f"{path}[{index}]", _node(schema, (index,)))


def _uris(node: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, child in node.items():
            if key == "uri" and isinstance(child, str):
                yield f"{path}.uri", child
            yield from _uris(child, f"{path}.{key}")
    if isinstance(node, list):
        for index, child in enumerate(node):
            yield from _uris(child, f"{path}[{index}]")


def _sentence(detail: ErrorDetails, schema: Schema) -> str:
    """Return a pydantic error as a sentence: the path, what is wrong and how to fix it."""
    location = detail["loc"]
    path = _path(location)
    context = detail.get("ctx", {})
    shown = _shown(detail["input"])
    match detail["type"]:
        case "missing":
            return f"{path} is missing: {_node(schema, location).get('description', 'it is required')}"
        case "extra_forbidden":
            known = _node(schema, location[:-1]).get("properties", {})
            return _unknown(path, str(location[-1]), known, _peft_names(location[:-1]))
        case "value_error":
            return f"{path}: {context['error']}" if path else str(context["error"])
        case "literal_error" | "enum":
            values = [str(value) for value in _node(schema, location).get("enum", [])]
            return f"{path} is {shown}: it must be {' or '.join(values)}{_meant(str(detail['input']), values)}"
        case "greater_than_equal":
            return f"{path} is {shown}: it must be at least {context['ge']}"
        case "less_than_equal":
            return f"{path} is {shown}: it must be at most {context['le']}"
        case "too_short" | "string_too_short":
            return f"{path} is empty: {_node(schema, location).get('description', 'it needs a value')}"
        case "too_long" | "string_too_long":
            return f"{path} is too long: at most {context['max_length']} are allowed"
        case kind:
            return f"{path} is {shown}: it must be {_EXPECTED.get(kind, detail['msg'])}"


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text; put it in quotes",
    "list_type": "a list",
    "dict_type": "a mapping of names to text",
    "model_type": "an object with fields",
    "model_attributes_type": "an object with fields",
}


def _unknown(path: str, name: str, known: Iterable[str], synonyms: Mapping[str, str] | None = None) -> str:
    names = list(known)
    meant = f"; did you mean {synonyms[name]}?" if synonyms and name in synonyms else _meant(name, names)
    return f"{path} is not a known field{meant or ': known fields are ' + ', '.join(names)}"


def _peft_names(location: tuple[int | str, ...]) -> dict[str, str]:
    """Return the names of a method's fields by PEFT's names; empty for other objects."""
    match location:
        case ("spec", "method", str(name)) if name in METHODS:
            model = METHODS[name]
            return {found.key: str(model.model_fields[field].alias) for field, found in model.peft_names.items()}
        case _:
            return {}


def _meant(found: str, known: list[str]) -> str:
    """Return `; did you mean …?` for the closest known word, ignoring case; empty if none is close."""
    by_folded = {word.casefold().replace("_", ""): word for word in known}
    near = difflib.get_close_matches(found.casefold().replace("_", ""), by_folded, n=1)
    return f"; did you mean {by_folded[near[0]]}?" if near else ""


def _path(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _node(schema: Schema, location: tuple[int | str, ...]) -> Schema:
    """Return the schema at a location; empty for an unknown location."""
    for part in location:
        schema = schema.get("items", {}) if isinstance(part, int) else schema.get("properties", {}).get(part, {})
    return schema


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"
