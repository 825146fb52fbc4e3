"""`medseg predict`: masks from images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli.console import BundleName, Device, Settings, Strict, Trust, errors, output, progress, with_options
from medseg.jobs import api

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.manifest import Manifest
    from medseg.types import Skipped

__all__ = ["predict"]

_SHOWN = 3


def predict(
    bundle: BundleName,
    inputs: Annotated[
        list[Path], typer.Argument(help="Images, a folder of images, or a dataset.json.", metavar="INPUT...")
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for the masks and manifest.json.")],
    also: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="BUNDLE", help="Ensemble with BUNDLE. Repeatable."),
    ] = None,
    settings: Settings = None,
    device: Device = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="SIZE", help="Memory that may be taken, such as 2G.")
    ] = None,
    output_format: Annotated[
        str | None, typer.Option("--format", help="Format of the masks; that of the input if not given.")
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option("--mpp", help="Resolution (µm/px) the model was trained at, for slides."),
    ] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also draw each mask over its image.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Skip what an earlier run has finished.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="List every skipped file.")] = False,
    strict: Strict = False,
    trust: Trust = None,
) -> None:
    """Write a mask for every image, in the image's geometry and under its name."""
    chosen = with_options(
        settings, device_name=device, max_memory=max_memory, output_format=output_format, microns_per_pixel=mpp
    )
    with progress("images") as report:
        manifest = api.predict(
            [bundle, *also] if also else bundle,
            inputs[0] if len(inputs) == 1 else inputs,
            out,
            settings=parse_settings(chosen),
            resume=resume,
            overlay=overlay,
            trust=trust,
            strict=strict,
            report=report,
            announce=_Announcement(),
        )
    _tell_skipped(manifest.skipped, verbose=verbose)
    _summarize(manifest, out)
    raise typer.Exit(manifest.exit_code)


def _tell_skipped(items: Sequence[Skipped], *, verbose: bool) -> None:
    """Say what is not predicted: by reason, with the first names, or everything."""
    reasons: dict[str, list[str]] = {}
    for item in items:
        reasons.setdefault(item.reason, []).append(item.path)
    for reason, paths in reasons.items():
        if verbose:
            lines = [f"skipped: {path} ({reason})" for path in paths]
        else:
            more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
            names = ", ".join(Path(path).name for path in paths[:_SHOWN])
            lines = [f"skipped: {len(paths)} ({reason}): {names}{more}"]
        for line in lines:
            errors.print(line, markup=False, soft_wrap=True)


class _Announcement:
    """Says before the work what it will take: for the first image, the others are mostly alike."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self, name: str, forecast: str) -> None:
        if not self.said:
            errors.print(f"{name}: {forecast}", markup=False, soft_wrap=True)
        self.said = True


def _summarize(manifest: Manifest, out: Path) -> None:
    for note in manifest.notes:
        errors.print(note, markup=False, soft_wrap=True)
    for record in manifest.cases.values():
        if record.status == "failed":
            errors.print(f"failed: {record.name}: {record.error}", markup=False, soft_wrap=True)
    counts, before = manifest.counts, len(manifest.earlier)
    skipped = f", {before} done before" if before else ""
    output.print(
        f"{counts['done'] - before} masks written{skipped}, {counts['failed']} failed; see {out / 'manifest.json'}"
    )
