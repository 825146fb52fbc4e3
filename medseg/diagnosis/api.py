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
    """Open every image and label, and find what is wrong, suspicious or unsuitable for a bundle.

    Args:
        path: Image, folder, data set or its `dataset.json`.
        bundle: Bundle whose needs the data are checked against: a folder, or the name of a shipped one.
        fix: New folder for a repaired copy and `changes.json`, which lists every change.
        report: Called with the cases done, the number of cases, and a note.

    Returns:
        Cases and findings; with `fix`, also the changes and the findings of the repaired copy.

    Raises:
        RequestError: There is nothing to examine, or `fix` is not a new folder elsewhere.
        BundleError: There is no such bundle, or it does not describe its input.
    """
    source = split_series(path)[0]
    if not source.exists():
        raise RequestError(f"'{path}' does not exist: check the path.", path=source)
    if fix is not None:
        _check_target(Path(fix), source)
    needs = None if bundle is None else needs_of(find_bundle(bundle))
    from medseg.diagnosis.doctor import examine

    found = examine(path, needs=needs, report=report)
    return found if fix is None else _repaired(found, Path(path), Path(fix), needs, report)


def _repaired(found: Findings, source: Path, target: Path, needs: Needs | None, report: Progress | None) -> Findings:
    """Write the repaired copy with its record, and examine it."""
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
    """Refuse a folder that holds something, and one within what is examined, or around it."""
    out, root = target.resolve(), source.resolve()
    root = root if root.is_dir() else root.parent
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RequestError(f"'{target}' exists and is not empty: --fix writes into a new folder.", path=target)
    if out.is_relative_to(root) or root.is_relative_to(out):
        raise RequestError(
            f"'{target}' lies within the data, or around it: --fix needs a folder elsewhere.", path=target
        )
