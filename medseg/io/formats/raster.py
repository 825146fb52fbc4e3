"""2D images as PNG, JPEG, TIFF and BMP, read by Pillow.

The first axis is x (columns, left to right) and the second is y (rows, top to bottom), as in MONAI. 2D images have no
geometry, so their affine is the identity. Pixels keep their stored order: an EXIF orientation is for display only and
is not applied, because the mask has to match the stored pixels. A TIFF with an orientation tag is refused, since some
readers apply it and others do not.

Lossless conversions are made, everything else is refused:

* palette images become RGB; for a label the palette index is the label value;
* images of 1, 2 and 4 bits become 0 to 255; for a label the stored number is the label value;
* an alpha channel is dropped if every pixel is opaque;
* grayscale is repeated for a model with three channels, and color with equal channels becomes one channel.

Pillow silently reads some files incompletely or wrongly: 16 bit color, additional channels, signed and unsigned types.
The TIFF tags reveal these.
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
_GRAY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
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
    """Return the grid of a 2D image without decoding its pixels."""
    _refuse_volume(path, spatial_dims)
    with _opened(path) as image:
        return _grid(image, path, max_voxels)


def read(path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
    """Return the pixels `(C, x, y)` and their grid; the options are those of `medseg.io.load`."""
    _refuse_volume(path, options.spatial_dims)
    if options.index:
        raise CaseError(f"{path} is a single 2D image: index {options.index} is out of range.")
    with _opened(path) as image:
        grid = _grid(image, path, options.max_voxels)
        _refuse_unsuited(image, path, options.label)
        pixels = _label_pixels(image, path) if options.label else _image_pixels(image, path)
    first = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    planes = to_channels(first.transpose(0, 2, 1), options.channels, path)
    array = np.empty(planes.shape, dtype=np.int32 if options.label else image_type(planes.dtype, stored=options.stored))
    if options.label:
        fill_labels(array, planes, 1.0, 0.0, path)
    else:
        fill_image(array, planes, 1.0, 0.0, path)
    return array, grid


def write(stream: BinaryIO, array: NDArray[Any], path: Path, *, grid: Grid, like: Path | None) -> None:
    """Write labels `(x, y[, 1])` of type uint8 or uint16 as grayscale PNG or TIFF of 8 or 16 bits, by suffix."""
    if array.dtype.itemsize > 2:
        raise CaseError(f"{path}: the mask has labels above 65535, the maximum of PNG and TIFF. Choose another format.")
    image = Image.fromarray(np.ascontiguousarray(array.reshape(array.shape[:2]).T))
    image.save(stream, format="PNG" if path.suffix.lower() == ".png" else "TIFF")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a 2D image; errors of Pillow, now or while decoding, become CaseErrors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and about size, which is checked here
            with Image.open(path, formats=_FORMATS) as image:
                yield image
    except MedsegError:
        raise
    except Image.DecompressionBombError as error:
        raise CaseError(f"{path} has too many pixels for a 2D image: {error}.") from error
    except Exception as error:  # decoders raise many types on damaged files
        raise CaseError(f"{path} cannot be read as PNG, JPEG, TIFF or BMP: {error}.") from error


def _grid(image: Image.Image, path: Path, max_voxels: int) -> Grid:
    check_size(image.size, path, max_voxels)
    return Grid(image.size, np.eye(4))


def _refuse_volume(path: Path, spatial_dims: int | None) -> None:
    if spatial_dims == 3:
        raise CaseError(f"{path} is a 2D image: expected a volume with three axes, such as a NIfTI file.")


def _refuse_unsuited(image: Image.Image, path: Path, label: bool) -> None:
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise CaseError(f"{path} has {pages} pages: expected one image per file. Split it.")
    if label and (image.format == "JPEG" or image.info.get("compression") in _LOSSY):
        raise CaseError(f"{path} is a label with lossy compression, which changes label values: store labels as PNG.")
    if image.mode not in _GRAY_MODES and _sample_bits(image, path) > 8:
        raise CaseError(f"{path} has 16 bit color, of which only 8 bits would be read: convert it to 8 bits.")
    if image.format == "TIFF":
        _refuse_tags(image, path, label)
    elif (orientation := _exif_orientation(image)) not in (0, 1):
        text = f"EXIF orientation {orientation} (rotated or mirrored for display) is not applied"
        warn(logger, "exif-orientation-ignored", text, path)


def _exif_orientation(image: Image.Image) -> int:
    with suppress(Exception):  # a damaged EXIF block raises many types, and is ignored
        return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def _refuse_tags(image: Image.Image, path: Path, label: bool) -> None:
    """Refuse TIFFs that Pillow reads incompletely or wrongly."""
    orientation = _tag(image, _ORIENTATION, 1)
    if orientation != 1:
        raise CaseError(
            f"{path} is stored rotated or mirrored (TIFF orientation {orientation}), which readers treat differently: "
            "store it with orientation 1."
        )
    stored, read = _tag(image, _TIFF_SAMPLES, 1), len(image.getbands())
    if stored != read:
        raise CaseError(
            f"{path} has {stored} values per pixel, of which {read} would be read: extract the channels first."
        )
    meaning = _tag(image, _TIFF_PHOTOMETRIC, 1)
    if meaning == _YCBCR and image.info.get("compression") == "raw":
        # libtiff converts compressed YCbCr to RGB; Pillow before 13 reads uncompressed YCbCr as truncated RGB.
        raise CaseError(f"{path} has the unsupported color mode YCbCr: expected grayscale or RGB. Convert it.")
    white_is_zero = meaning == 0
    if white_is_zero and (label or _sample_bits(image, path) > 8):
        raise CaseError(
            f"{path} stores white as 0 (WhiteIsZero), which readers treat differently: invert it, with black as 0."
        )


def _tag(image: Image.Image, number: int, default: int) -> int:
    tags: dict[int, int | tuple[int, ...]] = getattr(image, "tag_v2", {})
    value = tags.get(number, default)
    return max(value) if isinstance(value, tuple) else value


def _sample_bits(image: Image.Image, path: Path) -> int:
    """Return the stored bits per sample; Pillow silently reduces 16 bit color to 8 bits."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]
    return _tag(image, _TIFF_BITS_PER_SAMPLE, 8)


