"""Every network in every export format: dynamic axes, and difference of the logits from the original network.

    python benchmarks/exports.py            # prints the table of docs/how-to/export.md
    python benchmarks/exports.py --half

Networks are the small forms with fresh weights; UNet++ also pruned to its second head, U-Net also without padding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle
from medseg.errors import MedsegError
from medseg.networks import NETWORKS, small
from medseg.tools.export import TOLERANCE, export
from medseg.tools.export_formats import FORMATS

SUBJECTS: list[tuple[str, str, dict[str, Any], list[int] | None]] = [
    *((name, name, {}, None) for name in NETWORKS),
    ("UNet++ pruned to L2", "UNetPlusPlus", {"head": 2}, None),
    ("U-Net, valid", "UNet", {"padding": "valid", "features": [8, 16, 32]}, [60, 76, 60]),
]
WINDOW = {2: [224, 224], 3: [48, 48, 48]}


def bundle_of(folder: Path, name: str, dims: int, options: dict[str, Any], window: list[int] | None) -> Bundle:
    """Write a bundle with a network."""
    definition = {"spatial_dims": dims, "in_channels": 1, "out_channels": 3, **small(name, dims), **options}
    source = {
        "name": "shapes_mri_network",
        "template": "mr_volume" if dims == 3 else "grey_image",
        "version": "0.1.0",
        "description": "For exports.",
        "authors": "The medseg authors",
        "channels": {"0": "MRI"},
        "labels": {"0": "background", "1": "a", "2": "b"},
        "network_def": {"_target_": f"medseg.components.{name}", **definition},
        "knobs": {"roi_size": (window or WINDOW[dims])[:dims]},
    }
    bundle = Bundle(folder / f"shapes_mri_network_{dims}d_{time.monotonic_ns()}")
    bundle.root.mkdir()
    (bundle.root / "bundle.json").write_text(json.dumps(source), encoding="utf-8")
    build(bundle)
    return bundle


def measured(bundle: Bundle, file_format: str, target: Path, *, half: bool) -> str:
    """Return one cell: the largest difference relative to max(1, largest logit), and the dynamic axes if restricted."""
    try:
        done = export(bundle, file_format, target, random=True, half=half, tolerance=1.0)
    except MedsegError as refusal:
        return str(refusal)
    worst = max(one.relative for one in done.differences)
    verdict = "" if worst <= TOLERANCE[half] else ", refused"
    bound = "" if done.free == "batch and size" else f", free: {done.free or 'nothing'}"
    return f"{worst:.0e}{bound}{verdict}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", action="store_true")
    half = parser.parse_args().half
    print(f"| network | {' | '.join(FORMATS)} |")
    print("|---|" + "---|" * len(FORMATS))
    with tempfile.TemporaryDirectory() as folder:
        for title, name, options, window in SUBJECTS:
            for dims in (2, 3):
                bundle = bundle_of(Path(folder), name, dims, options, window)
                targets = {kind: Path(folder, f"network{suffix}") for kind, (suffix, _, _) in FORMATS.items()}
                cells = [measured(bundle, kind, target, half=half) for kind, target in targets.items()]
                print(f"| {title} {dims}D | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
