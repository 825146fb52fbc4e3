"""`medseg.doctor`: examine images and labels, and write a repaired copy."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.bundle.catalog import find_bundle
from medseg.diagnosis.needs import needs_of
from medseg.errors import RequestError
from medseg.files import replace_text
from medseg.io.dicom.detect import split_series
from medseg.version import __version__

if TYPE_CHECKING:
    from medseg.checks.suitability import Needs
    from medseg.diagnosis.doctor import Findings
    from medseg.types import Progress

__all__ = ["doctor"]


def doctor(
    path: str | Path,
    *,
    bundle: str | Path | None = None,
    fix: str | Path | None = None,
    report: Progress | None = None,
) -> Findings:
    """Check every image and label for faults, suspicious content and incompatibility with a bundle.

    Args:
        path: Image, folder of images, data set, or `dataset.json`.
        bundle: Bundle whose requirements the data are checked against: its folder, or the name of a shipped one.
        fix: New folder for a repaired copy and `changes.json`, which lists every change.
        report: Called with the number of cases checked, the number of all cases, and a note.

    Returns:
        Cases and findings; with `fix`, also the changes and the findings of the repaired copy.

    Raises:
        RequestError: No images at `path`, or `fix` is not a new folder outside the data.
        BundleError: Unknown bundle, or one without a description of its input.
    """
    source = split_series(path)[0]
    if not source.exists():
        raise RequestError(f"No such file or folder: '{path}'. Check the path.", path=source)
    if fix is not None:
        _check_target(Path(fix), source)
    needs = None if bundle is None else needs_of(find_bundle(bundle))
    from medseg.diagnosis.doctor import examine

    found = examine(path, needs=needs, report=report)
    return found if fix is None else _repaired(found, Path(path), Path(fix), needs, report)


def _repaired(found: Findings, source: Path, target: Path, needs: Needs | None, report: Progress | None) -> Findings:
    """Write the repaired copy with its `changes.json`, and check the copy."""
    from medseg.diagnosis.doctor import examine
    from medseg.diagnosis.repair import repair

    changes = repair(found, target, report=report)
    place = target / source.name if source.name.endswith(".json") else target
    remaining = examine(place, needs=needs, report=report)
    content: dict[str, Any] = {
        "medseg": __version__,
        "changes": [asdict(change) for change in changes],
        "remaining": remaining.to_json()["findings"],
    }
    replace_text(target / "changes.json", json.dumps(content, indent=1) + "\n")
    return replace(found, changes=tuple(changes), repaired=remaining)


def _check_target(target: Path, source: Path) -> None:
    """Refuse a folder that is not empty, or is inside the data or around them."""
    out, root = target.resolve(), source.resolve()
    root = root if root.is_dir() else root.parent
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RequestError(f"'{target}' exists and is not empty. Pass a new folder to --fix.", path=target)
    if out.is_relative_to(root) or root.is_relative_to(out):
        raise RequestError(
            f"'{target}' is inside the data, or contains them. Pass a folder elsewhere to --fix.", path=target
        )
