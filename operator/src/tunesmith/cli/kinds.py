"""Kinds of resources, their names on the command line, and reading of resources."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.servingpool import ServingPool
from tunesmith.cli.errors import CliError, Exit

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object

Resource = FineTuneJob | AdapterDeployment | ServingPool


class Kind(StrEnum):
    """A kind of resource; the value is its name on the command line."""

    JOB = "job"
    ADAPTER = "adapter"
    POOL = "pool"

    @property
    def resource(self) -> str:
        """The Kubernetes kind, such as FineTuneJob."""
        return _MODELS[self].__name__


_MODELS: dict[Kind, type[FineTuneJob | AdapterDeployment | ServingPool]] = {
    Kind.JOB: FineTuneJob,
    Kind.ADAPTER: AdapterDeployment,
    Kind.POOL: ServingPool,
}
_SHORT_NAMES = {"ftj": Kind.JOB, "adep": Kind.ADAPTER, "spool": Kind.POOL}


def parse_kind(text: str) -> Kind:
    """Return the kind that a word names: singular, plural, kubectl's short name or the kind itself, in any case.

    Raises:
        CliError: the word names no kind.
    """
    word = text.lower()
    for kind in Kind:
        if word.removesuffix("s") in {kind, kind.resource.lower()} or _SHORT_NAMES.get(word) is kind:
            return kind
    raise CliError(f"{text!r} is not a kind of resource: use job, adapter or pool", Exit.USAGE)


def complete_kind(incomplete: str) -> list[str]:
    """Return the words for shell completion."""
    return [kind for kind in Kind if kind.startswith(incomplete)]


KindArgument = Annotated[
    Kind,
    typer.Argument(
        parser=parse_kind,
        metavar="KIND",
        autocompletion=complete_kind,
        help="job, adapter or pool.",
        show_default=False,
    ),
]
OptionalKindArgument = Annotated[
    Kind | None,
    typer.Argument(
        parser=parse_kind,
        metavar="KIND",
        autocompletion=complete_kind,
        help="job, adapter or pool; absent: all three.",
        show_default=False,
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the resource.")]


def parse(kind: Kind, document: Object) -> Any:  # noqa: ANN401 - the kind's model
    """Return a resource as its model.

    Raises:
        CliError: this release cannot read it.
    """
    try:
        return _MODELS[kind].model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        metadata = document["metadata"]
        raise CliError(
            f"{kind.resource} {metadata.get('namespace')}/{metadata['name']} does not fit this release of tunesmith: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}; use the CLI of the cluster's release"
        ) from None


async def fetch(cluster: Cluster, kind: Kind, namespace: str, name: str) -> Object:
    """Return a resource as read from the API server.

    Raises:
        CliError: the resource does not exist.
    """
    found = await cluster.find(kind.resource, name, namespace)
    if found is None:
        raise missing(kind, namespace, name)
    return found


def missing(kind: Kind, namespace: str, name: str) -> CliError:
    """Return the error about a resource that does not exist."""
    return CliError(
        f"{kind.resource} {namespace}/{name} does not exist: `tunesmith list {kind}s -n {namespace}` lists those that"
        " exist"
    )
