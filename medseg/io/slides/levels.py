"""The stored levels of a whole-slide image, read by OpenSlide, tiffslide or, for single-level images, Pillow.

OpenSlide is tried first: it reads most vendor formats and DICOM. An OME-TIFF is read by tiffslide if installed, because
OpenSlide ignores the SubIFDs with its smaller levels. A file that both refuse may still be an ordinary 2D image, which
is then held in memory as a whole.
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
# A microscope resolves 0.2 µm; 20 µm is a scanned page at 1270 dpi. Values outside come from image editors (72 dpi is
# 353 µm) or from a wrong unit.
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
    """The stored levels of a slide, the finest first.

    Attributes:
        backend: Name of the library that reads the file.
        sizes: Size `(width, height)` of each level in pixels.
        mpp: Resolution of the finest level in µm/px along x and y; None if the file has none.
        note: Reason why `mpp` is None, as a phrase.
    """

    backend: str
    sizes: tuple[tuple[int, int], ...]
    mpp: tuple[float, float] | None
    note: str

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return the region `(height, width, 3)` of a level that starts at pixel (x, y) and is inside the level."""

    def close(self) -> None:
        """Close the file."""


def open_levels(path: Path) -> Levels:
    """Open a slide with the first library that can read it.

    Raises:
        CaseError: The file is missing, damaged, not in 8 bit color, or no installed library can read it.
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
                raise  # the library reads it, but its content is unsupported
            reasons.append(str(error) if name == "Pillow" else f"{name}: {error.__cause__ or error}")
    raise CaseError(f"{file} cannot be read as a slide. {' '.join(_sentence(reason) for reason in reasons)}")


def _openers(file: Path) -> list[tuple[str, Callable[[Path], Levels]]]:
    openers: list[tuple[str, Callable[[Path], Levels]]] = []
    if _installed("openslide"):
        openers.append(("OpenSlide", _OpenSlideLevels))
    # tiffslide parses damaged files for minutes, so it only opens what OpenSlide does not read correctly
    if _installed("tiffslide") and (_is_ome(file) or not openers):
        openers.insert(0, ("tiffslide", _TiffSlideLevels))
    if file_kind(file) not in (None, "slide", "dicom"):
        openers.append(("Pillow", _ImageLevels))
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
    """Convert all errors of a library to CaseErrors, and suppress its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MedsegError:
        raise
    except Exception as error:  # readers raise many types on damaged files
        raise CaseError(f"{file} cannot be read as a slide: {error}.") from error


def _checked_sizes(sizes: Any, file: Path) -> tuple[tuple[int, int], ...]:
    """Return level sizes as integers; drop levels that are larger than their predecessor."""
    checked: list[tuple[int, int]] = []
    for width, height in sizes:
        if width < 1 or height < 1:
            raise CaseError(f"{file} has an invalid level of {width} x {height} pixels: its header is wrong.")
        if not checked or (width <= checked[-1][0] and height <= checked[-1][1]):
            checked.append((int(width), int(height)))
        else:
            text = f"level {len(checked)} is larger than the previous one; it and all later levels are not used"
            warn(logger, "levels-skipped", text, file)
            break
    return tuple(checked)


def _checked_mpp(x: Any, y: Any) -> tuple[tuple[float, float] | None, str]:
    """Return the resolution in µm/px, or None and the reason."""
    if x is None or y is None:
        return None, "has no pixel size (resolution)"
    try:
        mpp = float(x), float(y)
    except (TypeError, ValueError):
        return None, f"has an invalid pixel size {x!r} x {y!r}"
    low, high = _MPP_RANGE
    if all(math.isfinite(value) and low <= value <= high for value in mpp):
        return mpp, ""
    return None, f"has an implausible pixel size of {mpp[0]:.4g} x {mpp[1]:.4g} µm, outside {low:g} to {high:g}"


def _ome_mpp(description: str) -> tuple[float, float] | None:
    """Return the pixel size of the first image in OME-XML; tiffslide reads only TIFF tags."""
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
            raise CaseError(
                f"{file} has more than 8 bits per channel, which OpenSlide would truncate: convert it to 8 bits."
            )
        self.sizes = _checked_sizes(self._slide.level_dimensions, file)
        self._check_tiles(properties)
        self.mpp, self.note = _checked_mpp(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"))
        self._background = _color(properties.get("openslide.background-color"))

    def _check_tiles(self, properties: Mapping[str, str]) -> None:
        """Refuse tiles so large that OpenSlide would abort the process when it cannot allocate one."""
        for level in range(len(self.sizes)):
            sides = [int(properties.get(f"openslide.level[{level}].tile-{side}", 0)) for side in ("width", "height")]
            if sides[0] * sides[1] > _MAX_TILE:
                self._slide.close()
                raise CaseError(f"{self._file} is damaged: it has tiles of {sides[0]:,} x {sides[1]:,} pixels.")

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        factor = self._slide.level_downsamples[level]
        with _reading(self._file):
            image = self._slide.read_region((round(x * factor), round(y * factor)), level, (width, height))
        pixels = np.asarray(image)
        colors = pixels[..., :3].copy()
        # Only unscanned regions are fully transparent. At tile borders of levels with a non-integer downsampling
        # factor, OpenSlide returns slightly transparent pixels with the right color.
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


class _ImageLevels:
    backend = "pillow"
    mpp: tuple[float, float] | None = None
    note = "is an ordinary 2D image without a pixel size"

    def __init__(self, file: Path) -> None:
        pixels, _ = raster.read(file, ReadOptions(spatial_dims=2, stored=True))
        self._pixels = _as_rgb(pixels.transpose(2, 1, 0), file)
        self.sizes: tuple[tuple[int, int], ...] = ((pixels.shape[1], pixels.shape[2]),)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        return self._pixels[y : y + height, x : x + width]

    def close(self) -> None:
        self._pixels = np.empty((0, 0, 3), np.uint8)


def _location(index: int, factor: float) -> int:
    """Return the position at level 0 that tiffslide, which divides by `factor` and truncates, maps to `index`."""
    position = math.ceil(index * factor)
    return position if int(position / factor) == index else position + 1


def _as_rgb(pixels: NDArray[Any], file: Path) -> NDArray[np.uint8]:
    """Convert 8 bit grayscale, RGB or opaque RGBA to `(h, w, 3)`."""
    if pixels.dtype != np.uint8:
        raise CaseError(f"{file} has the unsupported type {pixels.dtype}: expected 8 bit color. Convert it.")
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.shape[-1] == 4 and (pixels[..., 3] == 255).all():
        return pixels[..., :3]
    if pixels.shape[-1] != 3:
        raise CaseError(f"{file} has {pixels.shape[-1]} channels: expected RGB. Select or combine channels.")
    return pixels


def _sample_bits(file: Path) -> int:
    """Return the bits per sample of a TIFF's first page; 8 if Pillow cannot determine them."""
    try:
        with Image.open(file, formats=("TIFF",)) as image:
            tags: dict[int, tuple[int, ...]] = getattr(image, "tag_v2", {})
            return max(tags.get(_BITS_PER_SAMPLE, (8,)))
    except Exception:  # damaged headers raise many types
        return 8


def _color(text: str | None) -> tuple[int, int, int]:
    """Return red, green and blue of "RRGGBB"; white for anything else."""
    try:
        red, green, blue = bytes.fromhex(text or "")
    except ValueError:
        return _WHITE
    return red, green, blue
