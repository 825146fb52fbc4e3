"""Which files are images, and what their cases and masks are called.

Only file names are looked at here, never file contents; nothing beyond the standard library is imported.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from medseg.errors import OutputError

__all__ = [
    "IMAGE_SUFFIXES",
    "NIFTI_SUFFIXES",
    "PICTURE_SUFFIXES",
    "StrPath",
    "absolute",
    "case_stem",
    "file_kind",
    "mask_name",
    "output_path",
    "split_suffix",
]

StrPath: TypeAlias = str | os.PathLike[str]

NIFTI_SUFFIXES = (".nii.gz", ".nii")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
IMAGE_SUFFIXES = NIFTI_SUFFIXES + PICTURE_SUFFIXES


def file_kind(path: StrPath) -> Literal["nifti", "picture"] | None:
    """Return the family of formats that a file name belongs to, or None if medseg does not read it."""
    name = os.fspath(path).lower()
    if name.endswith(NIFTI_SUFFIXES):
        return "nifti"
    return "picture" if name.endswith(PICTURE_SUFFIXES) else None


def split_suffix(name: str) -> tuple[str, str]:
    """Split `name` before its image suffix; the suffix is empty when `name` has none that medseg knows."""
    for suffix in IMAGE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)], name[-len(suffix) :]
    return name, ""


def case_stem(name: StrPath) -> str:
    """Return the last part of a path without its image suffix: `sub/case1.nii.gz` gives `case1`.

    Dots that are not part of a known image suffix stay: `scan.2024.nii` gives `scan.2024`.
    """
    return split_suffix(Path(name).name)[0]


def mask_name(name: str) -> str:
    """Return the mask's name for an image's name.

    A volume keeps its name. A picture's mask is always a PNG, because JPEG is lossy and would change labels.
    """
    stem, suffix = split_suffix(name)
    return f"{stem}.png" if file_kind(name) == "picture" else stem + suffix


def absolute(path: StrPath) -> Path:
    """Return `path` absolute and without `..`; links stay links, so that names and suffixes are the user's."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100  (resolve() would follow links)


def output_path(name: str, output_dir: StrPath) -> Path:
    """Return where the result called `name` goes below `output_dir`.

    Args:
        name: a relative path with `/` between folders, such as a case's `"name"`.
        output_dir: the folder of all results; nothing is created.

    Raises:
        OutputError: `name` is empty, absolute, or climbs out of `output_dir`.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise OutputError(f"Result name {name!r} does not lie below {output_dir}: use a relative name without '..'.")
    return Path(output_dir, *parts)
