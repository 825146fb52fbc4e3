"""UCTransNet (Wang, Cao, Wang, Zaiane; AAAI 2022, arXiv 2109.04335), 2D and 3D.

Written from the equations of the paper; details that the paper leaves open follow the released weights. Levels are
numbered from 1 (full resolution) to n; C_i is the number of channels of level i and C the sum over the CCT levels.
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

# Default image size of the position embeddings.
_NATIVE_SIDE = {2: 224, 3: 96}


class UCTransNet(nn.Module):
    """U-Net with a channel-wise cross-fusion transformer (`CCT`) and channel attention (`CCA`) in its skip connections.

    The n = `len(features) - 1` encoder feature maps are divided into the same number of tokens, attend to each other's
    channels, and are restored to their size; each is then gated by the decoder feature map that it joins. The defaults
    are the network of the paper. Images of any size from one patch on are supported: they are padded to whole patches
    by repeating the last voxels, and the logits are cropped.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of image channels.
        out_channels: Number of output channels.
        features: Channels per level, finest first, the bottleneck last; at least two entries.
        img_size: Image size of the position embeddings in voxels, one number or one per axis; preferably the size of
            the training patches. For other sizes the embeddings are interpolated. 224 in 2D (as in the paper) and 96 in
            3D by default.
        patch_size: Size of a token in image voxels, one number or one per axis; must be divisible by the total stride
            of every level in the CCT.
        strides: Stride of each pooling, finest first, a number or one number per axis, e.g. `((1, 2, 2), 2, 2, 2)` for
            thick slices; 2 by default.
        num_heads: Number of attention heads, each with the full width of the level.
        num_layers: Number of transformer layers.
        mlp_ratio: Hidden width of the MLPs relative to the channels of the level.
        embed_dropout: Dropout rate after the position embeddings.
        attn_dropout: Dropout rate of the attention maps and of the attention output.
        mlp_dropout: Dropout rate after both layers of each MLP.
        norm: MONAI factory name or (name, arguments) of the normalization after every convolution of backbone and
            reconstruction.
        act: MONAI factory name or (name, arguments) of the activation after these convolutions.
        upsample: "nearest", nearest-neighbor interpolation, or "deconv", transposed convolution.
        backbone: "paper" has a single convolution at level 1, and decoder levels reduce to the width of the next finer
            level. "unet" has the widths of `UNet`, whose weights can be transferred (see `transfer_unet`).
        skip_levels: Levels with a skip connection: "all", "none", or a list of levels, 1 is the finest.
        skip_mode: Treatment of levels without skip connection: "remove" them from the first decoder convolution, or
            replace them by "zeros", so that the same weights can be evaluated with every choice.
        cct_levels: Levels in the CCT (queries, keys and values); `skip_levels` by default. Other skip connections
            bypass it. With `skip_mode="remove"` these must be levels with a skip connection.
        use_cct: Whether to use the CCT.
        use_cca: Whether to use the CCA.
        pos_embed: Position embeddings, "learned" or "none".

    Attributes:
        step: Divisor of the image size per axis; images of other sizes are padded.

    Raises:
        RequestError: Unknown or contradictory options.
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
        # A list, since TorchScript cannot iterate over a tuple of unknown length.
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
            SizeError: Invalid input shape; the message names the nearest valid size.
        """
        image = x
        maps = self._encode(image)
        x = maps.pop()
        maps = self._fuse(maps)
        for level in self.decoder:
            x = level(x, maps.pop())
        return _cut(self.head(x), image)

    def forward_train(self, x: Tensor) -> TrainingOutput:
        """Return `logits` and `features` with the taps E1..En, B, Dn..D1 (see `medseg.types.TrainingOutput`).

        The encoder taps precede CCT and CCA. All taps have the size of the padded image if `step` does not divide it.
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
        """Return the channel attention of each transformer layer.

        Args:
            x: Image `(B, in_channels, *spatial)`.

        Returns:
            Attention `(B, C_i, C)` by level for each layer, averaged over the heads, before dropout; rows sum to 1. An
            empty list without CCT.
        """
        maps = self._encode(x)
        if self.cct is None:
            return []
        layers = self.cct.attention_maps([maps[i] for i in self.fused])
        return [dict(zip(self.cct_levels, layer, strict=True)) for layer in layers]

    def transfer(self, state: Mapping[str, Tensor], *, cat_order: str | None = None) -> Transfer:
        """Initialize the network from a trained U-Net; arguments and errors as in `transfer_unet`."""
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
    """Channel-wise cross attention, Eq. (5) of the paper: gates the channels of a skip connection by the decoder.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        skip_channels: Number of channels of the skip connection.
        up_channels: Number of channels of the upsampled decoder feature map.
    """

    def __init__(self, spatial_dims: int, skip_channels: int, up_channels: int) -> None:
        super().__init__()
        self.axes = list(range(2, spatial_dims + 2))
        self.skip = nn.Linear(skip_channels, skip_channels)
        self.up = nn.Linear(up_channels, skip_channels)

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        """Return the gated skip connection, with the shape of `skip`."""
        gate = (self.skip(skip.mean(self.axes)) + self.up(up.mean(self.axes))) / 2
        gate = gate.sigmoid()
        for axis in self.axes:
            gate = gate.unsqueeze(axis)
        return F.relu(skip * gate, inplace=True)


