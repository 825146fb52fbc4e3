"""Draw the pictures of the model gallery: `python docs/gallery.py FOLDER [BUNDLE...]`.

The folder holds the data sets of the model cards. Each shipped bundle with weights predicts one validation case, whose
license allows the picture, and the reference label is drawn as a dashed line where it does not hide the mask.
`docs/assets/models/credits.json` names source and license of each image.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import medseg
from medseg.bundle.catalog import Bundle, find_bundle
from medseg.files import load_json
from medseg.reporting.overlay import write_overlay

PICTURES = Path(__file__).parent / "assets" / "models"
WIDTH = 720


def main() -> None:
    """Draw every picture that `credits.json` lists."""
    data = Path(sys.argv[1])
    credits = json.loads((PICTURES / "credits.json").read_text(encoding="utf-8"))
    for name, credit in credits.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        draw(name, data / credit["data_set"], credit["case"], reference=credit.get("reference", True))


def draw(name: str, data: Path, case: str, *, reference: bool) -> None:
    """Predict one case of a data set and save the overlay, reduced to the width of the page."""
    (image,), (label,) = (sorted(data.glob(f"{part}*/{case}.*"))[:1] for part in ("images", "labels"))
    bundle = find_bundle(name)
    with tempfile.TemporaryDirectory() as folder:
        manifest = medseg.predict(name, image, folder)
        (record,) = manifest.cases.values()
        mask = Path(folder) / str(record.output)
        picture = Path(folder) / "overlay.png"
        truth = _classes(label, bundle, Path(folder)) if reference else None
        write_overlay(image, mask, picture, truth_path=truth, labels=bundle.label_names)
        drawn = Image.open(picture).convert("RGB")
        drawn.thumbnail((WIDTH, WIDTH))
        drawn.quantize(128).save(PICTURES / f"{name}.png", optimize=True)


def _classes(label: Path, bundle: Bundle, folder: Path) -> Path:
    """Return a reference that numbers objects as one of the bundle's classes; any other as it is."""
    if "other" not in load_json(bundle.config_path("train")).get("label_mapping", {}):
        return label
    with Image.open(label) as numbered:
        Image.fromarray((np.asarray(numbered) > 0).astype(np.uint8)).save(folder / "reference.png")
    return folder / "reference.png"


if __name__ == "__main__":
    main()
