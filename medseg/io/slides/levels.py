"""The stored levels of a whole-slide image, through OpenSlide, tiffslide or, for plain pictures, Pillow.

OpenSlide comes first: it reads most vendors' formats and DICOM. An OME-TIFF goes to tiffslide where that is installed,
because its smaller levels hang below the first page, where OpenSlide does not look. What both refuse may still be a
picture of one level, which is then held in memory whole.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medseg.errors import CaseError, MedsegError, RequestError
from medseg.extras import advice, require
from medseg.io.dicom.detect import is_dicom
from medseg.io.formats import raster
from medseg.io.names import file_kind
from medseg.io.slides.dicom import check_dicom_slide, find_dicom_slide
from medseg.io.voxels import ReadOptions
from medseg.notices import warn

__all__ = ["Levels", "open_levels"]

logger = logging.getLogger(__name__)

_EXTRA: Final = f"Slides need OpenSlide or tiffslide: {advice('openslide')}"
# A microscope resolves 0.2 micrometers; 20 is a scanned page at 1270 dpi. Values outside come from picture programs
# (72 dpi is 353 micrometers) or from a wrong unit.
_MPP_RANGE: Final = (0.01, 20.0)
_WHITE: Final = (255, 255, 255)
_HEAD_BYTES: Final = 1 << 20
_BITS_PER_SAMPLE: Final = 258
_OME_SIZES: Final = ("PhysicalSizeX", "PhysicalSizeY")
# Micrometers per unit; the letter mu has two code points and an escape.
_OME_UNITS: Final = {"um": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "&#181;m": 1.0, "&#xB5;m": 1.0, "nm": 1e-3, "mm": 1e3}


# Pixels of one tile; real ones have up to a few million.
_MAX_TILE: Final = 1 << 26


class Levels(Protocol):
    """The resolutions at which a file stores one slide, the finest first.

    Attributes:
        backend: the library that reads it.
        sizes: `(width, height)` of each level in pixels.
        mpp: micrometers per pixel of the finest level along x and y, or None where the file does not say.
        note: why `mpp` is None, as half a sentence.
    """

    backend: str
    sizes: tuple[tuple[int, int], ...]
    mpp: tuple[float, float] | None
    note: str

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return `(height, width, 3)` from pixel (x, y) of a level on; the window lies inside the level."""

    def close(self) -> None:
        """Close the file."""


def open_levels(path: Path) -> Levels:
    """Open a slide with the first library that can.

    Raises:
        CaseError: the file is missing, damaged, not in color of 8 bits, or nothing installed can read it.
    """
    if not path.exists():
        raise CaseError(f"{path} does not exist: check the path.")
    file = _file_of_folder(path) if path.is_dir() else path
    with _reading(file):
        if is_dicom(file):
            check_dicom_slide(file)
    reasons = [] if _installed("openslide") or _installed("tiffslide") else [_EXTRA]
    for name, opener in _openers(file):
        try:
            with _reading(file):
                return opener(file)
        except CaseError as error:
            if error.__cause__ is None and name != "Pillow":
                raise  # the library reads it, and what is in it cannot be used
            reasons.append(str(error) if name == "Pillow" else f"{name}: {error.__cause__ or error}")
    raise CaseError(f"{file} cannot be read as a slide. {' '.join(_sentence(reason) for reason in reasons)}")


def _openers(file: Path) -> list[tuple[str, Callable[[Path], Levels]]]:
    openers: list[tuple[str, Callable[[Path], Levels]]] = []
    if _installed("openslide"):
        openers.append(("OpenSlide", _OpenSlideLevels))
    # tiffslide parses damaged files for minutes, so it gets only what OpenSlide does not read right
    if _installed("tiffslide") and (_is_ome(file) or not openers):
        openers.insert(0, ("tiffslide", _TiffSlideLevels))
    if file_kind(file) not in (None, "slide", "dicom"):
        openers.append(("Pillow", _PictureLevels))
    return openers


