"""Reading files within a chain of MONAI transforms."""

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
    """Load the images and labels of a case, channel first, and refuse those that do not belong together.

    It is a `LoadImaged`, by which other programs find the loader of a bundle, but every file is read and checked by
    `medseg.io.load`. The channel axis comes first; `EnsureChannelFirstd` is not needed after it. A label that is DICOM
    SEG or RT-STRUCT is laid on the first of the images by `medseg.io.load_label`, with the options that the case has
    under "label_options" (see `medseg.components.find_dataset`), which are taken out of it.

    Args:
        keys: the entries that hold paths.
        spatial_dims: 2 or 3 to refuse files of the other kind; by default both are taken.
        channels: values per voxel that the model expects of an image.
        dtype: "float32", or "stored" to keep the whole numbers of an image as uint8, int16 or int32 where the file has
            them unscaled (see `medseg.io.load`).
        label_keys: those of `keys` that are labels: whole numbers, one channel.
        label_names: name of a segment or region -> value, for labels that are DICOM SEG or RT-STRUCT in a data set that
            names none itself.
        allow_missing_keys: pass over keys that a case lacks, such as the label of a new image.

    Raises:
        CaseError: a file cannot be used (see `medseg.io.load`), or nothing names the segments of a label.
        GeometryError: two files of a case do not lie on one grid.
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
        # LoadImaged would set up MONAI's readers, which are not used and warn about packages that are not needed.
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.spatial_dims = spatial_dims
        self.channels = channels
        self.dtype = dtype
        self.label_keys = (label_keys,) if isinstance(label_keys, str) else tuple(label_keys)
        self.label_names = dict(label_names or {})

    def register(self, reader: Any) -> None:
        """Refuse: files are read by medseg."""
        raise RequestError(f"LoadCased takes no other reader ({type(reader).__name__}): use LoadImaged for that.")

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        """Return `data` with the paths under `keys` replaced by MetaTensors `(C, *spatial)`."""
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
        raise GeometryError(f"{names} do not lie on one grid: {difference}. Resample one onto the other first.")
