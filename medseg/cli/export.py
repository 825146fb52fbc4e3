"""`medseg export`: a bundle's network as a file for other programs."""

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
            help=f"Format of the file: {_FORMATS}.",
            autocompletion=completion.export_formats,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File to write: .ts, .onnx, .pt2 or .xml.")
    ],
    half: Annotated[bool, typer.Option("--half", help="Use 16-bit weights and arithmetic; not for openvino.")] = False,
    random: Annotated[bool, typer.Option("--random", help="Use random weights, for a bundle that has none.")] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            show_default=f"{exporting.TOLERANCE[False]:g}, with --half {exporting.TOLERANCE[True]:g}",
            help="Largest difference allowed, as a share of the largest logit.",
        ),
    ] = None,
    trust: Trust = None,
    json_target: JsonTarget = None,
) -> None:
    """Write the network of a bundle for another program, and compare both on random images.

    ts: TorchScript, as MONAI's ckpt_export. onnx: ONNX. pt2: torch.export. openvino: OpenVINO (.xml and .bin).
    """
    with progress(""):
        done = exporting.export(bundle, file_format, out, half=half, random=random, tolerance=tolerance, trust=trust)
    print_export(done)
    write_json(done.to_dict(), json_target)
