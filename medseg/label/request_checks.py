"""What requests may name. MONAI Label joins ids to paths as they come; here they are looked at first."""

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
# Of a path, not of a name such as "3: T1", which 3D Slicer gives to series.
_DRIVE: Final = re.compile(r"[A-Za-z]:[\\/]")
_IDS: Final = ("image", "label", "id", "session_id", "tag")
_NO: Final = ("", "0", "f", "false", "n", "no", "off")


def check_query(query: Iterable[tuple[str, str]]) -> None:
    """Refuse a query whose values lead out of a folder, such as `image=../../secret` or `logfile=/etc/passwd`.

    Refused are archives to unpack, too: MONAI Label lets their entries go where they want.

    Raises:
        RequestError: names the parameter.
    """
    for name, value in query:
        parts = value.replace("\\", "/").split("/")
        if name in _IDS and len(parts) > 1:
            raise RequestError(f"'{name}' must be an id, not a path: it may hold no slash")
        if ".." in parts or value.startswith(("/", "\\", "~")) or "\0" in value or _DRIVE.match(value):
            raise RequestError(f"'{name}' must be the id of an image or a label, not a path")
        if name == "uncompress" and value.lower() not in _NO:
            raise RequestError("archives are not unpacked here: send the files themselves, without 'uncompress'")


def check_path(path: str) -> None:
    """Refuse the path of an address that climbs, also where it does so only when it is decoded once more.

    MONAI Label hands paths below `/proxy/` on to the DICOMweb store, with the store's password: who climbs there
    reaches all that the store's machine serves.

    Raises:
        RequestError: it climbs.
    """
    decoded, earlier = path, ""
    while decoded != earlier:
        decoded, earlier = unquote(decoded), decoded
        if ".." in decoded.replace("\\", "/").split("/"):
            raise RequestError("the address must not hold '..'")


def check_tag(tag: object) -> str:
    """Return the tag under which a label is saved, which names a folder.

    Raises:
        RequestError: it is no plain word.
    """
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        raise RequestError(f"a label's tag is a word such as 'final' or 'original', not {tag!r}")
    return tag


def image_inside(image: Path, folders: Sequence[Path]) -> Path:
    """Return an image's path if the image lies in one of the folders, links followed.

    Raises:
        RequestError: it lies elsewhere: no request may read any other file of this machine.
    """
    found = image.resolve()
    if not any(found.is_relative_to(folder.resolve()) for folder in folders):
        raise RequestError("this image is none of the studies and was not sent along: name an image by its id")
    return found
