"""`medseg export`: a bundle's network as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.console import BundleName, Trust
from medseg.cli.tables import print_export
from medseg.tools import export as exporting

__all__ = ["export"]

_FORMATS = ", ".join(exporting.FORMATS)


def export(
    bundle: BundleName,
    file_format: Annotated[str, typer.Option("--format", help=f"One of {_FORMATS}.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="File to write: .ts, .onnx, .pt2 or .xml.")],
    half: Annotated[
        bool,
        typer.Option("--half", help="16-bit weights and arithmetic; not for openvino."),
    ] = False,
    random: Annotated[bool, typer.Option("--random", help="Fresh weights, for a bundle that has none.")] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Largest difference allowed, in units of the largest logit."),
    ] = None,
    trust: Trust = None,
) -> None:
    """Write the network of a bundle for another program, and compare both on random images.

    ts: TorchScript, as MONAI's ckpt_export. onnx: ONNX. pt2: torch.export. openvino: OpenVINO (.xml and .bin).
    """
    done = exporting.export(bundle, file_format, out, half=half, random=random, tolerance=tolerance, trust=trust)
    print_export(done)
