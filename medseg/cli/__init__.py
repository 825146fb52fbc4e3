"""The `medseg` command. Arguments are checked before torch or MONAI are imported."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from medseg.cli import bundle, compare, convert, demo, doctor, evaluate, export, label, plan, predict, prune, train
from medseg.cli.console import errors, output, print_error, reset
from medseg.cli.log import warnings_at_the_end
from medseg.cli.options import Command, Group, LogFormat, LogFormatOption, Quiet, Verbose, examples
from medseg.errors import MedsegError
from medseg.version import __version__

__all__ = ["app", "main"]

# Exit code of Typer after Ctrl-C; it does not re-raise KeyboardInterrupt.
_INTERRUPTED: Final = 130

_USE: Final = "Use"
_TRAIN: Final = "Train"
_EVALUATE: Final = "Judge"
_SHARE: Final = "Share"
_EXIT_CODES: Final = """[bold]Exit codes[/]
0 success
1 some cases failed, or a check found errors
2 invalid request"""

app = typer.Typer(
    name="medseg",
    cls=Group,
    help="Segment medical images with networks of the U-Net family, as MONAI bundles.",
    epilog=examples(
        "medseg demo",
        "medseg predict hippocampus_mri_unet scan.nii.gz -o masks",
        "medseg predict --help",
    )
    + f"\n\n{_EXIT_CODES}",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _name, _function, _panel, _lines in (
    ("demo", demo.demo, _USE, ("medseg demo", "medseg demo -o try_it")),
    (
        "predict",
        predict.predict,
        _USE,
        (
            "medseg predict hippocampus_mri_unet scan.nii.gz -o masks --overlay",
            "medseg predict my_bundle scans -o masks --set overlap=0.5 --resume",
        ),
    ),
    ("doctor", doctor.doctor, _USE, ("medseg doctor scans", "medseg doctor data --bundle my_bundle --fix repaired")),
    ("phantoms", demo.phantoms, _TRAIN, ("medseg phantoms data --cases 12 --validation 4",)),
    (
        "plan",
        plan.plan,
        _TRAIN,
        ("medseg plan data -o liver_ct_unet", "medseg plan data -o liver_ct_banet --network banet --budget 12h"),
    ),
    (
        "train",
        train.train,
        _TRAIN,
        (
            "medseg train liver_ct_unet --data data --set max_epochs=50",
            "medseg train hippocampus_mri_unet --data data -o my_bundle --folds 5",
        ),
    ),
    (
        "convert",
        convert.convert,
        _TRAIN,
        ("medseg convert model.npz --from unet-port --to cell_microscopy_unet --like membrane_em_unet",),
    ),
    (
        "evaluate",
        evaluate.evaluate,
        _EVALUATE,
        ("medseg evaluate my_bundle --data data", "medseg evaluate my_bundle --data data --split test -o scores"),
    ),
    (
        "compare",
        compare.compare,
        _EVALUATE,
        ("medseg compare unet_folds banet_folds", "medseg compare scores_a scores_b --json table.json"),
    ),
    ("prune", prune.prune, _EVALUATE, ("medseg prune my_bundle --data data --select 0.005 -o smaller",)),
    (
        "export",
        export.export,
        _SHARE,
        (
            "medseg export my_bundle --format onnx -o model.onnx",
            "medseg export my_bundle --format ts --half -o model.ts",
        ),
    ),
):
    app.command(_name, cls=Command, rich_help_panel=_panel, epilog=examples(*_lines))(_function)
app.add_typer(label.app, name="label", rich_help_panel=_USE)
app.add_typer(bundle.app, name="bundle", rich_help_panel=_SHARE)


def _version(given: bool) -> None:
    if given:
        output.print(f"medseg {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_format: LogFormatOption = LogFormat.text,
) -> None:
    """Segment medical images with networks of the U-Net family, as MONAI bundles."""


def main() -> None:
    """Run the command line; medseg errors become a message and an exit code."""
    reset()
    try:
        with warnings_at_the_end():
            app()
    except MedsegError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            errors.print("Stopped. Finished results are kept; repeat the command with --resume to continue.")
        raise
