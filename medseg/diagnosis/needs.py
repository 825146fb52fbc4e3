"""The requirements of a bundle on its data, from its configs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import Bundle, merged
from medseg.errors import BundleError

if TYPE_CHECKING:
    from medseg.checks.suitability import Needs

__all__ = ["needs_of"]

# Keys of a label mapping, and axis codes.
_VALUE: Final = re.compile(r"other|-?[0-9]{1,18}")
_AXES: Final = re.compile(r"(?!.*[LR].*[LR])(?!.*[AP].*[AP])(?!.*[IS].*[IS])[LRAPIS]{3}")


def needs_of(bundle: Bundle) -> Needs:
    """Return the requirements of a bundle on images and labels; settings in an unknown form are ignored.

    Raises:
        BundleError: Metadata without a description of the input.
    """
    spatial_dims, channels, modality = _input(bundle)
    train = merged(bundle.load_configs("train")) if bundle.config_path("train").is_file() else {}
    mapping, orientation = _numbers_by_name(train.get("label_mapping")), train.get("orientation")
    spacing = _numbers(train.get("spacing"), 3) if spatial_dims == 3 else None
    window = _numbers(train.get("intensity_range"), 2)
    from medseg.checks.suitability import Needs

    return Needs(
        name=bundle.name,
        spatial_dims=spatial_dims,
        channels=channels,
        mapping=mapping if all(map(_VALUE.fullmatch, mapping or ())) else None,
        modality=modality,
        label_names=_numbers_by_name(train.get("label_names")) or {},
        classes=bundle.label_names,
        spacing=spacing if spacing and min(spacing) > 0 else None,
        orientation=orientation if isinstance(orientation, str) and _AXES.fullmatch(orientation) else "RAS",
        intensity_range=(window[0], window[1]) if window else None,
    )


def _input(bundle: Bundle) -> tuple[int, int, str]:
    """Return the spatial dimensions, channels and modality of the input image in the metadata."""
    try:
        image = bundle.metadata["network_data_format"]["inputs"]["image"]
        return len(image["spatial_shape"]), int(image["num_channels"]), str(image.get("modality") or "")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"Bundle '{bundle.name}' does not describe its input: metadata.json has no spatial_shape and num_channels "
            "in network_data_format::inputs::image. Add them.",
            path=bundle.config_path("metadata"),
        ) from error


def _numbers_by_name(value: Any) -> dict[str, int] | None:
    """Return the value of a setting if it is an object of integers."""
    fits = isinstance(value, dict) and all(type(number) is int for number in value.values())
    return dict(value) if fits else None


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """Return the value of a setting if it is a list of `count` numbers; configs of other tools may differ."""
    if isinstance(value, list) and len(value) == count and all(isinstance(item, int | float) for item in value):
        return tuple(float(item) for item in value)
    return None
