"""Which files are images, and what their cases and masks are called.

Only file names are looked at here, never file contents; nothing beyond the standard library is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final, TypeAlias

from medseg.errors import OutputError, RequestError
from medseg.io.formats import FORMATS
from medseg.types import CaseKind

__all__ = [
    "IMAGE_SUFFIXES",
    "OUTPUT_FORMATS",
    "StrPath",
    "absolute",
    "case_kind",
    "case_stem",
    "file_kind",
    "mask_name",
    "output_path",
    "split_suffix",
]

StrPath: TypeAlias = str | os.PathLike[str]


IMAGE_SUFFIXES: Final = tuple(suffix for entry in FORMATS.values() for suffix in entry.images)

# What a user may ask masks to be, and how their names end then.
OUTPUT_FORMATS: Final[Mapping[str, str]] = MappingProxyType(
    {name: ending for entry in FORMATS.values() for name, ending in entry.outputs.items()}
)


def file_kind(path: StrPath) -> str | None:
    """Return the format, a key of `medseg.io.formats.FORMATS`, that a file name ends like, or None if none is read."""
    name = os.fspath(path).lower()
    return next((entry.name for entry in FORMATS.values() if name.endswith(entry.images)), None)


def case_kind(path: StrPath) -> CaseKind:
    """Return what an image is by its name: "image" (2D, without geometry), "slide", or else "volume"."""
    kind = file_kind(path)
    return "volume" if kind is None else FORMATS[kind].kind


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


def mask_name(name: str, output_format: str = "") -> str:
    """Return the mask's name for an image's name.

    Args:
        name: a file name, or a relative path with `/` between folders.
        output_format: a key of `OUTPUT_FORMATS`; by default the mask has the format of its image, as far as that holds
            masks: a volume keeps its name, and the mask of a picture is a PNG, because JPEG would change labels. A name
            that ends as the format asks for stays.

    Raises:
        RequestError: there is no such format.
    """
    stem, suffix = split_suffix(name)
    if output_format:
        ending = _output_suffix(output_format)
        return name if name.lower().endswith(ending) else stem + ending
    masks = FORMATS[str(file_kind(name))].mask_endings if suffix else ("",)
    return stem + (suffix if suffix.lower() in masks else masks[0])


def _output_suffix(output_format: str) -> str:
    if output_format not in OUTPUT_FORMATS:
        raise RequestError(f"There is no output format {output_format!r}: use one of {', '.join(OUTPUT_FORMATS)}.")
    return OUTPUT_FORMATS[output_format]


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
