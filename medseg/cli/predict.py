"""`medseg predict`: masks from images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.bundle import api
from medseg.bundle.catalog import find_bundle
from medseg.bundle.knobs import parse_settings
from medseg.cli.console import BundleName, Device, Settings, Trust, errors, output, progress, with_options
from medseg.io import list_cases

if TYPE_CHECKING:
    from medseg.bundle.catalog import Bundle
    from medseg.manifest import Manifest

__all__ = ["predict"]


def predict(
    bundle: BundleName,
    inputs: Annotated[
        list[Path], typer.Argument(help="Images, a folder of images, or a dataset.json.", metavar="INPUT...")
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for the masks and manifest.json.")],
    settings: Settings = None,
    device: Device = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="SIZE", help="Memory that may be taken, such as 2G.")
    ] = None,
    output_format: Annotated[
        str | None, typer.Option("--format", help="Format of the masks; that of the input if not given.")
    ] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write a picture of each mask.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what an earlier run has done.")] = False,
    trust: Trust = None,
) -> None:
    """Write a mask for every image, on the image's own grid and under its name."""
    listing = list_cases(inputs[0] if len(inputs) == 1 else inputs)
    chosen = with_options(settings, device_name=device, max_memory=max_memory, output_format=output_format)
    announce = _Announcement()
    with progress("images") as report:
        manifest = api.predict(
            bundle,
            inputs,
            out,
            settings=parse_settings(chosen),
            resume=resume,
            trust=trust,
            report=report,
            announce=announce,
        )
    for item in listing.left_out:
        errors.print(f"left out: {item.path} ({item.reason})", markup=False, soft_wrap=True)
    if overlay:
        _write_overlays(find_bundle(bundle), listing.cases, manifest, out)
    _summarize(manifest, out)
    raise typer.Exit(manifest.exit_code)


class _Announcement:
    """Says before the work what it will take: for the first image, the others are mostly alike."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self, name: str, forecast: str) -> None:
        if not self.said:
            errors.print(f"{name}: {forecast}", markup=False, soft_wrap=True)
        self.said = True


def _write_overlays(bundle: Bundle, cases: list[dict[str, str]], manifest: Manifest, out: Path) -> None:
    from medseg.io.names import case_stem
    from medseg.report.overlay import write_overlay

    for case in cases:
        if manifest.is_done(case["name"]):
            mask = out / case["name"]
            picture = mask.with_name(f"{case_stem(mask.name)}_overlay.png")
            write_overlay(Path(case["image"]), mask, picture, labels=bundle.label_names)


def _summarize(manifest: Manifest, out: Path) -> None:
    for record in manifest.cases.values():
        if record.status == "failed":
            errors.print(f"failed: {record.name}: {record.error}", markup=False, soft_wrap=True)
    counts = manifest.counts
    skipped = f", {counts['skipped']} done before" if counts["skipped"] else ""
    output.print(f"{counts['done']} masks written{skipped}, {counts['failed']} failed; see {out / 'manifest.json'}")
