"""Settings of the programs: pydantic models, read from flags and, where a flag is absent, from the environment."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import BeforeValidator, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from tunesmith.contracts.settings import ChartValue, Internal, Namespaces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic_core import ErrorDetails

VARIABLE_PREFIX = "TUNESMITH_"


class ProgramSettings(BaseSettings):
    """Settings of one program: `--max-loras` or the variable TUNESMITH_MAX_LORAS sets the field `max_loras`."""

    model_config = SettingsConfigDict(
        frozen=True,
        use_attribute_docstrings=True,
        env_prefix=VARIABLE_PREFIX,
        enable_decoding=False,  # lists are comma-separated; the fields' own validators split them
        cli_kebab_case=True,
        cli_implicit_flags=True,
    )

    program: ClassVar[str]
    """Name of the program, with its command if it has several."""
    description: ClassVar[str]
    """Purpose of the program, for --help."""
    example: ClassVar[str]
    """Arguments of a complete call, for --help."""


class ClusterSettings(ProgramSettings):
    """Settings that the operator and the gateway share."""

    namespace: Annotated[str, ChartValue(".Release.Namespace", ".Release.Namespace")]
    """Namespace of the operator and the gateways, with their Lease, keys and API keys."""
    watch_namespaces: Annotated[Namespaces, ChartValue("watchNamespaces", narrower={"uniqueItems": True})] = ()
    """Namespaces whose resources are served, such as team-a,team-b; empty: all."""
    shared_pool_namespaces: Annotated[Namespaces, ChartValue("serving.sharedPoolNamespaces")] = ()
    """Namespaces whose pools serve adapters of other namespaces that name no pool, and whose base models may be called
    by their bare name; empty: the program's own."""
    require_metrics_token: Annotated[bool, ChartValue("metrics.requireToken")] = True
    """Serve /metrics only to requests with the token of the Secret tunesmith-metrics-token."""
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        BeforeValidator(lambda text: text.upper() if isinstance(text, str) else text),
        Internal("for a process that is started by hand"),
    ] = "INFO"
    """Lowest level that is logged."""

    @property
    def shared_namespaces(self) -> tuple[str, ...]:
        """Namespaces whose pools serve others."""
        return self.shared_pool_namespaces or (self.namespace,)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with one line on stderr, which appears in a pod's log; --help has the usage."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


Settings = TypeVar("Settings", bound=ProgramSettings)


def read(model: type[Settings], arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of the command line and the environment.

    Args:
        model: the program's model of settings.
        arguments: the command line without the program; None: this process's own.

    Raises:
        SystemExit: a flag is unknown, missing or invalid. The exit code is 2, and stderr has a sentence per problem.
    """
    parser = _Parser(
        prog=model.program,
        description=model.description,
        epilog=f"Each flag can be given as a variable: --log-level is {VARIABLE_PREFIX}LOG_LEVEL.\n"
        f"Example: {model.program} {model.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fields = {flag_of(name): name for name in model.model_fields}

    def add_argument(
        target: argparse.ArgumentParser,
        *names: str,
        **keywords: Any,  # noqa: ANN401 - what argparse accepts
    ) -> argparse.Action:
        flag = names[0].removeprefix("--")
        keywords["help"] = _help(model, fields[flag])
        if not keywords.get("metavar", "{").startswith("{"):
            # The library would show the annotation, such as `tuple[Annotated[str, …], ...]`.
            keywords["metavar"] = flag.rpartition("-")[2].upper()
        return target.add_argument(*names, **keywords)

    source: CliSettingsSource[Any] = CliSettingsSource(
        model,
        root_parser=parser,
        add_argument_method=add_argument,
        cli_parse_args=sys.argv[1:] if arguments is None else list(arguments),
    )
    try:
        return model(_cli_settings_source=source)
    except ValidationError as error:
        parser.error("; ".join(_sentence(model, detail) for detail in error.errors()))


def flag_of(field: str) -> str:
    """Return the flag of a field, without the leading dashes."""
    return field.replace("_", "-")


def source_of(model: type[ProgramSettings], field: str) -> ChartValue | Internal:
    """Return the source from which an installation sets a field.

    Raises:
        TypeError: the field's annotation has neither a ChartValue nor an Internal.
    """
    for entry in model.model_fields[field].metadata:
        if isinstance(entry, ChartValue | Internal):
            return entry
    raise TypeError(f"{model.__name__}.{field} has no source: annotate it with ChartValue(…) or Internal(…)")


def default_of(model: type[ProgramSettings], field: str) -> str | None:
    """Return a field's default in the format of its flag; None if the field is required."""
    info = model.model_fields[field]
    if info.is_required():
        return None
    if info.default_factory is not None:
        return "random"
    if info.default is None:
        return ""
    if isinstance(info.default, bool):
        return str(info.default).lower()
    if isinstance(info.default, float):
        return f"{info.default:g}"
    return ",".join(map(str, info.default)) if isinstance(info.default, tuple) else str(info.default)


def description_of(model: type[ProgramSettings], field: str) -> str:
    """Return the description of a field, on one line."""
    return " ".join((model.model_fields[field].description or "").split())


def _help(model: type[ProgramSettings], field: str) -> str:
    default, source = default_of(model, field), source_of(model, field)
    notes = ["required" if default is None else f"default: {default or 'empty'}"]
    if isinstance(source, ChartValue):
        notes.append(f"chart: {source.path}")
    return f"{description_of(model, field)} ({'; '.join(notes)})".replace("%", "%%")


def _sentence(model: type[ProgramSettings], detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    field = str(detail["loc"][0])
    setting = source_of(model, field)
    flag = f"--{flag_of(field)}" + (f" (chart value {setting.path})" if isinstance(setting, ChartValue) else "")
    if detail["type"] == "missing":
        return f"{flag} is missing: set it, or the variable {VARIABLE_PREFIX}{field.upper()}"
    if detail["type"] == "value_error":
        return f"{flag}: {message}"
    return f"{flag}: {detail['input']!r}: {message}".replace(": Input should be", " must be")
