"""File formats by suffix, and the names of cases and masks.

Only file names are inspected, never file contents, and only the standard library is imported.
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

# Output format of masks -> suffix of their files.
OUTPUT_FORMATS: Final[Mapping[str, str]] = MappingProxyType(
    {name: ending for entry in FORMATS.values() for name, ending in entry.outputs.items()}
)


def file_kind(path: StrPath) -> str | None:
    """Return the format of a file name by its suffix, a key of `medseg.io.formats.FORMATS`; None if unsupported."""
    name = os.fspath(path).lower()
    return next((entry.name for entry in FORMATS.values() if name.endswith(entry.images)), None)


def case_kind(path: StrPath) -> CaseKind:
    """Return the kind of an image by its name: "image" (2D, without geometry), "slide", or else "volume"."""
    kind = file_kind(path)
    return "volume" if kind is None else FORMATS[kind].kind


def split_suffix(name: str) -> tuple[str, str]:
    """Split `name` before its image suffix; the suffix is empty if `name` has no supported one."""
    for suffix in IMAGE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)], name[-len(suffix) :]
    return name, ""


def case_stem(name: StrPath) -> str:
    """Return the last part of a path without its image suffix: `case1` for `sub/case1.nii.gz`.

    Other dots are kept: `scan.2024` for `scan.2024.nii`.
    """
    return split_suffix(Path(name).name)[0]


def mask_name(name: str, output_format: str = "") -> str:
    """Return the name of the mask of an image.

    Args:
        name: File name, or relative path with `/` between folders.
        output_format: Key of `OUTPUT_FORMATS`. By default the mask has the format of its image if that can store masks:
            a volume keeps its name, and the mask of a 2D image is a PNG, because JPEG would change labels. A name that
            already has the suffix of the format is kept.

    Raises:
        RequestError: Unknown format.
    """
    stem, suffix = split_suffix(name)
    if output_format:
        ending = _output_suffix(output_format)
        return name if name.lower().endswith(ending) else stem + ending
    masks = FORMATS[str(file_kind(name))].mask_endings if suffix else ("",)
    return stem + (suffix if suffix.lower() in masks else masks[0])


def _output_suffix(output_format: str) -> str:
    if output_format not in OUTPUT_FORMATS:
        raise RequestError(f"Unknown output format {output_format!r}: use one of {', '.join(OUTPUT_FORMATS)}.")
    return OUTPUT_FORMATS[output_format]


def absolute(path: StrPath) -> Path:
    """Return `path` absolute and without `..`; links are not resolved, so that names and suffixes are the user's."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100  (resolve() would follow links)


def output_path(name: str, output_dir: StrPath) -> Path:
    """Return the path of the result `name` below `output_dir`.

    Args:
        name: Relative path with `/` between folders, such as the `"name"` of a case.
        output_dir: Folder of all results; nothing is created.

    Raises:
        OutputError: `name` is empty, absolute, or outside `output_dir`.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise OutputError(f"Invalid result name {name!r}: expected a relative path below {output_dir}, without '..'.")
    return Path(output_dir, *parts)
