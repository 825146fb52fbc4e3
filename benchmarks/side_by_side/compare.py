"""Agreement of masks: differing voxels, the margin of the reference's best class there, and Dice of each class.

python -m side_by_side.compare REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = None
LEADS = (1e-5, 1e-4, 1e-3, 1e-2)


def read(path: str) -> tuple[Any, Any]:
    """Return labels, uint8, and the affine; for a 2D image `(x, y)` and None.

    Raises:
        SystemExit: a value is no whole number that fits.
    """
    if path.endswith(".png"):
        return np.asarray(Image.open(path)).T, None
    image = nibabel.load(path)
    stored = np.asanyarray(image.dataobj)
    labels = stored.astype(np.uint8)
    if not np.array_equal(stored, labels):
        raise SystemExit(f"{path} contains values that are not labels")
    return labels.reshape(stored.shape[:3]), image.affine


def confusion(a: Any, b: Any, classes: int) -> Any:
    """Return the counts `(classes, classes)` of pairs of labels."""
    total = np.zeros(classes * classes, dtype=np.int64)
    for first, second in zip(a, b, strict=True):
        pairs = first.astype(np.intp) * classes + second
        total += np.bincount(pairs.ravel(), minlength=classes * classes)
    return total.reshape(classes, classes)


def dice(counts: Any) -> dict[str, float | None]:
    """Return the Dice of each foreground class, or None if both masks lack it."""
    sizes = counts.sum(0) + counts.sum(1)
    return {str(n): float(2 * counts[n, n] / sizes[n]) if sizes[n] else None for n in range(1, len(counts))}


def difference(mask: Any, reference: Any, classes: int, margin: Any | None) -> dict[str, Any]:
    """Compare a mask with a reference; `margin` is the margin of the reference's best class at each voxel."""
    counts = confusion(mask, reference, classes)
    result: dict[str, Any] = {
        "voxels": int(counts.sum()),
        "differing": int(counts.sum() - np.trace(counts)),
        "dice": dice(counts),
    }
    if margin is not None:
        leads = np.concatenate([lead[a != b] for a, b, lead in zip(mask, reference, margin, strict=True)])
        result["largest_lead"] = float(leads.max()) if leads.size else 0.0
        result["leading_by_more_than"] = {f"{lead:g}": int((leads > lead).sum()) for lead in LEADS}
    return result


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """Compare every contestant's first mask with the references and the truth, and its other masks with the first.

    Raises:
        SystemExit: a mask does not lie on the grid of the others.
    """
    first, affine = read(next(iter(request["masks"].values()))[0])
    masks, repeats = {}, {}
    for name, paths in request["masks"].items():
        masks[name], place = read(paths[0])
        same_place = affine is None or np.allclose(place, affine, atol=1e-3)
        if masks[name].shape != first.shape or not same_place:
            raise SystemExit(
                f"{name}: mask {masks[name].shape} at\n{place}\ndoes not lie on {first.shape} at\n{affine}"
            )
        repeats[name] = all(np.array_equal(read(path)[0], masks[name]) for path in paths[1:])
    classes = request["classes"]
    margins = {name: np.load(path, mmap_mode="r") for name, path in request["margins"].items()}
    references = [name for name in request["references"] if name in masks]
    agreement = {
        name: {
            reference: difference(mask, masks[reference], classes, margins.get(reference))
            for reference in references
            if reference != name
        }
        for name, mask in masks.items()
    }
    truth = read(request["truth"])[0] if request["truth"] else None
    scores = {} if truth is None else {name: dice(confusion(mask, truth, classes)) for name, mask in masks.items()}
    return {"same_mask_each_round": repeats, "agreement": agreement, "dice_with_truth": scores}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(compare(asked)), encoding="utf-8")
