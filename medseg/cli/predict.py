"""`medseg predict`: masks from images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli import completion
from medseg.cli.console import notes, output, verbosity, write_json
from medseg.cli.options import BundleName, Device, JsonTarget, Settings, Strict, Trust, with_options
from medseg.cli.progress import progress
from medseg.cli.tables import print_failures
from medseg.jobs import api

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.manifest import Manifest
    from medseg.types import Skipped

__all__ = ["predict", "print_skipped"]

_SHOWN: Final = 3


def predict(
    bundle: BundleName,
    inputs: Annotated[
        list[Path], typer.Argument(help="Images, a folder of images, or a dataset.json.", metavar="INPUT")
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder of the masks and manifest.json.")
    ],
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="BUNDLE",
            show_default="no ensemble",
            help="Ensemble with this bundle. Repeatable.",
            autocompletion=completion.bundle_names,
        ),
    ] = None,
    settings: Settings = None,
    device: Device = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            show_default="max_memory of the bundle",
            help="Memory limit, in bytes or with K, M, G or T (powers of 1024), such as 2G.",
        ),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            show_default="the format of the input",
            help="File format of the masks, such as nifti, nrrd or dicom-seg.",
            autocompletion=completion.mask_formats,
        ),
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option(
            "--mpp",
            metavar="MICROMETERS",
            show_default="microns_per_pixel of the bundle",
            help="Resolution (µm/px) the model was trained at, for whole-slide images.",
        ),
    ] = None,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write an overlay of each mask on its image, as PNG.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Skip the cases that an earlier run has finished.")] = False,
    strict: Strict = False,
    trust: Trust = None,
    json_target: JsonTarget = None,
) -> None:
    """Segment images: write a mask for each image, with the image's geometry and file name.

    The exit code is 1 if a case failed.
    """
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
    print_skipped(manifest.skipped)
    _summarize(manifest, out)
    write_json(manifest.to_dict(), json_target)
    raise typer.Exit(manifest.exit_code)


def print_skipped(items: Sequence[Skipped]) -> None:
    """List the skipped inputs: each reason with the first names, or every file with `--verbose`."""
    reasons: dict[str, list[str]] = {}
    for item in items:
        reasons.setdefault(item.reason, []).append(item.path)
    for reason, paths in reasons.items():
        if verbosity.verbose:
            lines = [f"skipped: {path} ({reason})" for path in paths]
        else:
            more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
            names = ", ".join(Path(path).name for path in paths[:_SHOWN])
            lines = [f"skipped: {len(paths)} ({reason}): {names}{more}"]
        for line in lines:
            notes.print(line)


class _Announcement:
    """Prints the forecast of the first image before it runs; those of the others are usually similar."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self, name: str, forecast: str) -> None:
        if not self.said:
            notes.print(f"{name}: {forecast}")
        self.said = True


def _summarize(manifest: Manifest, out: Path) -> None:
    for note in manifest.notes:
        notes.print(note)
    print_failures(manifest)
    counts, before = manifest.counts, len(manifest.earlier)
    skipped = f", {before} finished earlier" if before else ""
    output.print(
        f"{counts['done'] - before} masks written{skipped}, {counts['failed']} failed; see {out / 'manifest.json'}"
    )