class _DecoderLevel(nn.Module):
    """Decoder level: upsample, gate and join the skip connection, and apply two convolutions.

    `widths` are the channels of input, skip connection and output; `join` is "cat", "remove" or "zeros".
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
    """Pad each axis to a multiple of `step` by repeating the last voxels."""
    for axis in range(2, x.dim()):
        n, s = x.shape[axis], step[axis - 2]
        x = _take(x, axis, (n + s - 1) // s * s)
    return x


def _cut(x: Tensor, like: Tensor) -> Tensor:
    """Crop the padding of `_extend`."""
    for axis in range(2, x.dim()):
        x = _take(x, axis, like.shape[axis])
    return x


def _take(x: Tensor, axis: int, size: int) -> Tensor:
    """Crop an axis to `size` voxels, or pad it by repeating the last voxel.

    Implemented by indexing, since an exported graph for dynamic sizes can neither branch nor prove that a slice exists.
    """
    if x.shape[axis] == size if torch.jit.is_scripting() else _has(x, axis, size):  # type: ignore[attr-defined]
        return x
    return x.index_select(axis, torch.arange(size, device=x.device).clamp(max=x.shape[axis] - 1))


def _has(x: Tensor, axis: int, size: int) -> bool:
    return checks_apply() and x.shape[axis] == size


def _cct_levels(
    levels: str | Sequence[int] | None, skip_levels: tuple[int, ...], depth: int, skip_mode: str
) -> tuple[int, ...]:
    """Return the levels in the CCT."""
    if levels is None:
        return skip_levels
    chosen = chosen_levels("cct_levels", levels, depth)
    if skip_mode == "remove" and not set(chosen) <= set(skip_levels):
        raise RequestError(
            f"invalid cct_levels={chosen}: some levels have no skip connection (skip_levels={skip_levels}). Remove "
            'them, or choose skip_mode="zeros".'
        )
    return chosen


def _level_patches(
    patch: Sequence[int], strides: Sequence[Sequence[int]], levels: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return the patch size of each level in voxels of its feature map."""
    deepest = total_stride([(1,) * len(patch), *strides[: levels[-1] - 1]])
    if any(p % s for p, s in zip(patch, deepest, strict=True)):
        raise RequestError(
            f"invalid patch_size={tuple(patch)}; expected a multiple of {deepest} per axis, the total stride of level "
            f"{levels[-1]}."
        )
    scales = [total_stride([(1,) * len(patch), *strides[: level - 1]]) for level in levels]
    return [tuple(p // s for p, s in zip(patch, scale, strict=True)) for scale in scales]


def _axes(option: str, value: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """Return one number per axis."""
    spelled = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(spelled) != spatial_dims or min(spelled) < 1:
        raise RequestError(
            f"invalid {option}={value}; expected an integer of at least 1, or {spatial_dims} of them (one per axis)."
        )
    return spelled


def _check_counts(**counts: int) -> None:
    for option, count in counts.items():
        if count < 1:
            raise RequestError(f"{option}={count}: expected at least 1.")
