"""Pixels of DICOM files: decoding, masking of unused bits, and conversion to modality values.

* RescaleSlope and RescaleIntercept are applied per slice (they differ between the slices of a PET scan), or the
  Modality LUT instead.
* MONOCHROME1 displays low values bright. For CT, MR, PET and NM the values are quantities and are kept; for all other
  modalities, such as radiographs, the stored values are inverted within their bits, so that bright is high as in
  MONOCHROME2.
* Bits above BitsStored, which may hold old overlays, are masked, and signs are extended from BitsStored.
* PixelPaddingValue is kept: the value outside the scanner's field of view, rescaled like all others.
* Windows, VOI LUTs and real world value mappings are for display or other software and are not applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, BinaryIO, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medseg.errors import CaseError, MedsegError
from medseg.extras import advice, installed
from medseg.io.dicom.headers import Header
from medseg.io.dicom.sources import quiet, streams
from medseg.io.dicom.stacks import Slice

__all__ = ["QUANTITATIVE", "read_slices"]

# Modalities with quantitative values, independent of their display.
QUANTITATIVE: Final = ("CT", "MR", "PT", "NM")
_TAGS: Final = [
    Tag(keyword)
    for keyword in (
        *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration", "PhotometricInterpretation"),
        *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "ExtendedOffsetTable"),
        *("ExtendedOffsetTableLengths", "ModalityLUTSequence"),
    )
]
# Decoders of the compressed transfer syntaxes, by UID prefix.
_DECODERS: Final = (
    ("1.2.840.10008.1.2.4.9", "JPEG 2000", "openjpeg"),
    ("1.2.840.10008.1.2.4.20", "HTJ2K", "openjpeg"),
    ("1.2.840.10008.1.2.4.5", "JPEG", "libjpeg"),
    ("1.2.840.10008.1.2.4.6", "JPEG", "libjpeg"),
    ("1.2.840.10008.1.2.4.7", "JPEG", "libjpeg"),
    ("1.2.840.10008.1.2.4.8", "JPEG-LS", "libjpeg"),
)


def read_slices(slices: Sequence[Slice]) -> Iterator[tuple[int, NDArray[Any], float, float]]:
    """Yield the index of each slice, its values `(rows, columns[, samples])`, and their slope and intercept.

    Each file is decoded once, so the slices of a multi-frame file are consecutive.

    Raises:
        CaseError: A file cannot be decoded; the message names a missing decoder.
    """
    numbered = sorted(enumerate(slices), key=lambda pair: (str(pair[1].header.source), pair[0]))
    groups = {source: list(found) for source, found in groupby(numbered, key=lambda pair: pair[1].header.source)}
    for source, stream in streams(groups):
        header = groups[source][0][1].header
        frames, table = _decoded(stream, header)
        for number, item in groups[source]:
            values = _in_use(frames[item.plane.frame], header)
            if header.photometric == "MONOCHROME1" and header.modality not in QUANTITATIVE:
                values = _inverted(values, header)
            if table is not None:
                yield number, table.apply(values), 1.0, 0.0
            else:
                yield number, values, item.plane.slope, item.plane.inter


class _Table:
    """A Modality LUT; stored values outside it are clipped to its ends."""

    def __init__(self, item: Any, *, signed: bool) -> None:
        length, first, _ = (int(number) for number in item.LUTDescriptor)
        data = item.LUTData
        self.values = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(data, dtype=np.uint16)
        self.first = first - 65536 if signed and first > 32767 else first
        if not 0 < len(self.values) >= (length or 65536):
            raise ValueError("a Modality LUT is shorter than its descriptor says")

    def apply(self, stored: NDArray[Any]) -> NDArray[Any]:
        places = np.clip(stored.astype(np.int64) - self.first, 0, len(self.values) - 1)
        return self.values[places]


def _decoded(stream: BinaryIO, header: Header) -> tuple[NDArray[Any], _Table | None]:
    """Return the stored values `(frames, rows, columns[, samples])` of a file, and its Modality LUT, if any."""
    try:
        with quiet():
            content = pydicom.dcmread(stream, force=True, specific_tags=_TAGS)
            _complete_meta(content)
            frames = np.asarray(content.pixel_array)
            luts = content.get("ModalityLUTSequence")
            table = _Table(luts[0], signed=header.signed) if luts else None
    except (MedsegError, MemoryError):
        raise
    except BaseException as error:
        # Decoders raise many types on damaged files; those in Rust panic with one that is not an Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CaseError(_failure(header, error)) from error
        raise
    shape = (len(header.planes), header.rows, header.columns, *([3] if header.samples == 3 else []))
    if frames.size != np.prod(shape) or frames.dtype.kind not in "iu":
        raise CaseError(
            f"{header.source} is damaged: it decodes to {frames.shape} values of {frames.dtype}, expected {shape} "
            "integers."
        )
    return frames.reshape(shape), table


def _complete_meta(content: Any) -> None:
    """Set the transfer syntax detected by the parser in files without meta information."""
    if getattr(content, "file_meta", None) is None:
        content.file_meta = FileMetaDataset()
    if content.file_meta.get("TransferSyntaxUID"):
        return
    explicit = ExplicitVRLittleEndian if content.original_encoding[1] else ExplicitVRBigEndian
    content.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if content.original_encoding[0] else explicit


def _failure(header: Header, error: BaseException) -> str:
    for start, name, module in _DECODERS:
        if header.syntax.startswith(start) and not installed(module):
            return f"{header.source} is compressed as {name}, whose decoder is not installed: {advice(module)}."
    with quiet():
        syntax = UID(header.syntax).name if header.syntax else "no transfer syntax"
    reason = str(error).strip().splitlines()
    return (
        f"{header.source} cannot be decoded ({syntax}; {reason[0][:200] if reason else type(error).__name__}): it is "
        "damaged, or has an unsupported encoding. Copy or export it again."
    )


def _in_use(raw: NDArray[Any], header: Header) -> NDArray[Any]:
    """Mask values to the bits given by BitsStored and HighBit, and extend their sign."""
    width = raw.dtype.itemsize * 8
    if header.bits_stored >= width:
        return raw
    unsigned = raw.view(f"u{raw.dtype.itemsize}") if raw.dtype.isnative else raw.astype(f"u{raw.dtype.itemsize}")
    shift = max(0, header.high_bit + 1 - header.bits_stored)
    cut = (unsigned >> shift) & ((1 << header.bits_stored) - 1)
    if not header.signed:
        return cut.astype(unsigned.dtype, copy=False)
    signed = (cut << (width - header.bits_stored)).astype(f"i{raw.dtype.itemsize}")
    return signed >> (width - header.bits_stored)


def _inverted(values: NDArray[Any], header: Header) -> NDArray[Any]:
    """Mirror values within the range of their bits."""
    ends = (-(1 << (header.bits_stored - 1)), (1 << (header.bits_stored - 1)) - 1)
    low, high = ends if header.signed else (0, (1 << header.bits_stored) - 1)
    mirrored = low + high - values.astype(np.int64)
    return mirrored.astype(values.dtype)
