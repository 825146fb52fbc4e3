"""Traits of transforms: their effect on the grid and the pixels of an image. Imports neither torch nor MONAI.

Transforms of medseg have a class attribute `traits`; those of MONAI are listed in a table here. Inference resamples
masks to native space by position and reads slides by region, so it rejects transforms without traits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

from medseg.errors import RequestError

__all__ = ["GridEffect", "Traits", "refuse_unmapped", "traced_effect", "traits_of"]

GridEffect: TypeAlias = Literal["kept", "reordered", "resampled", "cut", "unmapped"]


@dataclass(frozen=True)
class Traits:
    """Traits of a transform.

    Attributes:
        grid: Effect on the grid: "kept" if every value stays at its voxel; "reordered" for flips and permutations of
            axes, "resampled" for an affine resampling, and "cut" for cropping or padding, all three recorded in the
            affine and `applied_operations` of the image; "unmapped" for other spatial transforms, such as deformations
            and random transforms.
        crops: Whether the transform extracts patches without modifying the case, so that training need not copy it.
        per_pixel: Whether each output value depends only on the input value at the same pixel, so that an image can be
            processed by region; or a function that returns this for an instance.
    """

    grid: GridEffect
    crops: bool = False
    per_pixel: bool | Callable[[Any], bool] = False

    def is_per_pixel(self, step: Any) -> bool:
        """Return whether an instance of the transform is pixelwise."""
        return self.per_pixel(step) if callable(self.per_pixel) else self.per_pixel


def _by_constants(step: Any) -> bool:
    own = step.normalizer
    return own.subtrahend is not None and own.divisor is not None and not own.nonzero


# MONAI transforms by the name of their array class, which is also the class in `applied_operations`.
_MONAI: Final = (
    (Traits("kept", per_pixel=True), "CastToType ScaleIntensityRange ThresholdIntensity"),
    (Traits("kept", per_pixel=_by_constants), "NormalizeIntensity"),
    (
        Traits("kept"),
        """
        Activations AddCoordinateChannels AdjustContrast AsChannelLast AsDiscrete BoundingRect ClassesToIndices
        ClipIntensityPercentiles ConcatItems ConvertToMultiChannelBasedOnBratsClasses CopyItems DataStats DeleteItems
        DistanceTransformEDT EnsureChannelFirst EnsureType FgBgToIndices FillHoles FlattenSubKeys FromMetaTensor
        GaussianSharpen GaussianSmooth GibbsNoise HistogramNormalize Identity KeepLargestConnectedComponent LabelFilter
        LabelToContour LabelToMask Lambda LoadImage MapLabelValue MaskIntensity MeanEnsemble MedianSmooth ProbNMS
        RandAdjustContrast RandBiasField RandCoarseDropout RandGaussianNoise RandGaussianSharpen RandGaussianSmooth
        RandGibbsNoise RandHistogramShift RandKSpaceSpikeNoise RandRicianNoise RandScaleIntensity
        RandScaleIntensityFixedMean RandShiftIntensity RandSimulateLowResolution RandStdShiftIntensity
        RemoveSmallObjects RepeatChannel SaveImage SavitzkyGolaySmooth ScaleIntensity ScaleIntensityRangePercentiles
        SelectItems ShiftIntensity SplitDim SqueezeDim StdShiftIntensity ToDevice ToMetaTensor ToNumpy ToTensor
        VoteEnsemble
        """,
    ),
    (Traits("reordered"), "Flip Orientation Rotate90"),
    (Traits("resampled"), "ResampleToMatch Resize Spacing SpatialResample"),
    (
        Traits("cut"),
        """
        BorderPad CenterScaleCrop CenterSpatialCrop Crop CropForeground DivisiblePad Pad ResizeWithPadOrCrop SpatialCrop
        SpatialPad
        """,
    ),
    (
        Traits("unmapped", crops=True),
        """
        RandCropByLabelClasses RandCropByPosNegLabel RandSpatialCrop RandSpatialCropSamples RandWeightedCrop
        """,
    ),
    (
        Traits("unmapped"),
        """
        Affine GridDistortion Invert Rand2DElastic Rand3DElastic RandAffine RandAxisFlip RandCoarseShuffle RandFlip
        RandGridDistortion RandRotate RandRotate90 RandScaleCrop RandSmoothDeform RandZoom Rotate Transpose Zoom
        """,
    ),
)
_BY_NAME: Final[Mapping[str, Traits]] = MappingProxyType(
    {name: traits for traits, names in _MONAI for name in names.split()}
)


def traits_of(step: Any) -> Traits | None:
    """Return the declared traits of a transform, or the known traits of a MONAI transform; otherwise None.

    A subclass has the grid effect of its base class unless it declares its own traits, but is not assumed to be
    pixelwise.
    """
    for kind in type(step).__mro__:
        declared = kind.__dict__.get("traits")
        if isinstance(declared, Traits):
            return declared
        known = _by_name(kind.__name__) if kind.__module__.startswith("monai.transforms") else None
        if known is not None:
            return known if kind is type(step) else replace(known, per_pixel=False)
    return None


def traced_effect(operation: Mapping[str, Any]) -> GridEffect | None:
    """Return the grid effect of an entry of `applied_operations`; None for an unknown class.

    Operations of medseg store the effect under "grid".
    """
    noted: GridEffect | None = operation.get("grid")
    known = _by_name(str(operation.get("class", "")))
    return noted or (None if known is None else known.grid)


def refuse_unmapped(preprocessing: Any) -> None:
    """Check that masks can be mapped back to native space through a preprocessing.

    Args:
        preprocessing: A transform, or a `Compose` of transforms.

    Raises:
        RequestError: Transform that cannot be inverted by position, or that declares no traits.
    """
    for step in _steps(preprocessing):
        name = getattr(step, "__name__", type(step).__name__)
        traits = traits_of(step)
        if traits is None:
            raise RequestError(
                f"unknown effect of {name} in the preprocessing on the grid, so the mask could be misaligned: declare "
                '`traits = Traits("kept")` or another effect on its class (see medseg.transforms.traits), or remove '
                "the transform"
            )
        if traits.grid == "unmapped":
            raise RequestError(
                f"{name} in the preprocessing cannot be inverted by position, so the mask would be misaligned: remove "
                "the transform, or use it only in the augmentation of the training"
            )


def _steps(transform: Any) -> Iterator[Any]:
    """Yield the transforms of a nested `Compose`, or the transform itself."""
    inner = getattr(transform, "transforms", None)
    if not isinstance(inner, (list, tuple)):
        yield transform
        return
    for step in inner:
        yield from _steps(step)


def _by_name(name: str) -> Traits | None:
    """Return the traits of an array class, or of a dictionary class (`Flipd`) by its array class."""
    return _BY_NAME.get(name) or _BY_NAME.get(name.removesuffix("d"))
