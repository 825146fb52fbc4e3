"""Images in memory: read like files, with results returned as the same type in the same geometry.

| input | channels | result |
|---|---|---|
| NumPy array `(x, y, z)` with `affine`, or a 2D image `(x, y)` without | last axis | NumPy array |
| nibabel image | fourth axis | image of the same class with the same geometry fields |
| SimpleITK or ITK image, 2D or 3D | components of a pixel | image with the same origin, spacing and direction |
| MONAI `MetaTensor` | first axis | `MetaTensor` with the same metadata, on the same device |
| pydicom dataset, or the datasets of one series | samples per pixel | `ArrayImage`: array `(x, y, z)` and affine |

Axes of arrays are voxel axes, as in nibabel: x (columns) first. Affines map voxels to RAS+ mm. The type is recognized
by the package of its class, so that no package is imported that the caller does not use.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, runtime_checkable

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.errors import CaseError, GeometryError, MedsegError, RequestError, shortened
from medseg.extras import require
from medseg.io.formats import nifti, raster
from medseg.io.geometry import Grid, spatial_axes, spatial_grid, to_affine4
from medseg.io.voxels import ReadOptions, choose_channels, fill_image, fill_labels, image_type, smallest_label_type

if TYPE_CHECKING:
    from monai.data import MetaTensor

__all__ = ["ArrayImage", "MemoryImage", "memory_image", "native_array"]

_LPS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
_KINDS: Final = "a NumPy array, a nibabel, SimpleITK or ITK image, a MONAI MetaTensor, or pydicom datasets"
# A last axis of at most this size holds the channels of a 2D image.
_MAX_CHANNELS: Final = 4


class ArrayImage(NamedTuple):
    """An array with its geometry.

    Attributes:
        array: Voxels `(x, y, z)` or `(x, y, z, channels)`.
        affine: 4 x 4 matrix from voxels to RAS+ mm.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]


