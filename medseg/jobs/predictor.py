"""`medseg.Predictor`: a bundle that stays loaded, for images in files and in memory."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from medseg.bundle.catalog import Bundle, find_bundle
from medseg.errors import RequestError
from medseg.io import list_cases
from medseg.jobs.ensembles import ensemble_of
from medseg.jobs.job import prepare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from monai.data import MetaTensor
    from numpy.typing import ArrayLike
    from typing_extensions import Self

    from medseg.jobs.loaded import LoadedBundle

    Image = TypeVar("Image")

__all__ = ["Predictor"]

# Settings of the writer, which a Predictor does not use.
_OF_FILES: Final = ("output_dir", "output_format")


class Predictor:
    """A bundle that is loaded once and predicts many images, in files or in memory.

    It runs the bundle's workflow without its writer, so the labels equal those of `medseg predict`. It may be called
    from several threads; one image runs at a time.

    ::

        with medseg.Predictor("hippocampus_mri_unet", overlap=0.5) as predictor:
            labels = predictor(nibabel.load("scan.nii.gz"))        # a nibabel image
            labels = predictor(array, affine=affine)               # a NumPy array
            labels, affine = predictor(pydicom_datasets)           # an array and its affine
            shares = predictor("scan.nii.gz", probabilities=True)  # a MetaTensor (K, *spatial)

    Args:
        bundle: Folder of a bundle, or name of a shipped one; several form an ensemble.
        trust: SHA-256 of a bundle that contains executable code, to confirm that you trust it.
        **settings: Settings of the bundle by name, such as `overlap`, `device_name` or `max_memory`.

    Attributes:
        labels: Names of the labels by value.

    Raises:
        BundleError: Unknown, incomplete or untrusted bundle.
        RequestError: Unknown setting, or an invalid value for it.
        WeightsError: Missing weights, or weights that do not match the network.
    """

    def __init__(
        self, bundle: str | Path | Bundle | Sequence[str | Path], *, trust: str | None = None, **settings: Any
    ) -> None:
        for name in _OF_FILES:
            if name in settings:
                raise RequestError(f"Invalid setting '{name}': a Predictor does not write files. Use medseg.predict.")
        self._open = ExitStack()
        try:
            if isinstance(bundle, str | Path | Bundle):
                found = find_bundle(bundle)
            else:
                found = self._open.enter_context(ensemble_of(bundle))
            places = {"dataset_dir": str(found.root), "output_dir": str(found.root / "predictions")}
            job = prepare("predict", found, settings, paths=places, trust=trust)
            self.labels = found.label_names
            from medseg.jobs.loaded import LoadedBundle

            self._loaded: LoadedBundle | None = LoadedBundle(job)
        except BaseException:
            self._open.close()
            raise

    @overload
    def __call__(self, image: str | os.PathLike[str], *, probabilities: bool = False) -> MetaTensor: ...
    @overload
    def __call__(self, image: Sequence[Any], *, probabilities: bool = False) -> tuple[Any, Any]: ...
    @overload
    def __call__(self, image: Image, *, affine: ArrayLike | None = None, probabilities: bool = False) -> Image: ...
    def __call__(self, image: Any, *, affine: ArrayLike | None = None, probabilities: bool = False) -> Any:
        """Return labels, or the probabilities of all classes, in the input's geometry.

        Args:
            image: Path of an image file, DICOM folder or archive; or an image in memory: NumPy array (x, y, z) with
                `affine` or 2D image (x, y), nibabel, SimpleITK or ITK image, MONAI `MetaTensor`, pydicom dataset or
                list of the datasets of one series. Channels come last in an array and first in a `MetaTensor`.
            affine: Affine of shape (4, 4) from voxel indices to RAS+ coordinates in mm, for a NumPy array.
            probabilities: Whether to return float32 probabilities of the K classes instead of labels.

        Returns:
            An image of the same kind and geometry as the input: labels of the smallest integer type, or K channels. For
            a path, a `MetaTensor` of shape (1 or K, *spatial); for pydicom datasets, an array (x, y, z) and its affine,
            whose axes are columns, rows and slices.

        Raises:
            CaseError: An unusable image.
            RequestError: Several images, an unknown kind of image, or a closed predictor.
        """
        if self._loaded is None:
            raise RequestError("This Predictor is closed: create a new one.")
        if isinstance(image, str | os.PathLike):
            if affine is not None:
                raise RequestError("Unexpected affine: image files have their own. Omit affine.")
            return self._from_file(self._loaded, str(image), probabilities=probabilities)
        from medseg.io.memory import memory_image, native_array

        source = memory_image(image, affine)
        entry = {"image": source, "name": "image", "source": source.name}
        result = self._loaded.predict(entry, probabilities=probabilities)
        return source.restore(native_array(result, labels=not probabilities), result.affine.cpu().numpy())

    def close(self) -> None:
        """Free the network; later calls raise `RequestError`."""
        self._loaded = None
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _from_file(loaded: LoadedBundle, path: str, *, probabilities: bool) -> MetaTensor:
        cases = list_cases(path).cases
        if len(cases) != 1:
            raise RequestError(f"'{path}' contains {len(cases)} images: expected one.", path=path, found=len(cases))
        if cases[0].kind == "slide":
            raise RequestError(
                f"'{path}' is a whole-slide image, which is read in pieces. Use medseg.predict.", path=path
            )
        import torch

        from medseg.io.memory import native_array

        result = loaded.predict(cases[0].entry(), probabilities=probabilities)
        values = torch.from_numpy(native_array(result, labels=not probabilities))
        made: MetaTensor = type(result)(values).copy_meta_from(result)
        return made
