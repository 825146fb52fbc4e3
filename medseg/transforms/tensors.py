"""Helpers of transforms: entries of a case as plain tensors, metadata of results, and shape checks."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from monai.data import MetaTensor

from medseg.errors import CaseError

__all__ = ["one_shape", "plain_tensor", "single_label", "with_metadata"]


def plain_tensor(image: object) -> torch.Tensor:
    """Return an image or label as a plain tensor, whose operations are several times faster than on a `MetaTensor`."""
    values = torch.as_tensor(image)
    return values.as_tensor() if isinstance(values, MetaTensor) else values


def with_metadata(result: torch.Tensor, source: object) -> torch.Tensor:
    """Return the result as a `MetaTensor` with the metadata of its source, if it has any."""
    return MetaTensor(result).copy_meta_from(source) if isinstance(source, MetaTensor) else result


def single_label(label: object, key: Hashable) -> torch.Tensor:
    """Return the single channel of a label `(1, *spatial)`, on the CPU and without metadata.

    Raises:
        CaseError: Invalid shape.
    """
    values = plain_tensor(label).cpu()
    if values.ndim not in (3, 4) or len(values) != 1:
        raise CaseError(f"The label '{key}' has shape {tuple(values.shape)}: expected (1, *spatial) in 2D or 3D.")
    return values[0]


def one_shape(images: dict[Hashable, torch.Tensor]) -> tuple[int, ...]:
    """Return the common spatial shape of all images `(C, *spatial)` of a case.

    Raises:
        CaseError: Different shapes.
    """
    shapes = {key: tuple(image.shape[1:]) for key, image in images.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"'{key}' {shape}" for key, shape in shapes.items())
        raise CaseError(f"Shape mismatch within a case: {listed}. Resample the images to one grid first.")
    return next(iter(shapes.values()))
