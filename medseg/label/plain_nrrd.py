"""Conversion of NRRD masks to the data type and encoding that a viewer requests; their geometry is kept."""

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
    """Rewrite an NRRD mask that medseg wrote in the requested data type and encoding.

    Browser viewers read uncompressed NRRD of one data type only. Masks in other formats are not changed.

    Args:
        path: File of the mask.
        dtype: Data type of the labels, such as "uint16"; unchanged by default.
        compress: False for raw voxels; any other value keeps gzip.

    Raises:
        RequestError: Unsupported data type, or labels beyond its range.
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
        raise RequestError(f"unsupported data type {name!r} of a mask: use one of {', '.join(_TYPES)}")
    wanted = np.dtype(name)
    if labels.size and int(labels.max()) > np.iinfo(wanted).max:
        raise RequestError(
            f"label {int(labels.max())} of the mask exceeds the range of {name}: request a larger data type"
        )
    return wanted
