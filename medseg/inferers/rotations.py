"""Test-time augmentation by rotation (Ronneberger, Fischer, Brox; MICCAI 2015, section 4)."""

from __future__ import annotations

import math
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import monai.inferers
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.errors import RequestError, SizeError
from medseg.inferers.results import ACTIVATIONS, as_logits, plain, probabilities, with_metadata
from medseg.networks.options import check_choice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["RotationTTAInferer"]

# Planes are resampled in squares of this many pixels per side, to limit the memory of coordinates.
_SQUARE = 1024


class RotationTTAInferer(monai.inferers.Inferer):  # type: ignore[misc]
    """Average the probabilities of another inferer over rotated copies of the image.

    For each angle the plane is enlarged to contain the whole rotated image and filled by reflection; the wrapped
    inferer runs, and the probabilities are rotated back. Every voxel therefore has a prediction from every angle.
    Multiples of 90 degrees permute voxels without interpolation; other angles interpolate the image and the
    probabilities linearly. Rotations are in voxel units, so both axes of the plane should have the same spacing.

    In addition to the wrapped inferer, memory holds one enlarged image and one sum of probabilities. Run time is
    proportional to the number of angles and to the size of the enlarged plane, up to twice the pixels.

    Args:
        inferer: Inferer that returns logits `(B, K, *spatial)`, such as `SlidingWindowInferer`.
        angles: Number of equally spaced angles from 0 (7 as in the paper, which does not list them), or a list of
            angles in degrees. The direction of rotation is that of `torch.rot90`.
        mirror: Whether to use each angle for the mirrored image too; with `[0, 90, 180, 270]` this gives the 8
            symmetries of the square.
        axis: Spatial axis of rotation in 3D. The default, the last axis, is the slice axis of an axial volume in RAS
            orientation. Ignored in 2D.
        activation: Activation of the logits, "softmax" or "sigmoid".

    Attributes:
        on_progress: Callback with (done, total) during inference; only the ratio is meaningful, since some angles need
            more windows.

    Raises:
        RequestError: No angles, a non-finite angle, or an unknown option.
    """

    on_progress: Callable[[int, int], None] | None = None

    def __init__(
        self,
        inferer: monai.inferers.Inferer,
        angles: Sequence[float] | int = 7,
        *,
        mirror: bool = False,
        axis: int = -1,
        activation: str = "softmax",
    ) -> None:
        check_choice("activation", activation, ACTIVATIONS)
        degrees = [k * 360 / angles for k in range(angles)] if isinstance(angles, int) else list(angles)
        if not degrees or not all(map(math.isfinite, degrees)):
            raise RequestError(
                f"invalid angles={angles}; expected a number of angles of at least 1, or a list of degrees."
            )
        if axis not in range(-3, 3):
            raise RequestError(f"invalid axis={axis}; expected a spatial axis 0, 1 or 2 (or -1, the last).")
        self.inferer = inferer
        self.turns = [_Turn.of(angle, flip) for flip in ((False, True) if mirror else (False,)) for angle in degrees]
        self.axis = axis
        self.activation = activation

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean probabilities of an image `(B, C, *spatial)`, as float32 logits `(B, K, *spatial)`.

        `activation` converts them back to the mean probabilities: they are `log p` for "softmax" and
        `log(p / (1 - p))` for "sigmoid".

        Raises:
            RequestError: The wrapped inferer does not return logits.
            SizeError: The image is neither 2D nor 3D, or the wrapped inferer changes its size.
        """
        image = plain(inputs)
        if image.dim() not in (4, 5):
            raise SizeError(
                f"invalid image shape {tuple(image.shape)}; expected (B, C, *spatial) with 2 or 3 spatial axes."
            )
        if not image.is_floating_point():
            image = image.float()
        total = image.new_empty(0)
        for number, turn in enumerate(self.turns):
            turned = self._turned(image, turn)
            with self._told(number):
                logits = self.inferer(turned, network, *args, **kwargs)
            _check(logits, turned)
            logits = plain(logits)
            del turned
            if number == 0:
                shape = (*logits.shape[:2], *image.shape[2:])
                total = torch.zeros(shape, dtype=torch.float32, device=logits.device)
            _carry(self._planes(logits), self._planes(total), turn, self._probabilities, Tensor.add_)
            del logits
        return with_metadata(as_logits(total.div_(len(self.turns)), self.activation), inputs)

    def _turned(self, image: Tensor, turn: _Turn) -> Tensor:
        """Return the rotated image on an enlarged plane, mirrored beyond its border."""
        if turn.nothing:
            return image
        shape = list(image.shape)
        first, second = (axis for axis in range(2, image.dim()) if image.dim() == 4 or axis != self.axis % 3 + 2)
        shape[first], shape[second] = turn.canvas(shape[first], shape[second])
        turned = image.new_empty(shape)
        _carry(self._planes(image), self._planes(turned), turn.back, _unchanged, Tensor.copy_)
        return turned

    def _planes(self, volume: Tensor) -> Tensor:
        """Return a view `(B, C, planes, height, width)`."""
        return volume.unsqueeze(2) if volume.dim() == 4 else volume.movedim(self.axis % 3 + 2, 2)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return probabilities(logits, self.activation)

    @contextmanager
    def _told(self, number: int) -> Iterator[None]:
        """Forward the progress of the wrapped inferer for rotation `number`."""
        report, turns = self.on_progress, len(self.turns)
        if report is None:
            yield
        elif hasattr(self.inferer, "on_progress"):
            before = self.inferer.on_progress
            self.inferer.on_progress = lambda done, total: report(number * total + done, turns * total)
            try:
                yield
            finally:
                self.inferer.on_progress = before
        else:
            yield
            report(number + 1, turns)


class _Turn(NamedTuple):
    """Orthogonal matrix of a rotation in the plane, in coordinates relative to the centers of both planes."""

    rr: float
    rc: float
    cr: float
    cc: float

    @classmethod
    def of(cls, degrees: float, flip: bool) -> _Turn:
        """Return the rotation by an angle, after flipping the second axis if `flip`."""
        quarters, rest = divmod(degrees, 90)
        if rest:
            cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        else:
            cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[int(quarters) % 4]
        sign = -1 if flip else 1
        return cls(cos, -sin * sign, sin, cos * sign)

    @property
    def back(self) -> _Turn:
        return _Turn(self.rr, self.cr, self.rc, self.cc)

    @property
    def nothing(self) -> bool:
        return self == (1, 0, 0, 1)

    @property
    def exact(self) -> bool:
        return 0 in (self.rr, self.rc)

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the smallest plane that contains the rotated plane."""
        rows = math.ceil(abs(self.rr) * (height - 1) + abs(self.rc) * (width - 1) - 1e-9) + 1
        columns = math.ceil(abs(self.cr) * (height - 1) + abs(self.cc) * (width - 1) - 1e-9) + 1
        # An odd difference would shift the pixel grid by half a pixel and blur even small rotations.
        upright = abs(self.rr) > abs(self.rc)
        return (
            rows + (rows - (height if upright else width)) % 2,
            columns + (columns - (width if upright else height)) % 2,
        )


