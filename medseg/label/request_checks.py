"""Checks of ids, tags and paths in requests, since MONAI Label joins ids to paths without checking them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from medseg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["check_path", "check_query", "check_tag", "image_inside"]

_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# The drive letter of a path; names such as "3: T1", which 3D Slicer gives to series, do not match.
_DRIVE: Final = re.compile(r"[A-Za-z]:[\\/]")
_IDS: Final = ("image", "label", "id", "session_id", "tag")
_NO: Final = ("", "0", "f", "false", "n", "no", "off")


def check_query(query: Iterable[tuple[str, str]]) -> None:
    """Refuse a query with path traversal, such as `image=../../secret` or `logfile=/etc/passwd`.

    Archives are refused as well: MONAI Label unpacks their entries to any path that they name.

    Args:
        query: Names and values of the query's parameters.

    Raises:
        RequestError: A parameter is not a plain id, or asks to unpack an archive.
    """
    for name, value in query:
        parts = value.replace("\\", "/").split("/")
        if name in _IDS and len(parts) > 1:
            raise RequestError(f"'{name}' must be an id, not a path: it must not contain a slash")
        if ".." in parts or value.startswith(("/", "\\", "~")) or "\0" in value or _DRIVE.match(value):
            raise RequestError(f"'{name}' must be the id of an image or a label, not a path")
        if name == "uncompress" and value.lower() not in _NO:
            raise RequestError("archives are not unpacked: send the files themselves, without 'uncompress'")


def check_path(path: str) -> None:
    """Refuse a URL path with path traversal, however often its escapes are encoded.

    MONAI Label forwards paths below `/proxy/` to the DICOMweb store with the store's password, so `..` would reach
    everything that the store's machine serves.

    Args:
        path: Path of the requested URL.

    Raises:
        RequestError: The path contains `..`.
    """
    decoded, earlier = path, ""
    while decoded != earlier:
        decoded, earlier = unquote(decoded), decoded
        if ".." in decoded.replace("\\", "/").split("/"):
            raise RequestError("path traversal: the URL must not contain '..'")


def check_tag(tag: object) -> str:
    """Return the tag of a saved label, which becomes a folder's name, if it is valid.

    Raises:
        RequestError: Invalid tag.
    """
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        raise RequestError(f"invalid label tag {tag!r}: use letters, digits, - and _, such as 'final' or 'original'")
    return tag


def image_inside(image: Path, folders: Sequence[Path]) -> Path:
    """Return the resolved path of an image that is inside one of the folders.

    Args:
        image: Path of the image; symbolic links are followed.
        folders: Folders that requests may read.

    Raises:
        RequestError: The image is elsewhere; requests must not read other files of this machine.
    """
    found = image.resolve()
    if not any(found.is_relative_to(folder.resolve()) for folder in folders):
        raise RequestError("the image is not among the studies and was not uploaded: refer to an image by its id")
    return found
