"""What a transform does to an image's grid and pixels, declared on its class. No import of torch or MONAI.

Transforms of medseg have a class attribute `traits`; those of MONAI are in one table here. Inference restores masks by
position and reads slides in pieces, so a step that says nothing about itself is refused there.
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
    """What a transform does.

    Attributes:
        grid: "kept" if every value stays at its voxel; "reordered" for flips and permutations of axes, "resampled" for
            a new grid by an affine map and "cut" for cropping or padding, all three noted in the image's affine and
            `applied_operations`; "unmapped" for everything else that moves values, such as deformations and random
            steps.
        crops: Whether it takes patches out of a case and leaves the case itself unchanged, so that training need not
            copy the case first.
        per_pixel: Whether each new value depends on the value at that pixel alone, so that an image may be processed in
            pieces; or a function that tells it for an instance.
    """

    grid: GridEffect
    crops: bool = False
    per_pixel: bool | Callable[[Any], bool] = False

    def is_per_pixel(self, step: Any) -> bool:
        """Return whether this instance works pixel by pixel."""
        return self.per_pixel(step) if callable(self.per_pixel) else self.per_pixel


def _by_constants(step: Any) -> bool:
    own = step.normalizer
    return own.subtrahend is not None and own.divisor is not None and not own.nonzero


# MONAI's transforms by the name of their array class, which is also what they leave in `applied_operations`.
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
    """Return what a transform declares, or what is known about it if it is MONAI's; None for any other.

    A class that derives from a transform maps the grid as that does unless it declares traits of its own, but may well
    look at more than one pixel.
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
    """Return the effect of one of an image's `applied_operations`; None for one of an unknown class.

    An operation may carry it under "grid", as those of medseg do.
    """
    noted: GridEffect | None = operation.get("grid")
    known = _by_name(str(operation.get("class", "")))
    return noted or (None if known is None else known.grid)


def refuse_unmapped(preprocessing: Any) -> None:
    """Refuse a preprocessing after which a mask could not be put back onto the image.

    Args:
        preprocessing: A transform, or a `Compose` of transforms.

    Raises:
        RequestError: A step moves values in a way that cannot be undone by position, or does not declare what it does.
    """
    for step in _steps(preprocessing):
        name = getattr(step, "__name__", type(step).__name__)
        traits = traits_of(step)
        if traits is None:
            raise RequestError(
                f"the preprocessing has {name}, which does not declare what it does to the grid, so the mask might not "
                'lie on the image: give its class `traits = Traits("kept")` (see medseg.transforms.traits), or leave '
                "the step out"
            )
        if traits.grid == "unmapped":
            raise RequestError(
                f"the preprocessing has {name}, which moves voxels in a way that cannot be undone by position, so the "
                "mask would not lie on the image: leave the step out, or use it in the training's augmentation alone"
            )


def _steps(transform: Any) -> Iterator[Any]:
    """Yield the transforms inside of a `Compose`, however deep, or the transform itself."""
    inner = getattr(transform, "transforms", None)
    if not isinstance(inner, (list, tuple)):
        yield transform
        return
    for step in inner:
        yield from _steps(step)


def _by_name(name: str) -> Traits | None:
    """Look an array class up, or a dictionary class (`Flipd`) by the array class that it applies."""
    return _BY_NAME.get(name) or _BY_NAME.get(name.removesuffix("d"))
