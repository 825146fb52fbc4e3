"""`medseg export`: a bundle's network for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from medseg.cli import completion
from medseg.cli.console import write_json
from medseg.cli.options import BundleName, JsonTarget, Trust
from medseg.cli.progress import progress
from medseg.cli.tables import print_export
from medseg.tools import export as exporting
from medseg.tools.export_formats import FORMATS

__all__ = ["export"]

_FORMATS: Final = ", ".join(FORMATS)


def export(
    bundle: BundleName,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help=f"Format: {_FORMATS}.",
            autocompletion=completion.export_formats,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="File to write, with suffix .ts, .onnx, .pt2 or .xml."),
    ],
    half: Annotated[bool, typer.Option("--half", help="Use float16 weights and arithmetic; not for openvino.")] = False,
    random: Annotated[bool, typer.Option("--random", help="Use random weights, for a bundle without weights.")] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            show_default=f"{exporting.TOLERANCE[False]:g}, with --half {exporting.TOLERANCE[True]:g}",
            help="Largest accepted difference of the logits, relative to the largest logit.",
        ),
    ] = None,
    trust: Trust = None,
    json_target: JsonTarget = None,
) -> None:
    """Export the network of a bundle to a file for another runtime, and verify the file on random images.

    Formats: ts is TorchScript (as of MONAI's ckpt_export), onnx is ONNX, pt2 is torch.export, openvino is OpenVINO IR
    (.xml and .bin).
    """
    with progress(""):
        done = exporting.export(bundle, file_format, out, half=half, random=random, tolerance=tolerance, trust=trust)
    print_export(done)
    write_json(done.to_dict(), json_target)
