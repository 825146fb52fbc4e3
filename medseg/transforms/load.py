"""Loading of images and labels as a MONAI transform."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImaged, MapTransform

from medseg.errors import GeometryError, RequestError
from medseg.io import Grid, grid_difference, load, load_label
from medseg.transforms.traits import Traits

__all__ = ["LoadCased"]

_OPTIONS = "label_options"


class LoadCased(LoadImaged):  # type: ignore[misc]  # MONAI publishes no types
    """Load the images and labels of a case, channel first, and check that they have the same geometry.

    Derived from `LoadImaged`, so that other software recognizes the loader of a bundle, but files are read and checked
    by `medseg.io.load`. `EnsureChannelFirstd` is not needed afterwards. DICOM SEG and RT-STRUCT labels are rasterized
    in the geometry of the first image by `medseg.io.load_label`, with the options of the case under "label_options"
    (see `medseg.components.find_dataset`); that entry is removed.

    Args:
        keys: Keys of the file paths.
        spatial_dims: Required number of spatial dimensions, 2 or 3; both are accepted by default.
        channels: Required number of image channels.
        dtype: "float32", or "stored" to keep unscaled integer images as uint8, int16 or int32 (see `medseg.io.load`).
        label_keys: Keys among `keys` that are labels: integers with one channel.
        label_names: Label value of each segment or region name in DICOM SEG and RT-STRUCT labels, for datasets that do
            not define them.
        allow_missing_keys: Whether to skip keys missing in a case, such as the label of a new image.

    Raises:
        CaseError: Unusable file (see `medseg.io.load`), or a DICOM label whose segments have no names.
        GeometryError: Geometry mismatch between files of a case.
    """

    traits = Traits("kept")

    def __init__(
        self,
        keys: KeysCollection,
        *,
        spatial_dims: int | None = None,
        channels: int | None = None,
        dtype: Literal["float32", "stored"] = "float32",
        label_keys: Sequence[str] = ("label",),
        label_names: Mapping[str, int] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        # LoadImaged would create the unused MONAI readers, which warn about missing packages.
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.spatial_dims = spatial_dims
        self.channels = channels
        self.dtype = dtype
        self.label_keys = (label_keys,) if isinstance(label_keys, str) else tuple(label_keys)
        self.label_names = dict(label_names or {})

    def register(self, reader: Any) -> None:
        """Reject other readers, since medseg reads the files.

        Raises:
            RequestError: Always.
        """
        raise RequestError(
            f"LoadCased does not support other readers ({type(reader).__name__}): use LoadImaged instead."
        )

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        """Return `data` with the paths under `keys` replaced by a `MetaTensor` `(C, *spatial)` each."""
        if reader is not None:
            self.register(reader)
        case = dict(data)
        images = [case[key] for key in self.key_iterator(case) if key not in self.label_keys]
        options = {"names": self.label_names, **case.pop(_OPTIONS, {}), "like": images[0] if images else None}
        loaded: list[MetaTensor] = []
        for key in self.key_iterator(case):
            if key in self.label_keys:
                case[key] = load_label(case[key], spatial_dims=self.spatial_dims, **options)
            else:
                case[key] = load(case[key], spatial_dims=self.spatial_dims, channels=self.channels, dtype=self.dtype)
            loaded.append(case[key])
            _refuse_other_grid(loaded[0], case[key])
        return case


def _refuse_other_grid(first: MetaTensor, other: MetaTensor) -> None:
    a, b = (Grid(tuple(image.shape[1:]), image.affine.numpy()) for image in (first, other))
    difference = grid_difference(a, b)
    if difference:
        names = " and ".join(str(image.meta["filename_or_obj"]) for image in (first, other))
        raise GeometryError(
            f"Geometry mismatch between {names}: {difference}. Resample one to the grid of the other first."
        )
