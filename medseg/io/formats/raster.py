"""PNG, JPEG, TIFF and BMP pictures, through Pillow.

A picture's first axis is x (columns, left to right) and its second is y (rows, top to bottom), as in MONAI. It has no
place in space, so its affine is the identity. Pixels stay where they are stored: an EXIF rotation is for display only
and is not applied, because the mask has to lie on the stored pixels. A TIFF with an orientation of its own is refused,
since some readers turn it and others do not.

What loses nothing is converted, the rest is refused:

* palette images become RGB; of a label the palette index is the label;
* images of 1, 2 and 4 bits become 0 to 255; of a label the stored number is the label;
* an alpha channel is dropped where every pixel is opaque;
* grey is repeated for a model of three channels, and color whose channels are equal becomes one channel.

Pillow itself is silent where it reads less than is stored, or something else: color of 16 bits, further channels,
numbers with or without sign. The TIFF's tags tell.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medseg.errors import CaseError, MedsegError
from medseg.io.geometry import MAX_VOXELS, Grid, check_size
from medseg.io.voxels import ReadOptions, fill_image, fill_labels, image_type
from medseg.notices import warn

__all__ = ["read", "read_grid", "to_channels", "write"]

logger = logging.getLogger(__name__)

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _ORIENTATION, _TIFF_SAMPLES, _TIFF_SAMPLE_FORMAT = (
    258,
    262,
    274,
    277,
    339,
)
_UNSIGNED, _SIGNED = 1, 2
_YCBCR = 6
_LOSSY = ("jpeg", "webp")


def read_grid(path: Path, *, spatial_dims: int | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the grid of a picture; its pixels are not decoded."""
    _refuse_volume(path, spatial_dims)
    with _opened(path) as picture:
        return _grid(picture, path, max_voxels)


def read(path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
    """Return the pixels `(C, x, y)` and their grid; the options are those of `medseg.io.load`."""
    _refuse_volume(path, options.spatial_dims)
    if options.index:
        raise CaseError(f"{path} is one picture: there is no picture {options.index} in it.")
    with _opened(path) as picture:
        grid = _grid(picture, path, options.max_voxels)
        _refuse_unsuited(picture, path, options.label)
        pixels = _label_pixels(picture, path) if options.label else _image_pixels(picture, path)
    first = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    planes = to_channels(first.transpose(0, 2, 1), options.channels, path)
    array = np.empty(planes.shape, dtype=np.int32 if options.label else image_type(planes.dtype, stored=options.stored))
    if options.label:
        fill_labels(array, planes, 1.0, 0.0, path)
    else:
        fill_image(array, planes, 1.0, 0.0, path)
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
    if label and (picture.format == "JPEG" or picture.info.get("compression") in _LOSSY):
        raise CaseError(f"{path} is a label in JPEG, which changes labels when it compresses: store labels as PNG.")
    if picture.mode not in _GREY_MODES and _sample_bits(picture, path) > 8:
        raise CaseError(f"{path} has color of 16 bits, of which only 8 would be read: convert it to 8 bits yourself.")
    if picture.format == "TIFF":
        _refuse_tags(picture, path, label)
    elif (orientation := _exif_orientation(picture)) not in (0, 1):
        text = f"EXIF orientation {orientation} (rotated or mirrored for display) is not applied"
        warn(logger, "exif-orientation-ignored", text, path)


def _exif_orientation(picture: Image.Image) -> int:
    with suppress(Exception):  # a damaged EXIF block says nothing, and raises many types
        return int(picture.getexif().get(_ORIENTATION, 1))
    return 1


def _refuse_tags(picture: Image.Image, path: Path, label: bool) -> None:
    """Refuse TIFFs of which Pillow reads something else than is stored."""
    orientation = _tag(picture, _ORIENTATION, 1)
    if orientation != 1:
        raise CaseError(
            f"{path} is stored turned or mirrored (TIFF orientation {orientation}), which programs treat differently: "
            "store it upright."
        )
    stored, read = _tag(picture, _TIFF_SAMPLES, 1), len(picture.getbands())
    if stored != read:
        raise CaseError(f"{path} has {stored} values per pixel, of which {read} would be read: choose channels first.")
    meaning = _tag(picture, _TIFF_PHOTOMETRIC, 1)
    if meaning == _YCBCR and picture.info.get("compression") == "raw":
        # libtiff converts compressed YCbCr to RGB; raw, Pillow before 13 takes it for cut-off RGB.
        raise CaseError(f"{path} has the color mode YCbCr: expected grey or RGB. Convert it.")
    white_is_zero = meaning == 0
    if white_is_zero and (label or _sample_bits(picture, path) > 8):
        raise CaseError(f"{path} stores white as 0, which programs treat differently: invert it, with black as 0.")


def _tag(picture: Image.Image, number: int, default: int) -> int:
    tags: dict[int, int | tuple[int, ...]] = getattr(picture, "tag_v2", {})
    value = tags.get(number, default)
    return max(value) if isinstance(value, tuple) else value


def _sample_bits(picture: Image.Image, path: Path) -> int:
    """Return the stored bits per sample; Pillow cuts 16-bit color to 8 without a word."""
    if picture.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]
    return _tag(picture, _TIFF_BITS_PER_SAMPLE, 8)


