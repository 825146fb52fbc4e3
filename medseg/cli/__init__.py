"""The `medseg` command. Arguments are checked before torch or MONAI are imported."""

from __future__ import annotations

import sys
from typing import Final

import typer

from medseg.cli import bundle, compare, convert, demo, doctor, evaluate, export, plan, predict, prune, train
from medseg.cli.console import errors
from medseg.cli.log import warnings_at_the_end
from medseg.errors import MedsegError
from medseg.version import __version__

__all__ = ["app", "main"]

# The exit code that Typer gives an interruption by Ctrl-C, which it does not pass on.
_INTERRUPTED: Final = 130

app = typer.Typer(
    name="medseg",
    help="Segment medical images with U-Net families, as MONAI bundles.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("predict")(predict.predict)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("convert")(convert.convert)
app.command("prune")(prune.prune)
app.command("export")(export.export)
app.command("doctor")(doctor.doctor)
app.add_typer(bundle.app, name="bundle")
app.command("phantoms")(demo.phantoms)
app.command("demo")(demo.demo)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"medseg {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Segment medical images with U-Net families, as MONAI bundles."""


def main() -> None:
    """Run the command line; errors of ours become one message and an exit code."""
    try:
        with warnings_at_the_end():
            app()
    except MedsegError as error:
        errors.print(f"[bold red]Error:[/] {_escaped(str(error))}", markup=True, soft_wrap=True)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            errors.print("Stopped. What was finished is kept; the same command with --resume goes on.")
        raise


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
