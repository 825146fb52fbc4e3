"""`medseg export`: a bundle's network as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.bundle.catalog import find_bundle
from medseg.cli.console import BundleName, Trust, output
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
    done = exporting.export(
        find_bundle(bundle), file_format, out, half=half, random=random, tolerance=tolerance, trust=trust
    )
    output.print(f"{done.path}: {sum(path.stat().st_size for path in _files(done.path)) / 1e6:.2f} MB", soft_wrap=True)
    output.print(f"free: {done.free or 'nothing: batch and size are fixed'}")
    for one in done.comparisons:
        output.print(
            f"{'x'.join(map(str, one.shape))}: largest difference {one.difference:.1e} of logits up to "
            f"{one.largest:.1f}, {one.changed:.4%} of the voxels get another label",
            soft_wrap=True,
        )


def _files(path: Path) -> list[Path]:
    return [path, *(other for other in (path.with_suffix(".bin"),) if path.suffix == ".xml" and other.is_file())]
