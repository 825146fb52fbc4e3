"""UCTransNet (Wang, Cao, Wang, Zaiane; AAAI 2022, arXiv 2109.04335), 2D and 3D.

Written from the paper's equations; where the paper leaves a choice open, results follow the released weights. Levels
are numbered 1 (full resolution) to n; C_i are the channels of level i and C the sum of those that enter the CCT.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, Any

import torch
from monai.networks.layers import Conv, Pool
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import RequestError
from medseg.networks.blocks import ConvUnit, checks_apply, conv_pair, upsampler
from medseg.networks.cct import CCT, Enlarge
from medseg.networks.options import check_choice, check_numbers, chosen_levels, per_axis
from medseg.networks.sizes import check_bottom, check_image, check_minimum, total_stride
from medseg.networks.unet_transfer import Transfer, transfer_unet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medseg.networks.blocks import LayerName
    from medseg.types import TrainingOutput

__all__ = ["CCA", "UCTransNet"]

# Sides of the images that the positional tables are made for where nobody says another.
_NATIVE_SIDE = {2: 224, 3: 96}


class UCTransNet(nn.Module):
    """A U-Net whose skips pass through a transformer over channels (`CCT`) and a channel gate (`CCA`).

    The n = `len(features) - 1` encoder maps are cut into equally many tokens, attend to each other's channels, and come
    back to their size; each is then gated by the decoder map that it joins. The defaults are the paper's network.
    Images of any size from one patch upwards work: those that the patches do not tile are extended by repeating their
    last voxels, and the logits are cut back.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the logits.
        features: channels per level, finest first, the bottleneck last; two entries or more.
        img_size: spatial size (voxels) whose positional tables are learned, a number or one per axis: best the size of
            the training crops. At other sizes the tables are interpolated. By default the paper's 224 in 2D, 96 in 3D.
        patch_size: voxels of the image that one token stands for, a number or one per axis; must divide by the strides
            before every level of the CCT.
        strides: down-sampling per pooling, finest first: a number or one number per axis, e.g.
            `((1, 2, 2), 2, 2, 2)` for thick slices. 2 everywhere by default.
        num_heads: heads of the attention, each as wide as the level.
        num_layers: transformer layers.
        mlp_ratio: width of the MLPs' hidden layers in units of the level's.
        embed_dropout: rate after the positional tables.
        attn_dropout: rate on the attention maps and on the output of each attention.
        mlp_dropout: rate after both layers of each MLP.
        norm: MONAI factory name or (name, arguments) after every convolution of backbone and reconstruction.
        act: MONAI factory name or (name, arguments) after these.
        upsample: "nearest", or "deconv", a learned up-convolution.
        backbone: "paper": one convolution at level 1, and each decoder level but the first already narrows to the level
            above. "unet": the widths of `UNet`, whose weights can be taken over (see `transfer_unet`).
        skip_levels: which levels keep their skip: "all", "none", or their numbers, 1 the finest.
        skip_mode: a level without skip is "remove"d from the decoder's first convolution, or "zeros" take its place, so
            that one set of weights can be probed with every choice.
        cct_levels: levels that enter the CCT (as queries, keys and values); `skip_levels` by default. Other skips pass
            around it. With "remove", only levels with a skip can enter.
        use_cct: whether there is a CCT.
        use_cca: whether there are CCAs.
        pos_embed: "learned" or "none".

    Attributes:
        step: sizes that divide by these numbers per axis are used as they are, others are extended to them.

    Raises:
        RequestError: options that contradict each other or are not known.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (64, 128, 256, 512, 512),
        *,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] = 16,
        strides: Sequence[int | Sequence[int]] | None = None,
        num_heads: int = 4,
        num_layers: int = 4,
        mlp_ratio: float = 4,
        embed_dropout: float = 0.1,
        attn_dropout: float = 0.1,
        mlp_dropout: float = 0.0,
        norm: LayerName | None = "batch",
        act: LayerName = "relu",
        upsample: str = "nearest",
        backbone: str = "paper",
        skip_levels: str | Sequence[int] = "all",
        skip_mode: str = "remove",
        cct_levels: str | Sequence[int] | None = None,
        use_cct: bool = True,
        use_cca: bool = True,
        pos_embed: str = "learned",
    ) -> None:
        super().__init__()
        check_choice("upsample", upsample, ("nearest", "deconv"))
        check_choice("backbone", backbone, ("paper", "unet"))
        check_choice("skip_mode", skip_mode, ("remove", "zeros"))
        check_choice("pos_embed", pos_embed, ("learned", "none"))
        check_numbers(spatial_dims, features)
        _check_counts(num_heads=num_heads, num_layers=num_layers)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.features = tuple(features)
        self.strides = per_axis(strides, len(features) - 1, spatial_dims)
        self.step = self.bottom_stride = total_stride(self.strides)
        self.skip_levels = chosen_levels("skip_levels", skip_levels, len(features) - 1)
        chosen = _cct_levels(cct_levels, self.skip_levels, len(features) - 1, skip_mode)
        self.cct_levels = chosen if use_cct else ()
        # A list, because TorchScript walks no tuple of unknown length.
        self.fused = [level - 1 for level in self.cct_levels]
        options: dict[str, Any] = {"norm": norm, "act": act}

        self.encoder = nn.ModuleList()
        self.pools = nn.ModuleList([nn.Identity()])
        self.pools.extend(Pool[Pool.MAX, spatial_dims](kernel_size=stride, stride=stride) for stride in self.strides)
        if backbone == "paper":
            self.encoder.append(nn.Sequential(ConvUnit(spatial_dims, in_channels, features[0], **options)))
        for level in range(len(self.encoder), len(features)):
            channels = features[level - 1] if level else in_channels
            self.encoder.append(conv_pair(spatial_dims, channels, features[level], **options))
        self.cct = None
        if self.cct_levels:
            patch = _axes("patch_size", patch_size, spatial_dims)
            self.step = tuple(map(lcm, self.bottom_stride, patch))
            native = _axes("img_size", _NATIVE_SIDE[spatial_dims] if img_size is None else img_size, spatial_dims)
            self.cct = CCT(
                [features[i] for i in self.fused],
                _level_patches(patch, self.strides, self.cct_levels),
                [-(-n // s) * s // p for n, s, p in zip(native, self.step, patch, strict=True)],
                num_heads=num_heads,
                num_layers=num_layers,
                mlp_ratio=mlp_ratio,
                dropout=(embed_dropout, attn_dropout, mlp_dropout),
                pos_embed=pos_embed,
                **options,
            )
        self.decoder = nn.ModuleList()
        read = features[-1]
        for level in range(len(features) - 1, 0, -1):
            written = features[level - 1] if backbone == "unet" else features[max(level - 2, 0)]
            block = _DecoderLevel(
                spatial_dims,
                (read, features[level - 1], written),
                self.strides[level - 1],
                up_width=features[level - 1] if (backbone, upsample) == ("unet", "deconv") else read,
                upsample=upsample,
                join="cat" if level in self.skip_levels else skip_mode,
                use_cca=use_cca,
                **options,
            )
            self.decoder.append(block)
            read = written
        self.head = Conv[Conv.CONV, spatial_dims](read, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, out_channels, *spatial)`.

        Raises:
            SizeError: the tensor does not fit this network; names the nearest size that does.
        """
        image = x
        maps = self._encode(image)
        x = maps.pop()
        maps = self._fuse(maps)
        for level in self.decoder:
            x = level(x, maps.pop())
        return _cut(self.head(x), image)

    def forward_train(self, x: Tensor) -> TrainingOutput:
        """Return `logits` and `features`: taps E1..En, B, Dn..D1 (see `medseg.types.TrainingOutput`).

        The encoder taps stand before CCT and CCA. All are maps of the extended image where `step` does not divide it.
        """
        maps = self._encode(x)
        depth = len(maps) - 1
        taps = {f"E{i + 1}": found for i, found in enumerate(maps[:-1])}
        taps["B"] = deep = maps.pop()
        maps = self._fuse(maps)
        for i, level in enumerate(self.decoder):
            taps[f"D{depth - i}"] = deep = level(deep, maps.pop())
        return {"logits": _cut(self.head(deep), x), "features": taps}

    def attention_maps(self, x: Tensor) -> list[dict[int, Tensor]]:
        """Return how the channels attend to each other, one dictionary per transformer layer.

        Args:
            x: image `(B, in_channels, *spatial)`.

        Returns:
            level -> `(B, C_i, C)`, rows summing to 1: mean over the heads, before drop-out. An empty list without CCT.
        """
        maps = self._encode(x)
        if self.cct is None:
            return []
        layers = self.cct.attention_maps([maps[i] for i in self.fused])
        return [dict(zip(self.cct_levels, layer, strict=True)) for layer in layers]

    def transfer(self, state: Mapping[str, Tensor], *, cat_order: str | None = None) -> Transfer:
        """Start from a trained U-Net; arguments and errors as for `transfer_unet`."""
        return transfer_unet(self, state, cat_order=cat_order)

    def _encode(self, x: Tensor) -> list[Tensor]:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check(x)
        x = _extend(x, list(self.step))
        maps: list[Tensor] = []
        for pool, level in zip(self.pools, self.encoder):  # noqa: B905 - TorchScript knows no `strict`
            x = level(pool(x))
            maps.append(x)
        return maps

    def _fuse(self, maps: list[Tensor]) -> list[Tensor]:
        if self.cct is not None:
            fused = self.cct([maps[i] for i in self.fused])
            for place, i in enumerate(self.fused):
                maps[i] = fused[place]
        return maps

    def _check(self, x: Tensor) -> None:
        if not checks_apply():
            return
        name = type(self).__name__
        check_image(x, name, self.spatial_dims, self.in_channels)
        check_minimum(x.shape[2:], self.step, name)
        if tuple(x.shape[2:]) == self.step:
            check_bottom(x, self.bottom_stride, self.encoder[-1].modules(), name)
            if self.cct is not None:
                check_bottom(x, self.step, self.cct.reconstructions.modules(), name)


class CCA(nn.Module):
    """Channel-wise cross attention, Eq. (5) of the paper: the decoder's map decides which channels of a skip count.

    Args:
        spatial_dims: 2 or 3.
        skip_channels: channels of the skip.
        up_channels: channels of the enlarged decoder map.
    """

    def __init__(self, spatial_dims: int, skip_channels: int, up_channels: int) -> None:
        super().__init__()
        self.axes = list(range(2, spatial_dims + 2))
        self.skip = nn.Linear(skip_channels, skip_channels)
        self.up = nn.Linear(up_channels, skip_channels)

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        """Return the gated skip, of the shape of `skip`."""
        gate = (self.skip(skip.mean(self.axes)) + self.up(up.mean(self.axes))) / 2
        gate = gate.sigmoid()
        for axis in self.axes:
            gate = gate.unsqueeze(axis)
        return F.relu(skip * gate, inplace=True)


class _DecoderLevel(nn.Module):
    """Enlarge, gate and join the skip, convolve twice.

    `widths` are the channels read, those of the skip, and those written; `join` is "cat", "remove" or "zeros".
    """

    def __init__(
        self,
        spatial_dims: int,
        widths: tuple[int, int, int],
        stride: Sequence[int],
        *,
        up_width: int,
        upsample: str,
        join: str,
        use_cca: bool,
        **options: Any,
    ) -> None:
        super().__init__()
        read, skip, written = widths
        self.up = (
            Enlarge(stride) if upsample == "nearest" else upsampler(spatial_dims, read, up_width, stride, mode=upsample)
        )
        self.cca = CCA(spatial_dims, skip, up_width) if use_cca and join != "remove" else None
        joined = up_width if join == "remove" else skip + up_width
        self.convs = conv_pair(spatial_dims, joined, written, **options)
        self.join = join

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        if self.join == "zeros":
            x = torch.cat([torch.zeros_like(skip), x], dim=1)
        elif self.join == "cat":
            if self.cca is not None:
                skip = self.cca(skip, x)
            x = torch.cat([skip, x], dim=1)
        out: Tensor = self.convs(x)
        return out


def _extend(x: Tensor, step: list[int]) -> Tensor:
    """Repeat the last voxels of each axis until `step` divides it."""
    for axis in range(2, x.dim()):
        n, s = x.shape[axis], step[axis - 2]
        x = _take(x, axis, (n + s - 1) // s * s)
    return x


def _cut(x: Tensor, like: Tensor) -> Tensor:
    """Take away what `_extend` added."""
    for axis in range(2, x.dim()):
        x = _take(x, axis, like.shape[axis])
    return x


def _take(x: Tensor, axis: int, size: int) -> Tensor:
    """Shorten an axis to `size` voxels, or lengthen it by repeating the last one.

    By index, because a graph for any size can neither tell which of the two it is nor prove that a slice exists.
    """
    if x.shape[axis] == size if torch.jit.is_scripting() else _has(x, axis, size):  # type: ignore[attr-defined]
        return x
    return x.index_select(axis, torch.arange(size, device=x.device).clamp(max=x.shape[axis] - 1))


def _has(x: Tensor, axis: int, size: int) -> bool:
    return checks_apply() and x.shape[axis] == size


def _cct_levels(
    levels: str | Sequence[int] | None, skip_levels: tuple[int, ...], depth: int, skip_mode: str
) -> tuple[int, ...]:
    """Spell out the levels that enter the CCT."""
    if levels is None:
        return skip_levels
    chosen = chosen_levels("cct_levels", levels, depth)
    if skip_mode == "remove" and not set(chosen) <= set(skip_levels):
        raise RequestError(
            f"cct_levels={chosen} holds levels whose skip is removed (skip_levels={skip_levels}). Leave them out, or "
            'choose skip_mode="zeros".'
        )
    return chosen


def _level_patches(
    patch: Sequence[int], strides: Sequence[Sequence[int]], levels: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return the patch of each level in voxels of its own map: all cover the same part of the image."""
    deepest = total_stride([(1,) * len(patch), *strides[: levels[-1] - 1]])
    if any(p % s for p, s in zip(patch, deepest, strict=True)):
        raise RequestError(
            f"patch_size={tuple(patch)} does not fit: the map of level {levels[-1]} is smaller than the image by "
            f"{deepest} per axis, and a patch must be a multiple of that."
        )
    scales = [total_stride([(1,) * len(patch), *strides[: level - 1]]) for level in levels]
    return [tuple(p // s for p, s in zip(patch, scale, strict=True)) for scale in scales]


def _axes(option: str, value: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """Spell out one number per axis."""
    spelled = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(spelled) != spatial_dims or min(spelled) < 1:
        raise RequestError(f"{option}={value} must be a number from 1 up, or {spatial_dims} of them (one per axis).")
    return spelled


def _check_counts(**counts: int) -> None:
    for option, count in counts.items():
        if count < 1:
            raise RequestError(f"{option}={count} must be 1 or more.")
