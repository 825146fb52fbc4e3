"""`medseg predict`: masks from images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.bundle.catalog import find_bundle
from medseg.bundle.knobs import parse_settings
from medseg.cli.console import BundleName, Device, Settings, Trust, errors, output, progress, with_options
from medseg.errors import CaseError
from medseg.io import list_cases
from medseg.jobs import api

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.bundle.catalog import Bundle
    from medseg.io import LeftOut
    from medseg.manifest import Manifest

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
        typer.Option("--with", metavar="BUNDLE", help="Take the mean with the predictions of this bundle. Repeatable."),
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
        typer.Option("--mpp", help="Micrometers per pixel of the pictures that the model knows, for slides."),
    ] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write a picture of each mask.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what an earlier run has done.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="List every file that is left out.")] = False,
    trust: Trust = None,
) -> None:
    """Write a mask for every image, on the image's own grid and under its name."""
    listing = list_cases(inputs[0] if len(inputs) == 1 else inputs)
    chosen = with_options(
        settings, device_name=device, max_memory=max_memory, output_format=output_format, microns_per_pixel=mpp
    )
    announce = _Announcement()
    with progress("images") as report:
        manifest = api.predict(
            [bundle, *also] if also else bundle,
            inputs,
            out,
            settings=parse_settings(chosen),
            resume=resume,
            trust=trust,
            report=report,
            announce=announce,
        )
    _tell_left_out(listing.left_out, verbose=verbose)
    if overlay:
        _write_overlays(find_bundle(bundle), listing.cases, manifest, out)
    _summarize(manifest, out)
    raise typer.Exit(manifest.exit_code)


def _tell_left_out(items: Sequence[LeftOut], *, verbose: bool) -> None:
    """Say what is not predicted: by reason, with the first names, or everything."""
    reasons: dict[str, list[str]] = {}
    for item in items:
        reasons.setdefault(item.reason, []).append(item.path)
    for reason, paths in reasons.items():
        if verbose:
            lines = [f"left out: {path} ({reason})" for path in paths]
        else:
            more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
            names = ", ".join(Path(path).name for path in paths[:_SHOWN])
            lines = [f"left out: {len(paths)} ({reason}): {names}{more}"]
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


def _write_overlays(bundle: Bundle, cases: list[dict[str, str]], manifest: Manifest, out: Path) -> None:
    from medseg.reporting.overlay import write_overlay

    # The values of such masks are numbers of objects, which have no names
    names = None if manifest.knobs.get("number_objects") else bundle.label_names
    done = [case for case in cases if manifest.is_done(case["name"])]
    masks = [out / (manifest.cases[case["name"]].output or case["name"]) for case in done]
    for case, mask, picture in zip(done, masks, _pictures(masks), strict=True):
        try:
            write_overlay(case["image"], mask, picture, labels=names)
        except CaseError as error:
            errors.print(f"no picture of {mask.name}: {error}", markup=False, soft_wrap=True)


def _pictures(masks: list[Path]) -> list[Path]:
    """Return where the picture of each mask goes: never where a mask is, or the picture of another."""
    from medseg.io.names import case_stem

    short = [mask.with_name(f"{case_stem(mask.name)}_overlay.png") for mask in masks]
    taken = Counter([*masks, *short])
    return [
        mask.with_name(f"{mask.name}_overlay.png") if taken[picture] > 1 else picture
        for mask, picture in zip(masks, short, strict=True)
    ]


def _summarize(manifest: Manifest, out: Path) -> None:
    for record in manifest.cases.values():
        if record.status == "failed":
            errors.print(f"failed: {record.name}: {record.error}", markup=False, soft_wrap=True)
    counts, before = manifest.counts, len(manifest.earlier)
    skipped = f", {before} done before" if before else ""
    output.print(
        f"{counts['done'] - before} masks written{skipped}, {counts['failed']} failed; see {out / 'manifest.json'}"
    )
