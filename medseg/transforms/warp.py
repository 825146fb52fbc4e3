"""Random training patches with flip, rotation, zoom and elastic deformation in a single resampling."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from monai.transforms.traits import MultiSampleTrait
from numpy.typing import NDArray

from medseg.errors import CaseError, RequestError
from medseg.transforms.class_indices import class_places
from medseg.transforms.elastic import check_elastic, dense_field, draw_control
from medseg.transforms.sampling import Sampler, check_padding, cut
from medseg.transforms.tensors import one_shape, plain_tensor
from medseg.transforms.traits import Traits

__all__ = ["RandWarpd"]

_LABEL_MODES = ("nearest", "votes")
_Range = float | Sequence[float | Sequence[float]]


class RandWarpd(Randomizable, MapTransform, MultiSampleTrait):  # type: ignore[misc]
    """Extract random patches from a case, each warped in a single resampling of only the required voxels.

    A patch is centered at a voxel of a foreground class, with equal probability for each class in the case, or placed
    uniformly in the image. It is randomly flipped, rotated (in mm, even for anisotropic voxels), zoomed and elastically
    deformed around its center. Without rotation, zoom and deformation the patch is cropped and flipped without
    interpolation.

    Args:
        keys: Keys of images and labels `(C, *spatial)` of the same shape, in 2D or 3D.
        patch_size: Spatial size of a patch in voxels.
        label_key: Key of the label used for foreground sampling, `(1, *spatial)`; of several channels the first is
            used.
        label_keys: Keys among `keys` that are labels; by default `label_key`.
        num_samples: Number of patches per case.
        margin: Voxels on each side of a patch that an unpadded network uses only as context, one number or one per
            axis. Patches may extend beyond the image by the margin, filled by `padding`, so that every voxel of the
            image can be predicted.
        foreground: Probability of centering a patch in the foreground.
        flip_prob: Probability of a flip along each axis, one number or one per axis.
        rotate_range: Maximum rotation angle about each voxel axis in radians, one number or one per axis (one in 2D);
            or a pair (minimum, maximum) instead of an angle. `(0.5, 0, 0)` rotates only within the planes of the first
            axis. Rotations are composed as in `Affine` of MONAI.
        rotate_prob: Probability of a rotation.
        zoom_range: Minimum and maximum zoom factor; 2 magnifies by two. Drawn log-uniformly.
        zoom_prob: Probability of a zoom.
        zoom_per_axis: Whether to draw a separate zoom factor for each axis.
        elastic_sigma: Standard deviation of the displacements of an elastic deformation in image voxels (see
            `RandElasticd`), one number or one per axis; 0 for no deformation.
        elastic_grid: Number of nodes of the deformation along each axis of the patch, one number or one per axis.
        elastic_prob: Probability of a deformation.
        label_mode: Interpolation of labels: "nearest", or "votes" for the label whose linearly interpolated mask is
            largest.
        padding: Padding outside the image: "border" repeats the edge, "reflect" mirrors the image, "constant" uses the
            two values below. Images smaller than a patch are centered in it.
        padding_value: Value of constant padding of images.
        padding_label: Value of constant padding of labels.
        ignore_label: Label value that is not a class for foreground sampling.
        places_key: Key of the entry of `ClassIndicesd`; by default `label_key` plus "_places". If missing, the label is
            searched.
        track_meta: Whether to return a `MetaTensor` with the affine of the patch (without elastic deformation) and the
            file name for each `MetaTensor`; otherwise plain tensors are returned.
        allow_missing_keys: Whether to skip keys missing in a case.

    Raises:
        RequestError: Invalid setting, or a number of values that does not match the axes of the image.
        CaseError: Different shapes within a case.
    """

    traits = Traits("unmapped", crops=True)

    def __init__(
        self,
        keys: KeysCollection,
        patch_size: Sequence[int],
        label_key: str = "label",
        *,
        label_keys: Sequence[str] | None = None,
        num_samples: int = 1,
        margin: int | Sequence[int] = 0,
        foreground: float = 0.0,
        flip_prob: float | Sequence[float] = 0.0,
        rotate_range: _Range = 0.0,
        rotate_prob: float = 1.0,
        zoom_range: Sequence[float] = (1.0, 1.0),
        zoom_prob: float = 1.0,
        zoom_per_axis: bool = False,
        elastic_sigma: float | Sequence[float] = 0.0,
        elastic_grid: int | Sequence[int] = 3,
        elastic_prob: float = 1.0,
        label_mode: str = "nearest",
        padding: str = "border",
        padding_value: float = 0.0,
        padding_label: int = 0,
        ignore_label: int | None = None,
        places_key: str | None = None,
        track_meta: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.patch_size = _patch_size(patch_size)
        self.label_key = label_key
        self.label_keys = (label_key,) if label_keys is None else _names(label_keys)
        if num_samples < 1:
            raise RequestError(f"num_samples={num_samples}: expected at least 1.")
        self.num_samples = num_samples
        chances = {"foreground": foreground, "flip_prob": flip_prob, "rotate_prob": rotate_prob}
        _check_chances({**chances, "zoom_prob": zoom_prob, "elastic_prob": elastic_prob})
        self.foreground = foreground
        dims = len(self.patch_size)
        self.margin = _margin(margin, self.patch_size)
        self.flip_prob = _per_axis("flip_prob", flip_prob, dims)
        self.angles = _angles(rotate_range, dims)
        self.rotate_prob = rotate_prob
        self.zooms = _zooms(zoom_range)
        self.zoom_prob = zoom_prob
        self.zoom_per_axis = zoom_per_axis
        check_elastic(elastic_grid, elastic_sigma)
        self.elastic_sigma = _per_axis("elastic_sigma", elastic_sigma, dims)
        self.elastic_grid = elastic_grid
        self.elastic_prob = elastic_prob
        if label_mode not in _LABEL_MODES:
            raise RequestError(f"invalid label_mode={label_mode!r}; choose 'nearest' or 'votes'.")
        self.label_mode = label_mode
        check_padding(padding)
        self.padding = padding
        self.padding_value = padding_value
        self.padding_label = padding_label
        self.ignore_label = ignore_label
        self.places_key = f"{label_key}_places" if places_key is None else places_key
        self.track_meta = track_meta
        self.warp: _Warp | None = None

    def randomize(self, case: _Case) -> None:
        """Draw the position and the warp of one patch."""
        dims = len(self.patch_size)
        start = self._start(case)
        flips = tuple(bool(each) for each in self.R.random_sample(dims) < self.flip_prob)
        matrix: NDArray[np.float64] | None = None
        if self._drawn(self.rotate_prob, bool(np.any(self.angles))):
            stretch = np.asarray(case.spacing)
            turned = _rotation([self.R.uniform(low, high) for low, high in self.angles], dims)
            matrix = turned * stretch / stretch[:, None]
        if self._drawn(self.zoom_prob, bool(np.any(self.zooms))):
            zoom = np.exp(self.R.uniform(*self.zooms, size=dims if self.zoom_per_axis else 1))
            matrix = (np.eye(dims) if matrix is None else matrix) / zoom
        control = None
        if self._drawn(self.elastic_prob, bool(np.any(self.elastic_sigma))):
            control = draw_control(self.R, dims, self.elastic_grid, self.elastic_sigma.tolist())
        self.warp = _Warp(self.patch_size, start, flips, matrix, control)

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """Return `num_samples` cases with patches `(C, *patch_size)`: float32 images, labels of unchanged type.

        Other entries are shared with `data`, not copied.
        """
        rest = dict(data)
        places = rest.pop(self.places_key, None)
        images = {key: rest[key] for key in self.key_iterator(rest)}
        case = self._case(images, rest.get(self.label_key), places)
        samples = []
        for _ in range(self.num_samples):
            self.randomize(case)
            samples.append({**rest, **self._patches(case, images)})
        return samples

    def _case(self, images: dict[Hashable, Any], label: Any, places: list[torch.Tensor] | None) -> _Case:
        if self.foreground > 0 and label is None and places is None:
            raise RequestError(
                f"foreground={self.foreground} requires the label '{self.label_key}', which is missing: set "
                "label_key, or foreground=0."
            )
        plain = {key: plain_tensor(image) for key, image in images.items()}
        truth = None if label is None else plain_tensor(label)
        everything = plain if truth is None else {**plain, self.label_key: truth}
        shape = one_shape(everything) if everything else ()
        if len(shape) != len(self.patch_size):
            raise RequestError(
                f"patch_size={self.patch_size} does not match an image of shape {shape}: expected one value per axis."
            )
        if 0 in shape:
            raise CaseError(f"Empty image of shape {shape}.")
        return _Case(plain, shape, _spacing(images.values(), len(shape)), truth, places, self.ignore_label)

    def _start(self, case: _Case) -> tuple[int, ...]:
        """Draw the first voxel of a patch; images shorter than the patch without margins are centered."""
        inner = [size - 2 * lost for size, lost in zip(self.patch_size, self.margin, strict=True)]
        free = [length - size for length, size in zip(case.shape, inner, strict=True)]
        if self.foreground > 0 and self.R.random_sample() < self.foreground and case.places:
            voxels = case.places[self.R.randint(len(case.places))]
            center = np.unravel_index(int(voxels[self.R.randint(len(voxels))]), case.shape)
            wanted = [int(at) - size // 2 for at, size in zip(center, inner, strict=True)]
        else:
            wanted = [int(self.R.randint(max(room, 0) + 1)) for room in free]
        first = [min(max(at, 0), room) if room >= 0 else -(-room // 2) for at, room in zip(wanted, free, strict=True)]
        return tuple(at - lost for at, lost in zip(first, self.margin, strict=True))

    def _drawn(self, probability: float, possible: bool) -> bool:
        return possible and bool(self.R.random_sample() < probability)

    def _patches(self, case: _Case, images: dict[Hashable, Any]) -> dict[Hashable, torch.Tensor]:
        warp = self.warp
        if warp is None:
            raise RequestError("RandWarpd has no warp: call randomize() first.")
        sampler = warp.sampler(case.shape, self.padding)
        patches = {}
        for key, image in case.images.items():
            is_label = key in self.label_keys
            patch = self._patch(image, warp, sampler, is_label=is_label)
            patches[key] = self._placed(patch if is_label else patch.float(), images[key], warp)
        return patches

    def _patch(self, image: torch.Tensor, warp: _Warp, sampler: Sampler | None, *, is_label: bool) -> torch.Tensor:
        outside = self.padding_label if is_label else self.padding_value
        if sampler is None:
            return cut(image, warp.start, warp.size, flips=warp.flips, padding=self.padding, outside=outside)
        if not is_label:
            return sampler.linear(image, outside=outside)
        sample = sampler.nearest if self.label_mode == "nearest" else sampler.votes
        return sample(image, outside=outside)

    def _placed(self, patch: torch.Tensor, image: Any, warp: _Warp) -> torch.Tensor:
        if not (self.track_meta and isinstance(image, MetaTensor)):
            return patch
        name = {"filename_or_obj": image.meta["filename_or_obj"]} if "filename_or_obj" in image.meta else {}
        placed: torch.Tensor = MetaTensor(patch, affine=_moved(image.affine, warp.affine), meta=name)
        return placed


@dataclass
class _Case:
    """Source of patches.

    Attributes:
        images: Images `(C, *shape)` without metadata.
        shape: Spatial shape.
        spacing: Voxel spacing in mm along each axis; 1 if unknown.
        label: Label `(1, *shape)`, if there is one.
        note: Class indices from `ClassIndicesd`, if present.
        ignore_label: Label value to ignore.
    """

    images: dict[Hashable, torch.Tensor]
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    label: torch.Tensor | None
    note: list[torch.Tensor] | None
    ignore_label: int | None

    @cached_property
    def places(self) -> list[torch.Tensor]:
        """Flat voxel indices of each foreground class in the case."""
        if self.note is not None or self.label is None:
            return list(self.note or [])
        return class_places(self.label, ignore_label=self.ignore_label)


@dataclass(frozen=True)
class _Warp:
    """Position and spatial transform of a patch.

    Attributes:
        size: Spatial size of the patch.
        start: First voxel of the patch before the transform.
        flips: Whether the patch is flipped, per axis.
        matrix: Linear map from patch voxels to image voxels relative to the center, after the flips; None for the
            identity.
        control: Displacements `(dims, *grid)` of an elastic deformation in image voxels; None for no deformation.
    """

    size: tuple[int, ...]
    start: tuple[int, ...]
    flips: tuple[bool, ...]
    matrix: NDArray[np.float64] | None
    control: torch.Tensor | None

    @property
    def linear(self) -> NDArray[np.float64]:
        """Linear map from patch voxels to image voxels, relative to the center."""
        signs = np.where(self.flips, -1.0, 1.0)
        return np.diag(signs) if self.matrix is None else self.matrix * signs

    @property
    def affine(self) -> NDArray[np.float64]:
        """Homogeneous transform from patch voxels to image voxels."""
        middle = (np.array(self.size) - 1) / 2
        affine = np.eye(len(self.size) + 1)
        affine[:-1, :-1] = self.linear
        affine[:-1, -1] = np.array(self.start) + middle - self.linear @ middle
        return affine

    def sampler(self, shape: Sequence[int], padding: str) -> Sampler | None:
        """Return the sampler of the patch for images of a shape; None if a crop without interpolation suffices."""
        if self.matrix is None and self.control is None:
            return None
        middle = (np.array(self.size) - 1) / 2
        origin = np.floor(self.start + middle).astype(int)
        remainder = self.start + middle - origin
        places = [self._places(row, float(offset)) for row, offset in zip(self.linear, remainder, strict=True)]
        if self.control is not None:
            field = dense_field(self.control, self.size)
            places = [place + moved for place, moved in zip(places, field, strict=True)]
        return Sampler(places, self.size, shape, origin=[int(o) for o in origin], padding=padding)

    def _places(self, row: NDArray[np.float64], offset: float) -> torch.Tensor:
        """Return positions along one image axis, with length 1 along patch axes that do not affect them."""
        dims = len(self.size)
        total = torch.full([1] * dims, offset)
        for axis, (factor, voxels) in enumerate(zip(row, self.size, strict=True)):
            if factor:
                steps = (np.arange(voxels) - (voxels - 1) / 2) * factor
                shape = [voxels if dim == axis else 1 for dim in range(dims)]
                total = total + torch.from_numpy(steps.astype(np.float32)).view(shape)
        return total


def _spacing(images: Any, dims: int) -> tuple[float, ...]:
    affine = next((image.affine for image in images if isinstance(image, MetaTensor)), None)
    if affine is None:
        return (1.0,) * dims
    lengths = np.linalg.norm(affine.cpu().numpy()[:-1, :dims], axis=0)
    # The affine of a 2D image may have fewer axes than its array; zero columns have no spacing.
    return tuple(float(each) if each > 0 else 1.0 for each in [*lengths, *[1.0] * (dims - len(lengths))])


def _moved(affine: torch.Tensor, change: NDArray[np.float64]) -> torch.Tensor:
    """Return the affine of a patch; `change` maps patch voxels to image voxels and may have fewer axes."""
    rank, dims = len(affine) - 1, len(change) - 1
    grown = np.eye(rank + 1)
    used = min(rank, dims)
    grown[:used, :used] = change[:used, :used]
    grown[:used, -1] = change[:used, -1]
    return affine.cpu().double() @ torch.from_numpy(grown)


def _rotation(angles: Sequence[float], dims: int) -> NDArray[np.float64]:
    """Return the rotation matrix for one angle in 2D, or for angles about the three axes in 3D."""
    matrix = np.eye(dims)
    for axis, angle in enumerate(angles):
        one, other = (0, 1) if dims == 2 else ((1, 2), (2, 0), (0, 1))[axis]
        turn = np.eye(dims)
        turn[[one, other], [one, other]] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def _patch_size(patch_size: Sequence[int]) -> tuple[int, ...]:
    size = tuple(int(each) for each in patch_size)
    if len(size) not in (2, 3) or min(size) < 1:
        raise RequestError(f"patch_size={patch_size!r}: expected 2 or 3 integers of at least 1.")
    return size


def _margin(margin: int | Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    lost = tuple(int(each) for each in _per_axis("margin", margin, len(patch_size)))
    if any(each < 0 or 2 * each >= size for each, size in zip(lost, patch_size, strict=True)):
        raise RequestError(f"margin={margin!r}: expected at least 0 and less than half of patch_size={patch_size}.")
    return lost


def _names(keys: Sequence[str]) -> tuple[str, ...]:
    return (keys,) if isinstance(keys, str) else tuple(keys)


def _per_axis(option: str, value: float | Sequence[float], dims: int) -> NDArray[np.float64]:
    if np.size(value) not in (1, dims):
        raise RequestError(f"{option}={value!r}: expected one number, or {dims} for {dims} axes.")
    return np.broadcast_to(np.asarray(value, dtype=float), dims)


def _check_chances(chances: Mapping[str, float | Sequence[float]]) -> None:
    for option, value in chances.items():
        if not (np.min(value) >= 0 and np.max(value) <= 1):
            raise RequestError(f"{option}={value!r}: expected a probability from 0 to 1.")


def _angles(rotate_range: _Range, dims: int) -> list[tuple[float, float]]:
    """Return minimum and maximum angle of each rotation: one in 2D, three in 3D."""
    turns = 1 if dims == 2 else 3
    given = [rotate_range] * turns if isinstance(rotate_range, int | float) else list(rotate_range)
    pairs = [(-each, each) if isinstance(each, int | float) else tuple(each) for each in given]
    if len(pairs) != turns or any(len(pair) != 2 for pair in pairs):
        raise RequestError(
            f"rotate_range={rotate_range!r}: expected one angle in radians, or {turns} in {dims}D, each a number or a "
            "pair (minimum, maximum)."
        )
    return [(float(low), float(high)) for low, high in pairs]


def _zooms(zoom_range: Sequence[float]) -> tuple[float, float]:
    """Return the logarithms of the minimum and maximum zoom factor."""
    zooms = [zoom_range] if isinstance(zoom_range, int | float) else list(zoom_range)
    if len(zooms) != 2 or not 0 < zooms[0] <= zooms[1]:
        raise RequestError(f"zoom_range={zoom_range!r}: expected the minimum and maximum zoom factor, above 0.")
    return float(np.log(zooms[0])), float(np.log(zooms[1]))
