"""What the commands share on the command line: global options, `--json [FILE]`, common options, pages with examples."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from medseg.cli import completion
from medseg.cli.console import reserve_stdout, verbosity
from medseg.cli.log import show_debug_log
from medseg.errors import RequestError

__all__ = [
    "BundleName",
    "Command",
    "DataSet",
    "Device",
    "Group",
    "JsonTarget",
    "LogFormat",
    "LogFormatOption",
    "Quiet",
    "Settings",
    "Split",
    "Strict",
    "Trust",
    "Verbose",
    "examples",
    "with_options",
]

_GLOBAL: Final = ("quiet", "verbose", "log_format")
_PANEL: Final = "Messages"
# Typer has no public name for it
_UsageError: Any = typer.BadParameter.__base__


class LogFormat(str, Enum):
    """Form of the messages on standard error."""

    text = "text"
    json = "json"


def _be_quiet(given: bool) -> None:
    verbosity.quiet = verbosity.quiet or given
    _check_verbosity()


def _be_verbose(given: bool) -> None:
    verbosity.verbose = verbosity.verbose or given
    _check_verbosity()
    if given:
        show_debug_log()


def _check_verbosity() -> None:
    if verbosity.quiet and verbosity.verbose:
        raise RequestError("--quiet and --verbose exclude each other: give one of them")


def _set_format(given: LogFormat) -> None:
    verbosity.as_json = verbosity.as_json or given is LogFormat.json


def _check_json(target: str | None) -> str | None:
    """Refuse a file that is hardly meant to be replaced, before any work is done."""
    if target not in (None, "-"):
        path = Path(str(target))
        if path.suffix.lower() != ".json":
            raise RequestError(
                f"--json {target}: the name of the file must end in .json; for standard output put --json last"
            )
        if not path.absolute().parent.is_dir():
            raise RequestError(f"--json {target}: no folder '{path.parent}'; make it first")
    reserve_stdout(target)
    return target


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        callback=_be_quiet,
        is_eager=True,
        expose_value=False,
        rich_help_panel=_PANEL,
        help="Print errors and results only.",
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_be_verbose,
        is_eager=True,
        expose_value=False,
        rich_help_panel=_PANEL,
        help="List every skipped file, and print medseg's debug log.",
    ),
]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        callback=_set_format,
        is_eager=True,
        expose_value=False,
        rich_help_panel=_PANEL,
        help="Form of progress, warnings and errors on standard error; json: one JSON object per line.",
    ),
]
BundleName = Annotated[
    str,
    typer.Argument(
        help="Bundle folder, or name of a shipped bundle.", metavar="BUNDLE", autocompletion=completion.bundle_names
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        show_default="the bundle's settings",
        help="Change a setting of the bundle; the value is JSON or text. Repeatable.",
        autocompletion=completion.setting_names,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        show_default="device_name of the bundle",
        help="Device to compute on: auto, cpu, cuda or cuda:N.",
        autocompletion=completion.devices,
    ),
]
DataSet = Annotated[
    Path,
    typer.Option(
        "--data", "-d", metavar="DATASET", help="Folder with dataset.json, or with images/, labels/ and split.json."
    ),
]
Split = Annotated[
    str, typer.Option(metavar="SPLIT", help="Cases to use: val, train or test.", autocompletion=completion.splits)
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Treat warnings as errors: a case with one fails, and nothing is written for it."),
]
Trust = Annotated[
    str | None,
    typer.Option(
        metavar="SHA256",
        show_default="declarative bundles only",
        help="Run this bundle although it contains executable code, if it has this fingerprint.",
    ),
]
JsonTarget = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="[FILE]",
        callback=_check_json,
        show_default=False,
        help="Write the result as JSON to FILE (.json); without FILE to standard output, which then holds nothing "
        "else.",
    ),
]


class Command(TyperCommand):
    """A command that takes the global options too, and `--json` with or without a file."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Typer keeps the line breaks of all paragraphs but the first
        self.help = "\n\n".join(" ".join(each.split()) for each in (self.help or "").split("\n\n"))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line; errors in it are ours."""
        try:
            return list(super().parse_args(ctx, _with_json_target(args)))
        except _UsageError as error:
            raise _refused(error, ctx) from error

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters of the command and the global options."""
        return _with_global_options(super().get_params(ctx), ctx)


class Group(TyperGroup):
    """A group of commands that takes the global options too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line up to the name of the command; errors in it are ours."""
        try:
            return list(super().parse_args(ctx, args))
        except _UsageError as error:
            raise _refused(error, ctx) from error

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; an unknown one is an error of ours."""
        try:
            return super().resolve_command(ctx, args)
        except _UsageError as error:
            raise _refused(error, ctx) from error

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters of the group and the global options."""
        return _with_global_options(super().get_params(ctx), ctx)


def _refused(error: Any, ctx: Any) -> Exception:
    if type(error).__name__ == "NoArgsIsHelpError":
        return error  # type: ignore[no-any-return]  # not an error: the help page
    fault = error.format_message()
    return RequestError(f"{fault}{'' if fault.endswith(('.', '?')) else '.'} See `{ctx.command_path} --help`")


def _with_global_options(params: list[Any], ctx: Any) -> list[Any]:
    own = {param.name for param in params}
    root = ctx.find_root().command
    known = params + [param for param in root.params if param.name in _GLOBAL and param.name not in own]
    for param in known:
        # A switch takes no value, whose type could be named
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return known


def _with_json_target(args: list[str]) -> list[str]:
    """Give `--json` standard output as its value where none follows."""
    found: list[str] = []
    for number, argument in enumerate(args):
        if argument == "--":
            return found + args[number:]
        following = args[number + 1] if number + 1 < len(args) else "-"
        found.append("--json=-" if argument == "--json" and following.startswith("-") else argument)
    return found


def examples(*commands: str) -> str:
    """Return the end of a help page: the commands as they are typed."""
    return "\n".join(["[bold]Examples[/]", *map(escape, commands)])


def with_options(settings: list[str] | None, **values: str | float | None) -> list[str]:
    """Return the settings with those among them that have options of their own, as far as these were given."""
    return [
        *(settings or []),
        *(f"{name}={json.dumps(value)}" for name, value in values.items() if value not in (None, "")),
    ]