def _installed(name: str) -> bool:
    try:
        require(name, "Reading slides")
    except RequestError:
        return False
    return True


def _file_of_folder(folder: Path) -> Path:
    if not _installed("openslide"):
        raise CaseError(f"{folder} is a folder: expected a file, or the folder of a DICOM slide. {_EXTRA}.")
    with _reading(folder):
        return find_dicom_slide(folder)


def _is_ome(file: Path) -> bool:
    if not file.name.lower().endswith((".tif", ".tiff", ".btf", ".tf8")):
        return False
    with file.open("rb") as stream:
        return ".ome." in file.name.lower() or b"openmicroscopy.org" in stream.read(_HEAD_BYTES)


def _sentence(reason: str) -> str:
    return f"{reason.rstrip('.')}."


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn whatever a library finds wrong with a file into a CaseError, and keep its warnings to itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MedsegError:
        raise
    except Exception as error:  # readers raise many types on damaged files
        raise CaseError(f"{file} cannot be read as a slide: {error}.") from error


def _checked_sizes(sizes: Any, file: Path) -> tuple[tuple[int, int], ...]:
    """Return level sizes as plain numbers; drop levels that are larger than the one before."""
    checked: list[tuple[int, int]] = []
    for width, height in sizes:
        if width < 1 or height < 1:
            raise CaseError(f"{file} has a level of {width} x {height} pixels: its header is wrong.")
        if not checked or (width <= checked[-1][0] and height <= checked[-1][1]):
            checked.append((int(width), int(height)))
        else:
            text = f"level {len(checked)} is larger than the one before; it and those after it are not used"
            warn(logger, "levels-skipped", text, file)
            break
    return tuple(checked)


def _checked_mpp(x: Any, y: Any) -> tuple[tuple[float, float] | None, str]:
    """Return the micrometers per pixel, or None and the reason."""
    if x is None or y is None:
        return None, "says nothing about the size of its pixels"
    try:
        mpp = float(x), float(y)
    except (TypeError, ValueError):
        return None, f"gives {x!r} x {y!r} as the size of its pixels, which is no number"
    low, high = _MPP_RANGE
    if all(math.isfinite(value) and low <= value <= high for value in mpp):
        return mpp, ""
    return None, f"claims pixels of {mpp[0]:.4g} x {mpp[1]:.4g} micrometers, outside {low:g} to {high:g}"


def _ome_mpp(description: str) -> tuple[float, float] | None:
    """Return the pixel size that OME-XML gives for its first image; tiffslide looks at TIFF tags alone."""
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", description[:_HEAD_BYTES])
    if pixels is None:
        return None
    values = dict(re.findall(r"\b(PhysicalSize[XY](?:Unit)?)\s*=\s*[\"']([^\"']*)", pixels.group()))
    try:
        x, y = (float(values[key]) * _OME_UNITS[values.get(f"{key}Unit", "um")] for key in _OME_SIZES)
    except (KeyError, ValueError):
        return None
    return x, y


