"""One axis of a native grid on the model's grid, ready for interpolation."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from medseg.inferers.grid_mapping import GridMapping

__all__ = ["Axis"]


@dataclass(frozen=True)
class Axis:
    """Where the `n` native indices of an axis lie between the model's planes.

    Attributes:
        low: the plane at or before each index, `(n,)`.
        high: the plane after it; at the end of the grid the last one again.
        fraction: how far each index is from `low` to `high`, 0 to below 1, float32.
        valid: false where the model says nothing of an index, which is background then.
    """

    low: torch.Tensor
    high: torch.Tensor
    fraction: torch.Tensor
    valid: torch.Tensor
    exact: bool = field(init=False)
    all_valid: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "exact", not bool(self.fraction.any()))
        object.__setattr__(self, "all_valid", bool(self.valid.all()))

    def __len__(self) -> int:
        """Return the number of native indices."""
        return len(self.low)

    @classmethod
    def of(cls, mapping: GridMapping, model_axis: int, native_axis: int) -> Axis:
        """Return the axis of a grid that is not oblique."""
        last = mapping.model_shape[model_axis] - 1
        where = mapping.along(model_axis, native_axis)
        valid = (where >= -mapping.border) & (where <= last + mapping.border)
        inside = np.clip(where, 0, last)
        low = np.floor(inside).astype(np.int64)
        fraction = torch.from_numpy((inside - low).astype(np.float32))
        return cls(
            torch.from_numpy(low), torch.from_numpy(np.minimum(low + 1, last)), fraction, torch.from_numpy(valid)
        )

    @classmethod
    def single(cls) -> Axis:
        """Return the axis that a 2D image lacks."""
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(zero, zero, torch.zeros(1), torch.ones(1, dtype=torch.bool))

    def to(self, device: torch.device) -> Axis:
        """Return the axis on a device."""
        return Axis(*(each.to(device) for each in (self.low, self.high, self.fraction, self.valid)))

    def indices_above(self, plane: int) -> list[tuple[int, float]]:
        """Return the valid native indices from this model plane to before the next, with their fractions."""
        found = torch.nonzero((self.low == plane) & self.valid)[:, 0].tolist()
        return [(index, float(self.fraction[index])) for index in found]
