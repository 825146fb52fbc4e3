"""U-Net (Ronneberger, Fischer, Brox; MICCAI 2015, arXiv 1505.04597), 2D and 3D."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from monai.networks.layers import Conv, Pool, get_dropout_layer
from torch import Tensor, nn

from medseg.errors import RequestError
from medseg.networks.blocks import (
    activation,
    center_crop,
    checks_apply,
    conv_pair,
    he_init,
    match_size,
    upsampler,
)
from medseg.networks.options import check_choice, check_numbers, chosen_levels, per_axis
from medseg.networks.sizes import ValidSizes, check_bottom, check_image, check_minimum, total_stride

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.networks.blocks import LayerName
    from medseg.types import TrainingOutput

__all__ = ["UNet"]


class UNet(nn.Module):
    """U-Net (2015) with common variations.

    Each of the L = `len(features) - 1` encoder levels has two 3^d convolutions and a max-pooling; the bottleneck has
    two convolutions; each decoder level upsamples, joins the skip connection and applies two convolutions; a 1^d
    convolution computes the logits. The defaults are the network of the paper with padded convolutions
    (`padding="valid"` for the original).

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of image channels.
        out_channels: Number of output channels.
        features: Channels per level, finest first, the bottleneck last; at least two entries.
        strides: Stride of each pooling, finest first, a number or one number per axis, e.g. `((1, 2, 2), (2, 2, 2))`
            for thick slices; 2 by default.
        padding: "same" accepts any size and keeps it; "valid" is the unpadded network of the paper, whose output is
            smaller (see `margin`) and which accepts only certain sizes (section 2).
        upsample: "deconv", transposed convolution, or "interp", linear interpolation.
        skip: Skip connections by concatenation ("cat") or addition ("add"; with "interp", a 1^d convolution before the
            upsampling adapts the channels).
        skip_levels: Levels with a skip connection: "all", "none", or a list of levels, 1 is the finest. Other decoder
            levels use only the upsampled features.
        norm: MONAI factory name or (name, arguments) of the normalization after every 3^d convolution; None as in the
            paper.
        act: MONAI factory name or (name, arguments) of the activation.
        dropout: Dropout rate (or MONAI factory name and arguments) after the deepest encoder level, before its skip
            connection, and after the bottleneck.
        upconv_relu: Whether to apply the activation after each transposed convolution, as in the released network.
        last_upconv_channels: Output channels of the last transposed convolution (128 in the released network);
            `features[0]` by default.
        cat_order: Order of concatenation, "up_first" or "skip_first".
        interp_align_corners: Whether the interpolation aligns the corner voxels.

    Attributes:
        step: Total stride per axis; for "valid" the step between valid sizes.
        margin: Voxels that "valid" loses on each side per axis; zeros for "same".

    Raises:
        RequestError: Unknown or contradictory options.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (64, 128, 256, 512, 1024),
        *,
        strides: Sequence[int | Sequence[int]] | None = None,
        padding: str = "same",
        upsample: str = "deconv",
        skip: str = "cat",
        skip_levels: str | Sequence[int] = "all",
        norm: LayerName | None = None,
        act: LayerName = "relu",
        dropout: LayerName | float = 0.5,
        upconv_relu: bool = False,
        last_upconv_channels: int | None = None,
        cat_order: str = "up_first",
        interp_align_corners: bool = True,
    ) -> None:
        super().__init__()
        check_choice("padding", padding, ("same", "valid"))
        check_choice("upsample", upsample, ("deconv", "interp"))
        check_choice("skip", skip, ("cat", "add"))
        check_choice("cat_order", cat_order, ("up_first", "skip_first"))
        check_numbers(spatial_dims, features)
        _check_upconvolution(upsample, skip, upconv_relu, last_upconv_channels)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.skip_levels = chosen_levels("skip_levels", skip_levels, len(features) - 1)
        self.strides = per_axis(strides, len(features) - 1, spatial_dims)
        self.step = total_stride(self.strides)
        self.valid_sizes = ValidSizes(self.strides) if padding == "valid" else None
        self.margin = tuple(n // 2 for n in self.valid_sizes.shrink) if self.valid_sizes else (0,) * spatial_dims
        options: dict[str, Any] = {"padding": int(padding == "same"), "norm": norm, "act": act}

        self.encoder = nn.ModuleList()
        self.pools = nn.ModuleList()
        channels = in_channels
        for width, stride in zip(features[:-1], self.strides, strict=True):
            self.encoder.append(conv_pair(spatial_dims, channels, width, **options))
            self.pools.append(Pool[Pool.MAX, spatial_dims](kernel_size=stride, stride=stride))
            channels = width
        self.bottleneck = conv_pair(spatial_dims, channels, features[-1], **options)
        if dropout:
            for block in (self.encoder[-1], self.bottleneck):
                block.add_module("dropout", get_dropout_layer(dropout))
        self.decoder = nn.ModuleList()
        up_widths = list(features[1:] if (upsample, skip) == ("interp", "cat") else features[:-1])
        if last_upconv_channels is not None:
            up_widths[0] = last_upconv_channels
        for level in reversed(range(len(up_widths))):
            width, stride = up_widths[level], self.strides[level]
            up = upsampler(
                spatial_dims, features[level + 1], width, stride, mode=upsample, align_corners=interp_align_corners
            )
            if upconv_relu:
                up.append(activation(act))
            join = "none" if level + 1 not in self.skip_levels else cat_order if skip == "cat" else "add"
            joined = width if join in ("none", "add") else width + features[level]
            convs = conv_pair(spatial_dims, joined, features[level], **options)
            self.decoder.append(_DecoderLevel(up, convs, crop=padding == "valid", join=join))
        self.head = Conv[Conv.CONV, spatial_dims](features[0], out_channels, kernel_size=1)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, out_channels, *spatial)`; for "valid", `margin` voxels smaller on each side.

        Raises:
            SizeError: Invalid input shape; the message names the nearest valid sizes.
        """
        skips, x = self._encode(x)
        for level in self.decoder:
            x = level(x, skips.pop())
        logits: Tensor = self.head(x)
        return logits

    def forward_train(self, x: Tensor) -> TrainingOutput:
        """Return `logits` and `features` with the taps E1..En, B, Dn..D1 (see `medseg.types.TrainingOutput`)."""
        skips, bottom = self._encode(x)
        depth = len(skips)
        taps = {f"E{i + 1}": skip for i, skip in enumerate(skips)}
        taps["B"] = x = bottom
        for i, level in enumerate(self.decoder):
            taps[f"D{depth - i}"] = x = level(x, skips[-1 - i])
        return {"logits": self.head(x), "features": taps}

    def _encode(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check(x)
        skips: list[Tensor] = []
        for level, pool in zip(self.encoder, self.pools):  # noqa: B905 - TorchScript knows no `strict`
            x = level(x)
            skips.append(x)
            x = pool(x)
        return skips, self.bottleneck(x)

    def _check(self, x: Tensor) -> None:
        if not checks_apply():
            return
        check_image(x, type(self).__name__, self.spatial_dims, self.in_channels)
        if self.valid_sizes is not None:
            self.valid_sizes.check(x.shape[2:], type(self).__name__)
        else:
            check_minimum(x.shape[2:], self.step, type(self).__name__)
            check_bottom(x, self.step, self.bottleneck.modules(), type(self).__name__)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the spatial size of the logits for an image of spatial size `size`."""
        return tuple(n - 2 * lost for n, lost in zip(size, self.margin, strict=True))


class _DecoderLevel(nn.Module):
    """Decoder level: upsample to the size of the skip connection, join it, and apply two convolutions."""

    def __init__(self, up: nn.Module, convs: nn.Module, *, crop: bool, join: str) -> None:
        super().__init__()
        self.up = up
        self.convs = convs
        self.crop = crop
        self.join = join

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        if self.crop:
            skip = center_crop(skip, x)
        else:
            x = match_size(x, skip)
        if self.join == "add":
            x = x + skip
        elif self.join == "up_first":
            x = torch.cat([x, skip], dim=1)
        elif self.join == "skip_first":
            x = torch.cat([skip, x], dim=1)
        out: Tensor = self.convs(x)
        return out


def _check_upconvolution(upsample: str, skip: str, relu: bool, last_channels: int | None) -> None:
    if upsample == "interp" and (relu or last_channels is not None):
        raise RequestError(
            'upconv_relu and last_upconv_channels require upsample="deconv". Remove them, or choose upsample="deconv".'
        )
    if skip == "add" and last_channels is not None:
        raise RequestError(
            f'last_upconv_channels={last_channels} requires skip="cat", since skip="add" adds feature maps of equal '
            'width. Remove it, or choose skip="cat".'
        )