def _unchanged(values: Tensor) -> Tensor:
    return values


def _carry(
    source: Tensor,
    target: Tensor,
    turn: _Turn,
    read: Callable[[Tensor], Tensor],
    write: Callable[[Tensor, Tensor], object],
) -> None:
    """Resample `source` onto `target`, plane by plane and square by square.

    Args:
        source: Source `(B, C, planes, height, width)`, mirrored at its border.
        target: Target `(B, C, planes, height, width)`, modified by `write`.
        turn: Rotation from target coordinates to source coordinates.
        read: Function applied to a part of a source plane before interpolation.
        write: Function called with a part of a target plane and its values.
    """
    size, origin = target.shape[-2:], source.shape[-2:]
    starts = (range(0, n, _SQUARE) for n in size)
    for top, left in product(*starts):
        rows, columns = slice(top, min(top + _SQUARE, size[0])), slice(left, min(left + _SQUARE, size[1]))
        places = _places(turn, rows, columns, size, origin)
        box = tuple(slice(math.floor(float(p.min())), math.ceil(float(p.max())) + 1) for p in places)
        grid = None if turn.exact else _grid(places, box).to(source.device)
        for plane in range(target.shape[2]):
            values = read(source[:, :, plane, box[0], box[1]])
            values = _reordered(values, turn) if grid is None else _interpolated(values, grid)
            write(target[:, :, plane, rows, columns], values)


def _places(
    turn: _Turn, rows: slice, columns: slice, size: Sequence[int], origin: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the source coordinates (rows, columns) of a rectangle of the target."""
    row = torch.arange(rows.start, rows.stop, dtype=torch.float64)[:, None] - (size[0] - 1) / 2
    column = torch.arange(columns.start, columns.stop, dtype=torch.float64) - (size[1] - 1) / 2
    return (
        _mirrored(turn.rr * row + turn.rc * column + (origin[0] - 1) / 2, origin[0]),
        _mirrored(turn.cr * row + turn.cc * column + (origin[1] - 1) / 2, origin[1]),
    )


def _mirrored(place: Tensor, size: int) -> Tensor:
    """Reflect coordinates into 0 .. size - 1, without repeating the border voxel."""
    if size == 1:
        return torch.zeros_like(place)
    period = 2 * (size - 1)
    place = place.remainder(period)
    return torch.minimum(place, period - place)


def _grid(places: tuple[Tensor, Tensor], box: Sequence[slice]) -> Tensor:
    """Return the grid `(1, height, width, 2)` of `grid_sample` for coordinates within a box of the source."""
    scaled = [
        2 * (place - span.start) / max(span.stop - span.start - 1, 1) - 1
        for place, span in zip(places, box, strict=True)
    ]
    return torch.stack(scaled[::-1], dim=-1).float()[None]


def _interpolated(values: Tensor, grid: Tensor) -> Tensor:
    grid = grid.expand(len(values), -1, -1, -1)
    return F.grid_sample(values.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)


def _reordered(values: Tensor, turn: _Turn) -> Tensor:
    """Permute and flip a part of the source for a multiple of 90 degrees or a mirror image."""
    if turn.rr == 0:
        down, right, values = turn.cr, turn.rc, values.transpose(-2, -1)
    else:
        down, right = turn.rr, turn.cc
    return values.flip([axis for axis, sign in ((-2, down), (-1, right)) if sign < 0])


def _check(logits: object, turned: Tensor) -> None:
    """Check that the wrapped inferer returned logits of the rotated image."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise RequestError(f"the inferer inside RotationTTAInferer must return floating-point logits, found {found}.")
    if len(logits) != len(turned) or logits.shape[2:] != turned.shape[2:]:
        raise SizeError(
            f"shape mismatch: the inferer inside RotationTTAInferer returned logits of shape {tuple(logits.shape)} for "
            f"an image of shape {tuple(turned.shape)}. For unpadded networks use OverlapTileInferer inside it."
        )
