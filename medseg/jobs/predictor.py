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

# Settings of the writer, which is not used.
_OF_FILES: Final = ("output_dir", "output_format")


class Predictor:
    """A bundle that is loaded once and predicts many images, in files or in memory.

    It runs the bundle's own workflow without its writer, so labels are those of `medseg predict`. It may be called from
    several threads; one image runs at a time.

    ::

        with medseg.Predictor("hippocampus_mri_unet", overlap=0.5) as predictor:
            labels = predictor(nibabel.load("scan.nii.gz"))        # a nibabel image
            labels = predictor(array, affine=affine)               # a NumPy array
            labels, affine = predictor(pydicom_datasets)           # an array and its affine
            shares = predictor("scan.nii.gz", probabilities=True)  # a MetaTensor (K, *spatial)

    Args:
        bundle: Folder of a bundle, or name of a shipped one; several form an ensemble.
        trust: SHA-256 of a bundle that contains executable code, to run it all the same.
        **settings: Settings of the bundle by name, such as `overlap`, `device_name` or `max_memory`.

    Attributes:
        labels: Names of the labels by their value.

    Raises:
        BundleError: There is no such bundle, or it is incomplete or not trusted.
        RequestError: The bundle has no such setting (the message names the nearest), or an invalid value for it.
        WeightsError: The bundle has no weights, or they do not fit its network.
    """

    def __init__(
        self, bundle: str | Path | Bundle | Sequence[str | Path], *, trust: str | None = None, **settings: Any
    ) -> None:
        for name in _OF_FILES:
            if name in settings:
                raise RequestError(f"'{name}' is about files, which a Predictor does not write: use medseg.predict")
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
        """Return labels, or the probabilities of all classes, in the geometry of an image.

        Args:
            image: Path of an image file, DICOM folder or archive; or an image in memory: NumPy array `(x, y, z)` with
                `affine` or 2D image `(x, y)`, nibabel, SimpleITK or ITK image, MONAI `MetaTensor`, pydicom dataset or
                list of the datasets of one series. Channels come last in an array and first in a `MetaTensor`.
            affine: 4 x 4 matrix from voxels to RAS+ mm, for a NumPy array.
            probabilities: Whether to return float32 probabilities of the K classes in place of labels.

        Returns:
            The kind that was given, with the same geometry: labels of the smallest type that holds them, or K channels.
            A path gives a `MetaTensor` `(1 or K, *spatial)`; pydicom datasets give an array `(x, y, z)` with its
            affine, whose axes are columns, rows and slices.

        Raises:
            CaseError: The image cannot be used.
            RequestError: Several images, an unknown kind of image, or a closed predictor.
        """
        if self._loaded is None:
            raise RequestError("this Predictor is closed: make another one")
        if isinstance(image, str | os.PathLike):
            if affine is not None:
                raise RequestError("a file has an affine of its own: leave affine out")
            return self._from_file(self._loaded, str(image), probabilities=probabilities)
        from medseg.io.memory import memory_image, native_array

        source = memory_image(image, affine)
        entry = {"image": source, "name": "image", "source": source.name}
        result = self._loaded.predict(entry, probabilities=probabilities)
        return source.restore(native_array(result, labels=not probabilities), result.affine.cpu().numpy())

    def close(self) -> None:
        """Free the network; the predictor cannot be called any more."""
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
            raise RequestError(f"'{path}' holds {len(cases)} images: expected one", path=path, found=len(cases))
        if cases[0].kind == "slide":
            raise RequestError(f"'{path}' is a whole-slide image, read in pieces: use medseg.predict", path=path)
        import torch

        from medseg.io.memory import native_array

        result = loaded.predict(cases[0].entry(), probabilities=probabilities)
        values = torch.from_numpy(native_array(result, labels=not probabilities))
        made: MetaTensor = type(result)(values).copy_meta_from(result)
        return made