@runtime_checkable
class MemoryImage(Protocol):
    """An image in memory that `medseg.load` reads like a file."""

    @property
    def name(self) -> str:
        """Name of the image in messages."""

    def read(self, path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
        """Return the voxels `(C, *spatial)` and their grid, like the reader of a file format."""

    def restore(self, values: NDArray[Any], affine: NDArray[np.float64]) -> Any:
        """Return results `(C, *spatial)` in the geometry and as the type of the image."""


@dataclass(frozen=True)
class _Voxels:
    """Voxels of an image in memory.

    Attributes:
        name: Name of the image in messages.
        planes: Stored values `(C, *spatial)`.
        affine: 4 x 4 matrix from voxels to RAS+ mm.
        convert: Converts results `(C, *spatial)` to the type of the image.
        is_2d: Whether channels are converted as for 2D image files.
        slope: Scale factor of the stored values.
        inter: Offset added after scaling.
    """

    name: str
    planes: NDArray[Any]
    affine: NDArray[np.float64]
    convert: Callable[[NDArray[Any]], Any]
    is_2d: bool = False
    slope: float = 1.0
    inter: float = 0.0

    def read(self, path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
        """Return a copy of the voxels, and their grid."""
        spatial, planes = self.planes.shape[1:], self.planes
        if planes.dtype.kind not in "biuf":
            raise CaseError(f"{self.name} has the unsupported type {planes.dtype}: expected real numbers.")
        spatial_axes(spatial, options.spatial_dims, self.name)
        grid = spatial_grid(spatial, self.affine, options.spatial_dims, self.name, options.max_voxels)
        if self.is_2d:
            planes = raster.to_channels(planes, options.channels, path)
        else:
            planes = planes[list(choose_channels((len(planes),), options.channels, options.index, self.name))]
        planes = planes.astype(np.uint8) if planes.dtype.kind == "b" else planes
        dtype = image_type(planes.dtype, slope=self.slope, inter=self.inter, stored=options.stored)
        array = np.empty((len(planes), *grid.shape), np.int32 if options.label else dtype)
        for out, channel in zip(array, planes, strict=True):
            if options.label:
                fill_labels(out, channel.reshape(grid.shape), self.slope, self.inter, self.name)
            else:
                fill_image(out, channel.reshape(grid.shape), self.slope, self.inter, self.name)
        return array, grid

    def restore(self, values: NDArray[Any], affine: NDArray[np.float64]) -> Any:
        """Return the results as the type of the image."""
        return self.convert(np.ascontiguousarray(values.reshape(len(values), *self.planes.shape[1:])))


@dataclass(frozen=True)
class _Series:
    """The datasets of one DICOM series, read through files in a temporary folder."""

    datasets: Sequence[Any]
    name: str = "the DICOM series in memory"

    def read(self, path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
        """Return the voxels and their grid, with the same checks as for a folder of DICOM files."""
        from medseg.io.dicom import reader

        with tempfile.TemporaryDirectory() as folder:
            for number, dataset in enumerate(self.datasets):
                _save(dataset, Path(folder, f"{number:06}.dcm"))
            try:
                array, grid = reader.read(Path(folder), options)
            except MedsegError as error:
                text = shortened(error, folder).replace(Path(folder).name, self.name)
                raise type(error)(text, code=error.code, path=None, **error.data) from None
        return array, grid

    def restore(self, values: NDArray[Any], affine: NDArray[np.float64]) -> ArrayImage:
        """Return the results with their affine."""
        return ArrayImage(_channels_last(values), affine)


def memory_image(image: Any, affine: ArrayLike | None = None) -> MemoryImage:
    """Wrap an image in memory for `medseg.load`.

    Args:
        image: Image of a type listed in the module docstring.
        affine: 4 x 4 matrix from voxels to RAS+ mm; for NumPy arrays only.

    Raises:
        RequestError: Unsupported type, a 3D array without an affine, or an affine for another type.
        GeometryError: The image has no valid geometry.
    """
    wrap = next((_WRAPPERS[name] for name in _packages(image) if name in _WRAPPERS), None)
    if wrap is None:
        raise RequestError(f"Unsupported image type {type(image).__name__}: expected a path, {_KINDS}.")
    if isinstance(image, np.ndarray):
        return _of_array(image, affine)
    if affine is not None:
        raise RequestError(f"Invalid argument affine: a {type(image).__name__} has its own affine. Omit the argument.")
    return wrap(image)


def native_array(result: MetaTensor, *, labels: bool) -> NDArray[Any]:
    """Return results `(C, *spatial)` in the geometry of the image, labels in the smallest type.

    Raises:
        GeometryError: The results and the image have different shapes.
    """
    values: NDArray[Any] = result.as_tensor().cpu().numpy()
    expected = tuple(int(size) for size in result.meta.get("spatial_shape", values.shape[1:]))
    if values.shape[1:] != expected:
        raise GeometryError(
            f"Geometry mismatch: the mask has shape {values.shape[1:]}, the image {expected}. The bundle has to invert "
            "its preprocessing (Invertd).",
            found=list(values.shape[1:]),
            expected=list(expected),
        )
    return values.astype(smallest_label_type(values, "the mask"), copy=False) if labels else values.astype(np.float32)


def _packages(image: Any) -> list[str]:
    """Return the packages of an image's classes, most derived first; for a list those of its first entry."""
    if isinstance(image, list | tuple):
        return _packages(image[0]) if image and "pydicom" in _packages(image[0]) else []
    return [kind.__module__.partition(".")[0] for kind in type(image).__mro__]


def _of_array(array: NDArray[Any], affine: ArrayLike | None) -> MemoryImage:
    """Wrap a volume with its affine, or a 2D image with or without one."""
    if affine is None:
        if array.ndim == 2 or (array.ndim == 3 and array.shape[2] <= _MAX_CHANNELS):
            return _Voxels("the array", _channels_first(array, 2), np.eye(4), _channels_last, is_2d=True)
        raise RequestError(
            f"An array of shape {array.shape} needs its affine (voxels to RAS+ mm): without one, expected a 2D image "
            "(x, y) or (x, y, channels).",
            found=list(array.shape),
        )
    if array.ndim not in (2, 3, 4):
        raise RequestError(f"Invalid array of shape {array.shape}: expected 2 to 4 axes, (x, y[, z[, channels]]).")
    given = to_affine4(affine)
    if given.shape != (4, 4):
        raise GeometryError(f"Invalid affine of shape {given.shape}: expected (4, 4).")
    return _Voxels("the array", _channels_first(array, min(array.ndim, 3)), given, _channels_last)


def _of_nibabel(image: Any) -> MemoryImage:
    if not isinstance(image, nib.Nifti1Image | nib.MGHImage):
        raise RequestError(f"Unsupported nibabel type {type(image).__name__}: convert it to NIfTI.")
    data, slope, inter = image.dataobj, 1.0, 0.0
    if hasattr(data, "get_unscaled"):  # a file whose data are not loaded yet
        slope, inter = float(data.slope), float(data.inter)
        data = data.get_unscaled()
    array = np.asarray(data)
    if isinstance(image, nib.Nifti1Image):  # NIfTI-2 too
        affine, convert = nifti.affine_of(image.header, array.shape, Path("the NIfTI image")), nifti.image_like
    else:
        affine, convert = np.asarray(image.affine, np.float64), _nibabel_like
    planes = _channels_first(array, min(array.ndim, 3))
    return _Voxels(
        f"the {type(image).__name__}", planes, affine, lambda values: convert(image, values), slope=slope, inter=inter
    )


def _nibabel_like(image: Any, values: NDArray[Any]) -> Any:
    # MGH has no uint16
    stored = values.astype(np.int32) if values.dtype == np.uint16 else values
    return type(image)(_channels_last(stored), image.affine)


def _of_simpleitk(image: Any) -> MemoryImage:
    import SimpleITK as sitk

    dims = int(image.GetDimension())

    def convert(values: NDArray[Any]) -> Any:
        array = values[0].T if len(values) == 1 else values.T
        made = sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=len(values) > 1)
        made.CopyInformation(image)
        return made

    direction = np.reshape(image.GetDirection(), (dims, dims))
    affine = _ras(direction, image.GetSpacing(), image.GetOrigin())
    return _of_itk_array(sitk.GetArrayViewFromImage(image), dims, affine, convert, "the SimpleITK image")


def _of_itk(image: Any) -> MemoryImage:
    itk = require("itk", "An ITK image")
    dims = int(image.GetImageDimension())

    def convert(values: NDArray[Any]) -> Any:
        array = values[0].T if len(values) == 1 else values.T
        made = itk.image_from_array(np.ascontiguousarray(array), is_vector=len(values) > 1)
        made.SetOrigin(image.GetOrigin())
        made.SetSpacing(image.GetSpacing())
        made.SetDirection(image.GetDirection())
        return made

    affine = _ras(itk.array_from_matrix(image.GetDirection()), image.GetSpacing(), image.GetOrigin())
    return _of_itk_array(itk.array_view_from_image(image), dims, affine, convert, "the ITK image")


def _of_itk_array(
    array: NDArray[Any], dims: int, affine: NDArray[np.float64], convert: Callable[[NDArray[Any]], Any], name: str
) -> MemoryImage:
    """Wrap an array `([z, ]y, x[, channels])`."""
    if dims not in (2, 3):
        raise RequestError(f"{name.capitalize()} has {dims} dimensions: expected 2 or 3.", found=dims)
    planes = array.T if array.ndim > dims else array.T[None]
    return _Voxels(name, planes, affine, convert, is_2d=dims == 2)


def _ras(direction: ArrayLike, spacing: Sequence[float], origin: Sequence[float]) -> NDArray[np.float64]:
    """Return the RAS+ affine of an ITK geometry (LPS+)."""
    dims = len(spacing)
    affine: NDArray[np.float64] = np.eye(4)
    affine[:dims, :dims] = np.asarray(direction) * np.asarray(spacing)
    affine[:dims, 3] = np.asarray(origin)
    return _LPS @ affine


def _of_tensor(image: Any) -> MemoryImage:
    if "monai" not in _packages(image):
        raise RequestError("A tensor has no geometry: give a MONAI MetaTensor (C, *spatial) with its affine.")
    import torch

    meta_tensor = type(image)
    if image.ndim not in (3, 4):
        raise RequestError(f"Invalid MetaTensor of shape {tuple(image.shape)}: expected (C, x, y[, z]).")
    affine = to_affine4(image.affine.cpu().numpy())
    lps = str(getattr(image.meta.get("space"), "value", image.meta.get("space"))) == "LPS"

    def convert(values: NDArray[Any]) -> Any:
        made = meta_tensor(torch.from_numpy(values)).copy_meta_from(image)
        return made.to(image.device)

    planes = image.detach().as_tensor().cpu().numpy()
    return _Voxels("the MetaTensor", planes, _LPS @ affine if lps else affine, convert, is_2d=image.ndim == 3)


def _of_datasets(image: Any) -> MemoryImage:
    datasets = list(image) if isinstance(image, list | tuple) else [image]
    for dataset in datasets:
        if "TransferSyntaxUID" not in (getattr(dataset, "file_meta", None) or ()):
            raise RequestError(
                "A pydicom dataset has no TransferSyntaxUID in its file_meta, so its pixels cannot be decoded: read it "
                "with pydicom.dcmread, or set it."
            )
    return _Series(datasets)


def _save(dataset: Any, path: Path) -> None:
    try:
        dataset.save_as(path, enforce_file_format=True)
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestError(f"A pydicom dataset is incomplete: {error}.") from error


def _channels_first(array: NDArray[Any], dims: int) -> NDArray[Any]:
    """Return `(C, *spatial)` from `(*spatial[, ..., channels])`, as a view if possible."""
    if array.ndim == dims:
        return array[None]
    rest = [size for size in array.shape[dims:] if size > 1]
    if len(rest) > 1:
        raise CaseError(f"An image of shape {array.shape} has {len(rest)} non-spatial axes: expected at most one.")
    return np.moveaxis(array.reshape(*array.shape[:dims], -1), -1, 0)


def _channels_last(values: NDArray[Any]) -> NDArray[Any]:
    """Return `(*spatial)` for one channel, else `(*spatial, C)`."""
    return values[0] if len(values) == 1 else np.ascontiguousarray(np.moveaxis(values, 0, -1))


_WRAPPERS: Final[dict[str, Callable[[Any], MemoryImage]]] = {
    "numpy": lambda image: _of_array(image, None),
    "nibabel": _of_nibabel,
    "SimpleITK": _of_simpleitk,
    "itk": _of_itk,
    "monai": _of_tensor,
    "torch": _of_tensor,
    "pydicom": _of_datasets,
}
