"""`medseg phantoms` and `medseg demo`: the whole workflow on generated data, without downloads."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.console import output
from medseg.errors import RequestError
from medseg.files import check_folder

__all__ = ["demo", "phantoms"]

_NEXT = """
Try it on your own file:

  {medseg} predict hippocampus_mri_unet YOUR_SCAN.nii.gz -o masks --overlay
"""


def phantoms(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the data set, created if missing.")],
    cases: Annotated[int, typer.Option(metavar="N", help="Number of training and validation cases.", min=2)] = 8,
    validation: Annotated[int, typer.Option(metavar="N", help="Number of validation cases among them.", min=1)] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the random shapes.", min=0)] = 0,
) -> None:
    """Write a data set of CT-like phantoms with exact labels (lung, liver, nodule)."""
    check_folder(folder)
    from medseg.studies.phantoms import write_phantoms

    write_phantoms(folder, cases=cases, validation=validation, seed=seed)
    output.print(f"{cases - validation} training, {validation} validation and some test cases: {folder}")


def demo(
    folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="New folder of all files of the demo.")
    ] = Path("demo"),
) -> None:
    """Generate phantoms, train a small 3D network, predict an unseen volume and evaluate the result.

    Every step is a medseg command, which is printed before it runs.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise RequestError(f"'{folder}' is not empty; remove it or choose another folder with --output")
    data, bundle, masks = folder / "data", folder / "phantom_ct_unet", folder / "masks"
    _step("phantoms", str(data))
    _step("train", "phantom_ct_unet", "--data", str(data), "-o", str(bundle))
    unseen = json.loads((data / "dataset.json").read_text(encoding="utf-8"))["test"][0]
    _step("predict", str(bundle), str(data / unseen["image"]), "-o", str(masks), "--overlay")
    _step("evaluate", str(bundle), "--data", str(data), "--split", "test", "-o", str(folder / "scores"))
    output.print(f"\nmask, overlay and manifest: {masks}")
    for path in sorted(masks.iterdir()):
        output.print(f"  {path.name}")
    program = "medseg" if shutil.which("medseg") else os.path.relpath(Path(sys.executable).with_name("medseg"))
    output.print(_NEXT.format(medseg=program), highlight=False)


def _step(*arguments: str) -> None:
    from medseg.cli import app

    output.print(f"\n$ medseg {shlex.join(arguments)}", style="bold")
    code = app(arguments, standalone_mode=False)
    if code:
        sys.exit(code)