def _image_pixels(picture: Image.Image, path: Path) -> NDArray[Any]:
    """Return `(y, x)` or `(y, x, 3)`."""
    picture = _without_alpha(picture, path)
    if picture.mode == "1":
        return np.asarray(picture.convert("L"))
    if picture.mode == "P":
        picture = picture.convert("RGB")
    if picture.mode != "RGB" and picture.mode not in _GREY_MODES:
        raise CaseError(f"{path} has the color mode {picture.mode}: expected grey or RGB. Convert it.")
    return _with_sign(np.asarray(picture), picture)


def _with_sign(pixels: NDArray[Any], picture: Image.Image) -> NDArray[Any]:
    """Give numbers the sign that the file says: Pillow takes 8 bits as unsigned and 32 bits as signed."""
    numbers = _tag(picture, _TIFF_SAMPLE_FORMAT, 0)
    if numbers == _SIGNED and pixels.dtype == np.uint8:
        return pixels.view(np.int8)
    if numbers in (0, _UNSIGNED) and pixels.dtype == np.int32 and _tag(picture, _TIFF_BITS_PER_SAMPLE, 0) == 32:
        return pixels.view(np.uint32)
    return pixels


def _label_pixels(picture: Image.Image, path: Path) -> NDArray[Any]:
    """Return `(y, x)`, or `(y, x, 3)` of a color picture."""
    if picture.mode in ("P", "1"):
        return np.asarray(picture)
    bits = _sample_bits(picture, path)
    pixels = _image_pixels(picture, path)
    if picture.mode == "L" and bits < 8:
        # Pillow spreads the numbers of few bits over 0 to 255.
        numbers: NDArray[Any] = pixels // (255 // (2**bits - 1))
        return numbers
    return pixels


def _without_alpha(picture: Image.Image, path: Path) -> Image.Image:
    if not picture.has_transparency_data:
        return picture
    if picture.mode.startswith("I"):
        return _without_key(picture, path)
    whole = picture if picture.mode in ("LA", "RGBA") else picture.convert("RGBA")
    alpha = whole.getchannel("A")
    if alpha.getextrema() != (255, 255):
        _refuse_transparency(int((np.asarray(alpha) < 255).sum()), whole, path)
    return whole.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")


def _without_key(picture: Image.Image, path: Path) -> Image.Image:
    """Return grey of 16 bits, which has no alpha in Pillow, if no pixel has the value that means transparent."""
    clear = int((np.asarray(picture) == picture.info["transparency"]).sum())
    if clear:
        _refuse_transparency(clear, picture, path)
    return picture


def _refuse_transparency(clear: int, picture: Image.Image, path: Path) -> NoReturn:
    raise CaseError(
        f"{path} is transparent in {clear:,} of {math.prod(picture.size):,} pixels, so their color is undefined: "
        "flatten it onto a background first."
    )


def to_channels(planes: NDArray[Any], channels: int | None, path: Path) -> NDArray[Any]:
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
