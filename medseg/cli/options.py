"""Options shared by the commands: global options, `--json [FILE]`, common options, and help pages with examples."""

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
# Typer exports no public name for it.
_UsageError: Any = typer.BadParameter.__base__


class LogFormat(str, Enum):
    """Format of the messages on standard error."""

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
        raise RequestError("--quiet and --verbose are mutually exclusive: give one of them")


def _set_format(given: LogFormat) -> None:
    verbosity.as_json = verbosity.as_json or given is LogFormat.json


def _check_json(target: str | None) -> str | None:
    """Refuse a target that is probably an input, such as an image, before any work is done."""
    if target not in (None, "-"):
        path = Path(str(target))
        if path.suffix.lower() != ".json":
            raise RequestError(f"--json {target}: the file name must end in .json; for standard output put --json last")
        if not path.absolute().parent.is_dir():
            raise RequestError(f"--json {target}: no folder '{path.parent}'; create it first")
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
        help="List every skipped file, and print the debug log.",
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
        help="Format of progress, warnings and errors on standard error; json writes one object per line.",
    ),
]
BundleName = Annotated[
    str,
    typer.Argument(
        help="Folder of a bundle, or name of a shipped bundle.",
        metavar="BUNDLE",
        autocompletion=completion.bundle_names,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        show_default="the bundle's settings",
        help="Override a setting of the bundle; VALUE is JSON or text. Repeatable.",
        autocompletion=completion.setting_names,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        show_default="device_name of the bundle",
        help="Computing device: auto, cpu, cuda or cuda:N.",
        autocompletion=completion.devices,
    ),
]
DataSet = Annotated[
    Path,
    typer.Option(
        "--data",
        "-d",
        metavar="DATASET",
        help="Folder of the data set, with dataset.json, or with images/, labels/ and split.json.",
    ),
]
Split = Annotated[
    str, typer.Option(metavar="SPLIT", help="Split to use: val, train or test.", autocompletion=completion.splits)
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Treat warnings as errors: a case with a warning fails without output."),
]
Trust = Annotated[
    str | None,
    typer.Option(
        metavar="SHA256",
        show_default="declarative bundles only",
        help="Run a bundle that contains executable code, if its fingerprint (see bundle inspect) is SHA256.",
    ),
]
JsonTarget = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="[FILE]",
        callback=_check_json,
        show_default=False,
        help="Write the result as JSON to FILE (.json), or without FILE to standard output, in place of the tables.",
    ),
]


class Command(TyperCommand):
    """Command that also accepts the global options, and `--json` with or without a file."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Typer keeps the line breaks of all paragraphs except the first.
        self.help = "\n\n".join(" ".join(each.split()) for each in (self.help or "").split("\n\n"))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line and raise usage errors as `RequestError`."""
        try:
            return list(super().parse_args(ctx, _with_json_target(args)))
        except _UsageError as error:
            raise _refused(error, ctx) from error

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters of the command and the global options."""
        return _with_global_options(super().get_params(ctx), ctx)


class Group(TyperGroup):
    """Group of commands that also accepts the global options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line up to the command's name and raise usage errors as `RequestError`."""
        try:
            return list(super().parse_args(ctx, args))
        except _UsageError as error:
            raise _refused(error, ctx) from error

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command and raise `RequestError` if it is unknown."""
        try:
            return super().resolve_command(ctx, args)
        except _UsageError as error:
            raise _refused(error, ctx) from error

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters of the group and the global options."""
        return _with_global_options(super().get_params(ctx), ctx)


def _refused(error: Any, ctx: Any) -> Exception:
    if type(error).__name__ == "NoArgsIsHelpError":
        return error  # type: ignore[no-any-return]  # no error: Typer prints the help page
    fault = error.format_message()
    return RequestError(f"{fault}{'' if fault.endswith(('.', '?')) else '.'} See `{ctx.command_path} --help`")


def _with_global_options(params: list[Any], ctx: Any) -> list[Any]:
    own = {param.name for param in params}
    root = ctx.find_root().command
    known = params + [param for param in root.params if param.name in _GLOBAL and param.name not in own]
    for param in known:
        # Typer would print Python types, such as list[Path], for arguments, and a type even for flags.
        if param.param_type_name == "argument":
            param.display_type_rich = _no_type
        elif getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return known


def _no_type(ctx: Any) -> None:
    """Show no type of an argument on help pages."""


def _with_json_target(args: list[str]) -> list[str]:
    """Insert `-` (standard output) as the value of `--json` if none follows."""
    found: list[str] = []
    for number, argument in enumerate(args):
        if argument == "--":
            return found + args[number:]
        following = args[number + 1] if number + 1 < len(args) else "-"
        found.append("--json=-" if argument == "--json" and following.startswith("-") else argument)
    return found


def examples(*commands: str) -> str:
    """Return the section of a help page with example commands."""
    return "\n".join(["[bold]Examples[/]", *map(escape, commands)])


def with_options(settings: list[str] | None, **values: str | float | None) -> list[str]:
    """Return the settings, extended by the values of options that set one, if given."""
    return [
        *(settings or []),
        *(f"{name}={json.dumps(value)}" for name, value in values.items() if value not in (None, "")),
    ]
