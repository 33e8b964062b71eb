"""Uris in manifests: patterns, messages and rules, derived from the table of stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from tunesmith.api.model import Rule, StringPattern
from tunesmith.storage.schemes import SCHEMES, Use, examples, listed, pattern, prefixes

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_URI = 1024

BaseModelUri = Annotated[
    str, Field(max_length=MAX_URI), StringPattern(pattern(Use.BASE_MODEL), f"a uri is {examples(Use.BASE_MODEL)}")
]
DataUri = Annotated[str, Field(max_length=MAX_URI), StringPattern(pattern(Use.DATA), f"a uri is {examples(Use.DATA)}")]
TasksUri = Annotated[
    str, Field(max_length=MAX_URI), StringPattern(pattern(Use.TASKS), f"a uri is {examples(Use.TASKS)}")
]
ExportUri = Annotated[
    str,
    Field(max_length=MAX_URI),
    StringPattern(
        pattern(Use.EXPORT),
        f"a uri of a copy is {examples(Use.EXPORT)}, without a trailing slash; copies to the Hugging Face Hub use hub: "
        "organisation/name",
    ),
]

LOCAL_ONLY = f"file:// uris work only in a local run (tunesmith run): in a cluster use {prefixes(Use.BASE_MODEL)}"
_PARENT_REFERENCE = "a uri must not contain '..': write the resolved path"
_WITH_CREDENTIALS = [f"{scheme.name}://" for scheme in SCHEMES if scheme.credentials]
_WITHOUT = [f"{scheme.name}://" for scheme in SCHEMES if not scheme.credentials and not scheme.local_only]


def _without_parent_reference(uri: Callable[[Any], str | None]) -> Callable[[Any], bool]:
    return lambda self: uri(self) is None or "/../" not in f"{uri(self)}/"


uri_rules = (
    Rule("!self.uri.startsWith('file://')", LOCAL_ONLY),
    Rule("!(self.uri + '/').contains('/../')", _PARENT_REFERENCE, _without_parent_reference(lambda self: self.uri)),
)
"""Rules of every model with a `uri`. A local run accepts file://."""
optional_uri_rules = (
    Rule("!has(self.uri) || !self.uri.startsWith('file://')", LOCAL_ONLY),
    Rule(
        "!has(self.uri) || !(self.uri + '/').contains('/../')",
        _PARENT_REFERENCE,
        _without_parent_reference(lambda self: self.uri),
    ),
)
"""Rules of every model with an optional `uri`."""
_WITHOUT_CEL = " || ".join(f"self.uri.startsWith('{prefix}')" for prefix in _WITHOUT)
secret_rule = Rule(
    f"!has(self.secretRef) || !({_WITHOUT_CEL})",
    f"secretRef is only for {listed(_WITH_CREDENTIALS, 'and')} uris; {listed(_WITHOUT, 'and')} uris are read without "
    "credentials: remove the secretRef",
    lambda self: self.secret_ref is None or not self.uri.startswith(tuple(_WITHOUT)),
)
"""Rule of every model with a `uri` and a `secretRef`."""
