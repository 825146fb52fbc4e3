"""What transforms share: entries of a case as plain tensors, and results with the metadata of what they come from."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from monai.data import MetaTensor

from medseg.errors import CaseError

__all__ = ["one_shape", "plain_tensor", "single_label", "with_metadata"]


def plain_tensor(image: object) -> torch.Tensor:
    """Return an image or label as a tensor without metadata, on which each operation is several times cheaper."""
    values = torch.as_tensor(image)
    return values.as_tensor() if isinstance(values, MetaTensor) else values


def with_metadata(result: torch.Tensor, source: object) -> torch.Tensor:
    """Return the result as a `MetaTensor` with the metadata of its source, if that is one."""
    return MetaTensor(result).copy_meta_from(source) if isinstance(source, MetaTensor) else result


def single_label(label: object, key: Hashable) -> torch.Tensor:
    """Return the only channel of a label `(1, *spatial)`, on the CPU and without metadata.

    Raises:
        CaseError: it has another shape.
    """
    values = plain_tensor(label).cpu()
    if values.ndim not in (3, 4) or len(values) != 1:
        raise CaseError(f"The label '{key}' has shape {tuple(values.shape)}: expected (1, *spatial) in 2D or 3D.")
    return values[0]


def one_shape(images: dict[Hashable, torch.Tensor]) -> tuple[int, ...]:
    """Return the spatial shape that all images `(C, *spatial)` of a case have.

    Raises:
        CaseError: there are several.
    """
    shapes = {key: tuple(image.shape[1:]) for key, image in images.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"'{key}' {shape}" for key, shape in shapes.items())
        raise CaseError(f"The entries of a case differ in shape: {listed}. Resample them to one grid first.")
    return next(iter(shapes.values()))
