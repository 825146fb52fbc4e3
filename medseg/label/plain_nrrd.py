"""NRRD masks in the type and packing that a viewer asks for, with every field of their place as it was."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from medseg.errors import RequestError
from medseg.files import replacing

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["to_viewer_nrrd"]

_TYPES: Final = ("uint8", "uint16", "int16", "int32")


def to_viewer_nrrd(path: Path, *, dtype: str | None = None, compress: bool | None = None) -> None:
    """Rewrite a mask that medseg wrote, where it is NRRD and not yet as asked for.

    Viewers in a browser read plain NRRD of one type only. Other formats hold any type, and are left as they are.

    Args:
        path: the mask.
        dtype: type of the labels.
        compress: False for plain voxels; anything else leaves them packed.

    Raises:
        RequestError: an unknown type, or one that cannot hold the labels.
    """
    if not path.name.endswith(".nrrd") or (dtype is None and compress is not False):
        return
    head, _, packed = path.read_bytes().partition(b"\n\n")
    fields = head.decode("utf-8").split("\n")
    values = dict(field.split(": ", 1) for field in fields[1:])
    labels = np.frombuffer(gzip.decompress(packed), np.dtype(values["type"]).newbyteorder("<"))
    wanted = _type(dtype, labels) if dtype else labels.dtype
    values |= {"type": wanted.name, "encoding": "raw" if compress is False else "gzip"}
    voxels = labels.astype(wanted.newbyteorder("<")).tobytes()
    text = "\n".join([fields[0], *(f"{name}: {value}" for name, value in values.items())])
    with replacing(path) as temporary:
        temporary.write_bytes(
            text.encode() + b"\n\n" + (voxels if compress is False else gzip.compress(voxels, mtime=0))
        )


def _type(name: str, labels: NDArray[Any]) -> np.dtype[Any]:
    if name not in _TYPES:
        raise RequestError(f"a mask cannot be of type {name!r}: use one of {', '.join(_TYPES)}")
    wanted = np.dtype(name)
    if labels.size and int(labels.max()) > np.iinfo(wanted).max:
        raise RequestError(f"the mask holds the label {int(labels.max())}, which {name} cannot: ask for another type")
    return wanted
