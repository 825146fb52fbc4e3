"""Cases, networks and contestants of the comparison, and their common settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
DATA: Final = ROOT.parent / "shared" / "data"
RESULTS: Final = ROOT / "benchmarks" / "results"
CONSTRAINTS: Final = ROOT / "constraints.txt"
REQUIREMENTS: Final = ROOT / "benchmarks" / "requirements-nnunet.txt"
CT_BUNDLE: Final = Path(__file__).with_name("torso_ct_unet.json")

# Settings of medseg's two modes, in addition to those of the bundle.
EXACT: Final[dict[str, Any]] = {}
FAST: Final[dict[str, Any]] = {"inference_precision": "bfloat16", "memory_format": "channels_last"}
# On CT, also skip windows outside the body, where the scaled image is below this value (-720 HU).
FAST_CT: Final[dict[str, Any]] = {**FAST, "foreground": 0.2}

# The networks of the CT cases: medseg's 3D U-Net in three widths; the last has the channels nnU-Net plans for CT.
FEATURES: Final = {
    "light": [8, 16, 32, 64],
    "medium": [16, 32, 64, 128],
    "large": [32, 64, 128, 256, 320, 320],
}

# Networks of each case, the default first.
CASES: Final = {
    "phantom": tuple(FEATURES),
    "phantom800": tuple(FEATURES),
    "small": tuple(FEATURES),
    "liver": tuple(FEATURES),
    "hippocampus": ("shipped",),
    "tile": ("random",),
}
KINDS: Final = {"hippocampus": "MR", "tile": "RGB"}  # otherwise CT
SHIPPED: Final = {"hippocampus": "hippocampus_mri_unet", "tile": "gland_pathology_unet"}
CONTESTANTS: Final = ("monai", "monai32", "nnunet", "medseg", "medseg-fast")
REFERENCES: Final = ("monai", "monai32", "medseg")


# Large tensors reuse memory and use huge pages. medseg sets the former itself; here it applies to all contestants.
TUNED_MEMORY: Final = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def environment(threads: int, *, tuned_memory: bool) -> dict[str, str]:
    """Return the environment of every measured process."""
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    own = dict.fromkeys(counts, str(threads))
    # nnU-Net limits torch's threads to this number.
    own["nnUNet_def_n_proc"] = str(threads)
    # nnU-Net warns if these are not set, although they are not used.
    own |= dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), os.devnull)
    if tuned_memory:
        own |= TUNED_MEMORY
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT / "benchmarks"), str(ROOT))), "PYTHONSAFEPATH": "1"}
    foreign = ("MALLOC_", "KMP_", "GOMP_", "OMP_", "LD_PRELOAD", "THP_")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(foreign)}, **own, **paths}


def image_path(work: Path, case: str) -> Path:
    """Return the path of the image of a case."""
    return work / "cases" / f"{case}.{'png' if case == 'tile' else 'nii.gz'}"


def truth_path(work: Path, case: str) -> Path:
    """Return the path of the reference segmentation of a case, which need not exist."""
    return work / "cases" / "truth" / f"{case}.nii.gz"


def bundle_path(work: Path, case: str, network: str, classes: int | None = None) -> Path:
    """Return the folder of the bundle of a case and network."""
    if case in SHIPPED:
        return work / "bundles" / SHIPPED[case]
    return work / "bundles" / (f"torso_ct_{network}" + (f"_{classes}" if classes else ""))


def nnunet_python(work: Path) -> Path:
    """Return the Python interpreter of nnU-Net's environment, which need not exist yet."""
    return work / "nnunet" / "bin" / "python"
