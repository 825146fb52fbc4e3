"""PNG, JPEG, TIFF and BMP pictures, through Pillow.

A picture's first axis is x (columns, left to right) and its second is y (rows, top to bottom), as in MONAI. It has no
place in space, so its affine is the identity. Pixels stay where they are stored: an EXIF rotation is for display only
and is not applied, because the mask has to lie on the stored pixels.

What loses nothing is converted, the rest is refused:

* palette images become RGB; of a label the palette index is the label;
* 1-bit images become 0 and 255; as a label 0 and 1;
* an alpha channel is dropped where every pixel is opaque;
* grey is repeated for a model of three channels, and color whose channels are equal becomes one channel.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medseg.errors import CaseError, MedsegError
from medseg.io.geometry import MAX_VOXELS, Grid, check_size
from medseg.io.voxels import fill_image, fill_labels, image_type

__all__ = ["read", "read_grid", "write"]

logger = logging.getLogger(__name__)

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_TIFF_BITS_PER_SAMPLE = 258


def read_grid(path: Path, *, spatial_dims: int | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the grid of a picture; its pixels are not decoded."""
    _refuse_volume(path, spatial_dims)
    with _opened(path) as picture:
        return _grid(picture, path, max_voxels)


def read(
    path: Path,
    *,
    spatial_dims: int | None,
    channels: int | None,
    index: int | None,
    label: bool,
    stored: bool,
    max_voxels: int,
) -> tuple[NDArray[Any], Grid]:
    """Return the pixels `(C, x, y)` and their grid; the arguments are those of `medseg.io.load`."""
    _refuse_volume(path, spatial_dims)
    if index:
        raise CaseError(f"{path} is one picture: there is no picture {index} in it.")
    with _opened(path) as picture:
        grid = _grid(picture, path, max_voxels)
        _refuse_unsuited(picture, path, label)
        pixels = _label_pixels(picture, path) if label else _image_pixels(picture, path)
    first = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    planes = _to_channels(first.transpose(0, 2, 1), channels, path)
    array = np.empty(planes.shape, dtype=np.int32 if label else image_type(planes.dtype, stored=stored))
    if label:
        fill_labels(array, planes, 1.0, 0.0, path)
    else:
        fill_image(array, planes, 1.0, 0.0)
    return array, grid


def write(stream: BinaryIO, array: NDArray[Any], path: Path, *, grid: Grid, like: Path | None) -> None:
    """Write labels `(x, y[, 1])` of type uint8 or uint16 as a grey PNG or TIFF of 8 or 16 bits, as the name says."""
    if array.dtype.itemsize > 2:
        raise CaseError(f"{path}: the mask holds labels above 65535, the largest that a picture can hold.")
    picture = Image.fromarray(np.ascontiguousarray(array.reshape(array.shape[:2]).T))
    picture.save(stream, format="PNG" if path.suffix.lower() == ".png" else "TIFF")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture; whatever Pillow finds wrong with it, now or while decoding, becomes a CaseError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; and about size, which is checked here
            with Image.open(path, formats=_FORMATS) as picture:
                yield picture
    except MedsegError:
        raise
    except Image.DecompressionBombError as error:
        raise CaseError(f"{path} claims too many pixels to be a picture: {error}.") from error
    except Exception as error:  # decoders raise many types on damaged files
        raise CaseError(f"{path} cannot be read as PNG, JPEG, TIFF or BMP: {error}.") from error


def _grid(picture: Image.Image, path: Path, max_voxels: int) -> Grid:
    check_size(picture.size, path, max_voxels)
    return Grid(picture.size, np.eye(4))


def _refuse_volume(path: Path, spatial_dims: int | None) -> None:
    if spatial_dims == 3:
        raise CaseError(f"{path} is a picture with two axes: expected a volume with three, such as a NIfTI file.")


def _refuse_unsuited(picture: Image.Image, path: Path, label: bool) -> None:
    pages = getattr(picture, "n_frames", 1)
    if pages > 1:
        raise CaseError(f"{path} has {pages} pages: expected one picture per file. Split it.")
    if label and picture.format == "JPEG":
        raise CaseError(f"{path} is a label in JPEG, which changes labels when it compresses: store labels as PNG.")
    if picture.mode not in _GREY_MODES and _sample_bits(picture, path) > 8:
        raise CaseError(f"{path} has color of 16 bits, of which only 8 would be read: convert it to 8 bits yourself.")


def _sample_bits(picture: Image.Image, path: Path) -> int:
    """Return the stored bits per sample; Pillow cuts 16-bit color to 8 without a word."""
    if picture.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]
    tags: dict[int, tuple[int, ...]] = getattr(picture, "tag_v2", {})
    return max(tags.get(_TIFF_BITS_PER_SAMPLE, (8,)))


def _image_pixels(picture: Image.Image, path: Path) -> NDArray[Any]:
    """Return `(y, x)` or `(y, x, 3)`."""
    picture = _without_alpha(picture, path)
    if picture.mode == "1":
        return np.asarray(picture.convert("L"))
    if picture.mode == "P":
        picture = picture.convert("RGB")
    if picture.mode != "RGB" and picture.mode not in _GREY_MODES:
        raise CaseError(f"{path} has the color mode {picture.mode}: expected grey or RGB. Convert it.")
    return np.asarray(picture)


def _label_pixels(picture: Image.Image, path: Path) -> NDArray[Any]:
    """Return `(y, x)`, or `(y, x, 3)` of a color picture."""
    if picture.mode in ("P", "1"):
        return np.asarray(picture)
    return _image_pixels(picture, path)


def _without_alpha(picture: Image.Image, path: Path) -> Image.Image:
    if not picture.has_transparency_data:
        return picture
    whole = picture if picture.mode in ("LA", "RGBA") else picture.convert("RGBA")
    alpha = whole.getchannel("A")
    if alpha.getextrema() != (255, 255):
        clear = int((np.asarray(alpha) < 255).sum())
        raise CaseError(
            f"{path} is transparent in {clear:,} of {math.prod(whole.size):,} pixels, so their color is undefined: "
            "flatten it onto a background first."
        )
    return whole.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")


def _to_channels(planes: NDArray[Any], channels: int | None, path: Path) -> NDArray[Any]:
    """Give `(C, x, y)` the asked number of channels, where that loses nothing."""
    found = len(planes)
    if channels is None or channels == found:
        return planes
    if found == 1 and channels == 3:
        logger.info("%s is grey: its channel is repeated for a model of color pictures.", path)
        return np.broadcast_to(planes, (3, *planes.shape[1:]))
    if found == 3 and channels == 1 and (planes == planes[:1]).all():
        return planes[:1]
    kind = "grey" if found == 1 else "in color"
    raise CaseError(f"{path} is {kind}, {found} values per pixel: expected {channels}. Convert it.")