def _image_pixels(image: Image.Image, path: Path) -> NDArray[Any]:
    """Return the pixels of an image, `(y, x)` or `(y, x, 3)`."""
    image = _without_alpha(image, path)
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode == "P":
        image = image.convert("RGB")
    if image.mode != "RGB" and image.mode not in _GRAY_MODES:
        raise CaseError(f"{path} has the unsupported color mode {image.mode}: expected grayscale or RGB. Convert it.")
    return _with_sign(np.asarray(image), image)


def _with_sign(pixels: NDArray[Any], image: Image.Image) -> NDArray[Any]:
    """Restore the signedness of the file: Pillow reads 8 bits as unsigned and 32 bits as signed."""
    numbers = _tag(image, _TIFF_SAMPLE_FORMAT, 0)
    if numbers == _SIGNED and pixels.dtype == np.uint8:
        return pixels.view(np.int8)
    if numbers in (0, _UNSIGNED) and pixels.dtype == np.int32 and _tag(image, _TIFF_BITS_PER_SAMPLE, 0) == 32:
        return pixels.view(np.uint32)
    return pixels


def _label_pixels(image: Image.Image, path: Path) -> NDArray[Any]:
    """Return the pixels of a label, `(y, x)`, or `(y, x, 3)` in color."""
    if image.mode in ("P", "1"):
        return np.asarray(image)
    bits = _sample_bits(image, path)
    pixels = _image_pixels(image, path)
    if image.mode == "L" and bits < 8:
        # Pillow scales values of fewer bits to 0 to 255.
        numbers: NDArray[Any] = pixels // (255 // (2**bits - 1))
        return numbers
    return pixels


def _without_alpha(image: Image.Image, path: Path) -> Image.Image:
    if not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):
        return _without_key(image, path)
    whole = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    alpha = whole.getchannel("A")
    if alpha.getextrema() != (255, 255):
        _refuse_transparency(int((np.asarray(alpha) < 255).sum()), whole, path)
    return whole.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def _without_key(image: Image.Image, path: Path) -> Image.Image:
    """Return 16 bit grayscale, which has no alpha in Pillow, if no pixel has the value of the transparency key."""
    clear = int((np.asarray(image) == image.info["transparency"]).sum())
    if clear:
        _refuse_transparency(clear, image, path)
    return image


def _refuse_transparency(clear: int, image: Image.Image, path: Path) -> NoReturn:
    raise CaseError(
        f"{path} has {clear:,} transparent pixels of {math.prod(image.size):,}, whose color is undefined: flatten it "
        "onto a background first."
    )


def to_channels(planes: NDArray[Any], channels: int | None, path: Path) -> NDArray[Any]:
    """Convert `(C, x, y)` to the expected number of channels, if that is lossless."""
    found = len(planes)
    if channels is None or channels == found:
        return planes
    if found == 1 and channels == 3:
        logger.info("%s is grayscale: its channel is repeated for a model of color images.", path)
        return np.broadcast_to(planes, (3, *planes.shape[1:]))
    if found == 3 and channels == 1 and (planes == planes[:1]).all():
        return planes[:1]
    kind = "grayscale" if found == 1 else "in color"
    raise CaseError(f"{path} is {kind}, {found} values per pixel: expected {channels}. Convert it.")