class _OpenSlideLevels:
    backend = "openslide"

    def __init__(self, file: Path) -> None:
        self._file = file
        openslide = require("openslide", "Reading slides")
        self._slide = openslide.OpenSlide(str(file))
        properties: Mapping[str, str] = self._slide.properties
        if properties.get("openslide.vendor") == "generic-tiff" and _sample_bits(file) > 8:
            self._slide.close()
            raise CaseError(f"{file} has more than 8 bits per color, which OpenSlide would cut: convert it yourself.")
        self.sizes = _checked_sizes(self._slide.level_dimensions, file)
        self._check_tiles(properties)
        self.mpp, self.note = _checked_mpp(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"))
        self._background = _color(properties.get("openslide.background-color"))

    def _check_tiles(self, properties: Mapping[str, str]) -> None:
        """Refuse tiles that OpenSlide would end the process over when it has no memory for one."""
        for level in range(len(self.sizes)):
            sides = [int(properties.get(f"openslide.level[{level}].tile-{side}", 0)) for side in ("width", "height")]
            if sides[0] * sides[1] > _MAX_TILE:
                self._slide.close()
                raise CaseError(f"{self._file} claims tiles of {sides[0]:,} x {sides[1]:,} pixels: it is damaged.")

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        factor = self._slide.level_downsamples[level]
        with _reading(self._file):
            image = self._slide.read_region((round(x * factor), round(y * factor)), level, (width, height))
        pixels = np.asarray(image)
        colors = pixels[..., :3].copy()
        # Only what was never scanned is wholly transparent; at the border of tiles of a level whose factor is not
        # whole, OpenSlide makes pixels a little so, and their color is right.
        colors[pixels[..., 3] == 0] = self._background
        return colors

    def close(self) -> None:
        self._slide.close()


class _TiffSlideLevels:
    backend = "tiffslide"

    def __init__(self, file: Path) -> None:
        self._file = file
        self._slide = require("tiffslide", "Reading slides").TiffSlide(str(file))
        try:
            properties: Mapping[str, Any] = self._slide.properties
            self.sizes = _checked_sizes(self._slide.level_dimensions, file)
            found = _ome_mpp(str(properties.get("tiff.ImageDescription") or ""))
            tags = properties.get("tiffslide.mpp-x"), properties.get("tiffslide.mpp-y")
            self.mpp, self.note = _checked_mpp(*(found or tags))
            self.read(len(self.sizes) - 1, 0, 0, 1, 1)
        except BaseException:
            self._slide.close()
            raise

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        factor = self._slide.level_downsamples[level]
        location = _location(x, factor), _location(y, factor)
        with _reading(self._file):
            pixels = self._slide.read_region(location, level, (width, height), as_array=True)
        return _as_rgb(np.asarray(pixels), self._file)

    def close(self) -> None:
        self._slide.close()


class _PictureLevels:
    backend = "pillow"
    mpp: tuple[float, float] | None = None
    note = "is a plain picture, which says nothing of micrometers"

    def __init__(self, file: Path) -> None:
        pixels, _ = raster.read(file, ReadOptions(spatial_dims=2, stored=True))
        self._pixels = _as_rgb(pixels.transpose(2, 1, 0), file)
        self.sizes: tuple[tuple[int, int], ...] = ((pixels.shape[1], pixels.shape[2]),)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        return self._pixels[y : y + height, x : x + width]

    def close(self) -> None:
        self._pixels = np.empty((0, 0, 3), np.uint8)


def _location(index: int, factor: float) -> int:
    """Return a place at level 0 that tiffslide, which divides by `factor` and cuts, takes to `index` of a level."""
    place = math.ceil(index * factor)
    return place if int(place / factor) == index else place + 1


def _as_rgb(pixels: NDArray[Any], file: Path) -> NDArray[np.uint8]:
    """Return `(h, w, 3)` from grey, color or opaque color with alpha, of 8 bits."""
    if pixels.dtype != np.uint8:
        raise CaseError(f"{file} has values of type {pixels.dtype}: expected color of 8 bits. Convert it.")
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.shape[-1] == 4 and (pixels[..., 3] == 255).all():
        return pixels[..., :3]
    if pixels.shape[-1] != 3:
        raise CaseError(f"{file} has {pixels.shape[-1]} values per pixel: expected color. Choose or combine channels.")
    return pixels


def _sample_bits(file: Path) -> int:
    """Return the bits per sample of a TIFF's first page; 8 where Pillow cannot tell."""
    try:
        with Image.open(file, formats=("TIFF",)) as picture:
            tags: dict[int, tuple[int, ...]] = getattr(picture, "tag_v2", {})
            return max(tags.get(_BITS_PER_SAMPLE, (8,)))
    except Exception:  # of any damaged header
        return 8


def _color(text: str | None) -> tuple[int, int, int]:
    """Return red, green and blue of "RRGGBB"; white for anything else."""
    try:
        red, green, blue = bytes.fromhex(text or "")
    except ValueError:
        return _WHITE
    return red, green, blue
