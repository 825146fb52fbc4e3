"""BA-Net (Wang, Chen, Ji, Fan, Li; arXiv 2005.00966; Medical Image Analysis 78, 102395, 2022), 2D and 3D.

Boundary-aware context neural network. Each of the four stages of a dilated ResNet is followed by three modules: pyramid
edge extraction (PEE), mini multi-task learning (mini-MTL) of a segmentation and an edge branch with interactive
attention (IA), and cross feature fusion (CFF) with the other stages. A decoder joins the fused stages and an ASPP.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from monai.networks.layers import Conv, get_norm_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medseg.errors import RequestError, SizeError, by
from medseg.networks.banet_modules import (
    CrossFeatureFusion,
    MiniMultiTask,
    PyramidEdgeExtraction,
    resize_like,
    separable,
)
from medseg.networks.blocks import activation, checks_apply
from medseg.networks.options import check_choice
from medseg.networks.resnet import ASPP, BLOCKS, ResNetDilated, load_pretrained
from medseg.networks.sizes import check_image
from medseg.notices import warn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from medseg.networks.blocks import LayerName
    from medseg.types import TrainingOutput

__all__ = ["BANet"]

# A dilated kernel whose rate exceeds the feature map covers only padding besides its center.
_ASPP_RATES = {2: (6, 12, 18), 3: (1, 2, 3)}
_STAGES = 4

logger = logging.getLogger(__name__)


class BANet(nn.Module):
    """BA-Net as described in the articles (`variant="paper"`) or as in the authors' code ("official").

    The variants differ in edge maps, gates and task fusion: in "official" PEE uses the local means, and every gate of
    IA and CFF has a convolution; in "paper" PEE subtracts the local means from the features, and gates have no weights.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of image channels.
        out_channels: Number of channels of the logits and of the segmentation maps of the stages.
        backbone: "resnet50", "resnet101" or "resnet152".
        blocks: Number of blocks of the four stages, overriding those of the backbone.
        base_width: Channels of the stem; the stages have 4, 8, 16 and 32 times as many.
        strides: Strides of the stem convolution, the stem pooling, and stages 1 to 4, each a number or one per axis.
            The output resolution is that of stage 1 (stride 4 by default): for small structures start with 1 instead of
            2, for thick slices use `((1, 2, 2), (1, 2, 2), 1, 2, 1, 1)`.
        dilations: Dilations of stages 3 and 4 (the first block of a stage uses half).
        multi_grid: Dilations of the blocks of stage 4, repeated cyclically, instead of `dilations[1]`; None to use
            `dilations`. The article has `dilations=(2, 2), multi_grid=None`.
        reduce_dim: Channels of PEE, mini-MTL, CFF and decoder.
        aspp_dim: Channels of the ASPP.
        aspp_rates: Dilations of the 3^d branches of the ASPP, each a number or one per axis; "auto" is (6, 12, 18) in
            2D and (1, 2, 3) in 3D, where feature maps are smaller; None for no ASPP.
        aspp_pool_norm: Normalization in the global pooling branch of the ASPP, see `medseg.networks.resnet.ASPP`.
        edge_pool_sizes: Odd sizes of the local means of PEE for each stage, in voxels of its feature map, each a number
            or one per axis, e.g. `(1, 5, 5)`.
        edge_channels: Channels of the edge maps; `out_channels` by default.
        variant: "paper" or "official".
        merge: Output of mini-MTL: "seg", the segmentation branch (default of "official"); "sum" of both branches
            (default of "paper"); or "concat", both with a 1^d convolution. None for the default of the variant.
        conv_type: Convolutions of the two branches: "separable" (depthwise 3^d, norm, 1^d, no activation) or "dense"
            (3^d, norm, activation).
        use_pee: Whether to use PEE; otherwise a 1^d convolution reduces each stage to `reduce_dim`.
        use_mtl: Whether to use mini-MTL; otherwise there are no segmentation and edge maps of the stages.
        use_ia: Whether to use interactive attention between the branches of mini-MTL.
        use_cff: Whether to use cross feature fusion.
        use_aspp: Whether to use the ASPP; False equals `aspp_rates=None`.
        norm: MONAI factory name or (name, arguments) of the normalization.
        act: MONAI factory name or (name, arguments) of the activation.
        pretrained: Local file of ResNet weights, see `medseg.networks.resnet.load_pretrained`.

    Attributes:
        step: Total stride per axis; the minimum image size is twice as large.

    Raises:
        RequestError: Unknown or contradictory options.
        WeightsError: Missing or mismatched file of `pretrained`.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        backbone: str = "resnet50",
        *,
        blocks: Sequence[int] | None = None,
        base_width: int = 64,
        strides: Sequence[int | Sequence[int]] = (2, 2, 1, 2, 1, 1),
        dilations: Sequence[int] = (2, 4),
        multi_grid: Sequence[int] | None = (4, 4, 4),
        reduce_dim: int = 128,
        aspp_dim: int = 256,
        aspp_rates: str | Sequence[int | Sequence[int]] | None = "auto",
        aspp_pool_norm: LayerName | None = "auto",
        edge_pool_sizes: Sequence[Sequence[int | Sequence[int]]] = ((5, 7), (5, 7), (3, 5), (3, 5)),
        edge_channels: int | None = None,
        variant: str = "paper",
        merge: str | None = None,
        conv_type: str = "separable",
        use_pee: bool = True,
        use_mtl: bool = True,
        use_ia: bool = True,
        use_cff: bool = True,
        use_aspp: bool = True,
        norm: LayerName = "batch",
        act: LayerName = "relu",
        pretrained: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        check_choice("variant", variant, ("paper", "official"))
        check_choice("backbone", backbone, tuple(BLOCKS))
        if spatial_dims not in (2, 3):
            raise RequestError(f"invalid spatial_dims={spatial_dims!r}; expected 2 or 3.")
        if len(edge_pool_sizes) != _STAGES:
            raise RequestError(
                f"invalid edge_pool_sizes={edge_pool_sizes!r}; expected the sizes of each of the 4 stages."
            )
        official = variant == "official"
        edges = out_channels if edge_channels is None else edge_channels
        style: dict[str, Any] = {"norm": norm, "act": act}
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.backbone = ResNetDilated(
            spatial_dims,
            in_channels,
            BLOCKS[backbone] if blocks is None else blocks,
            base_width=base_width,
            strides=strides,
            dilations=dilations,
            multi_grid=multi_grid,
            **style,
        )
        self.step = self.backbone.stage_strides[-1]

        def stage(channels: int, sizes: Sequence[int | Sequence[int]]) -> _Stage:
            squeeze: nn.Module = Conv[Conv.CONV, spatial_dims](channels, reduce_dim, kernel_size=1, bias=False)
            if use_pee:
                options = {"subtract": not official, **style}
                squeeze = PyramidEdgeExtraction(spatial_dims, channels, reduce_dim, sizes, **options)
            if not use_mtl:
                return _Stage(squeeze, None)
            options = {"learned_gates": official, "use_ia": use_ia, "conv_type": conv_type, **style}
            options["merge"] = merge or ("seg" if official else "sum")
            return _Stage(squeeze, MiniMultiTask(spatial_dims, reduce_dim, out_channels, edges, **options))

        self.stages = nn.ModuleList(map(stage, self.backbone.channels, edge_pool_sizes))
        # Determined here, so that an exported graph contains no redundant resizing.
        places = self.backbone.stage_strides
        self.enlarge = [coarse != fine for coarse, fine in zip(places[:0:-1], places[-2::-1], strict=True)]

        def fusion(place: tuple[int, ...], others: list[tuple[int, ...]]) -> nn.Module:
            if not use_cff:
                return _Own()
            resize = [other != place for other in others]
            return CrossFeatureFusion(spatial_dims, reduce_dim, resize=resize, learned_gates=official)

        self.fusions = nn.ModuleList(fusion(places[i], places[:i] + places[i + 1 :]) for i in range(_STAGES))

        self.aspp: ASPP | None = None
        self.mix: nn.Sequential | None = None
        rates = _rates(aspp_rates, spatial_dims)
        if use_aspp and rates is not None:
            deepest = self.backbone.channels[-1]
            self.aspp = ASPP(spatial_dims, deepest, aspp_dim, rates, pool_norm=aspp_pool_norm, **style)
            self.mix = _decoder_block(spatial_dims, reduce_dim + aspp_dim, reduce_dim, **style)
        self.decoder = nn.ModuleList(
            _decoder_block(spatial_dims, 2 * reduce_dim, reduce_dim, **style) for _ in range(_STAGES - 1)
        )
        self.head = nn.Sequential(
            Conv[Conv.CONV, spatial_dims](reduce_dim, reduce_dim, kernel_size=3, padding=1),
            get_norm_layer(norm, spatial_dims=spatial_dims, channels=reduce_dim),
            activation(act),
            Conv[Conv.CONV, spatial_dims](reduce_dim, out_channels, kernel_size=1),
        )
        self._warned = False
        if pretrained is not None:
            load_pretrained(self.backbone, pretrained)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, out_channels, *spatial)`.

        Raises:
            SizeError: Invalid input shape; the message names the nearest valid size.
        """
        decoded = self._run(x)[3]
        return resize_like(self.head(decoded[-1]), x)

    def forward_train(self, x: Tensor) -> TrainingOutput:
        """Return `logits`, `aux`, `edges` and `features` (see `medseg.types.TrainingOutput`).

        `aux` and `edges` are the segmentation and edge logits of stages 1 to 4 at the size of the image; they are
        omitted without mini-MTL. The taps are the stages of the encoder `E1..E4`, the output of the ASPP `B` (without
        ASPP the deepest stage before its fusion), and the decoder `D4..D1`, where `D1` is the input of the head.
        """
        encoded, tasks, bottom, decoded = self._run(x)
        taps = {f"E{i + 1}": feature for i, feature in enumerate(encoded)}
        taps["B"] = bottom
        taps |= {f"D{_STAGES - i}": feature for i, feature in enumerate(decoded)}
        output: TrainingOutput = {"logits": resize_like(self.head(decoded[-1]), x), "features": taps}
        heads: list[Any] = [stage.tasks for stage in self.stages if stage.tasks is not None]
        if heads:
            output["aux"] = [resize_like(h.seg_head(seg), x) for h, (_, seg) in zip(heads, tasks, strict=True)]
            output["edges"] = [resize_like(h.edge_head(edge), x) for h, (edge, _) in zip(heads, tasks, strict=True)]
        return output

    def _run(self, x: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], Tensor, list[Tensor]]:
        """Return the encoder stages, their edge and segmentation features, the context and the decoder feature maps."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check(x)
        encoded: list[Tensor] = self.backbone(x)
        merged: list[Tensor] = []
        tasks: list[tuple[Tensor, Tensor]] = []
        for i, stage in enumerate(self.stages):  # TorchScript cannot zip lists of unknown length
            both, edge, seg = stage(encoded[i])
            merged.append(both)
            tasks.append((edge, seg))
        fused: list[Tensor] = []
        for i, fusion in enumerate(self.fusions):
            fused.append(fusion(merged[i], merged[:i] + merged[i + 1 :]))
        bottom = merged[-1]
        deepest = fused[-1]
        if self.aspp is not None and self.mix is not None:
            bottom = self.aspp(encoded[-1])
            deepest = self.mix(torch.cat([deepest, bottom], dim=1))
        decoded = [deepest]
        for i, block in enumerate(self.decoder):
            own = fused[2 - i]
            coarse = resize_like(decoded[-1], own) if self.enlarge[i] else decoded[-1]
            decoded.append(block(torch.cat([own, coarse], dim=1)))
        return encoded, tasks, bottom, decoded

    def _check(self, x: Tensor) -> None:
        if not checks_apply():
            return
        name = type(self).__name__
        check_image(x, name, self.spatial_dims, self.in_channels)
        size = tuple(x.shape[2:])
        least = [2 * s for s in self.step]
        if any(n < m for n, m in zip(size, least, strict=True)):
            nearest = [max(n, m) for n, m in zip(size, least, strict=True)]
            raise SizeError(
                f"Image too small: this {name} downsamples by {by(self.step)} and needs at least {by(least)} voxels, "
                f"found {by(size)}. The nearest valid size is {by(nearest)}: pad the image, or use smaller strides."
            )
        if self.aspp is not None:
            self._check_context(self.aspp, len(x), size)

    def _check_context(self, aspp: ASPP, batch: int, size: tuple[int, ...]) -> None:
        name = type(self).__name__
        if batch == 1 and any(isinstance(m, _BatchNorm) and m.training for m in aspp.pool):
            raise SizeError(
                f"Batch too small: in training, the global pooling branch of the ASPP in this {name} has one voxel per "
                "image, so its batch norm has no variance for a batch of one. Use a batch size of at least 2, or "
                "aspp_pool_norm=None."
            )
        deepest = [-(-n // s) for n, s in zip(size, self.step, strict=True)]
        wide = [r for r in aspp.rates if any(a >= n > 1 for a, n in zip(r, deepest, strict=True))]
        if wide and not self._warned:
            self._warned = True
            text = (
                f"ASPP rates {', '.join(map(by, wide))} exceed the deepest feature map of {by(deepest)} of this {name} "
                f"for an image of {by(size)}: these branches act like 1^d convolutions. Use larger images, or smaller "
                "aspp_rates"
            )
            warn(logger, "context-exceeds-image", text, run=True)


class _Stage(nn.Module):
    """PEE (or a 1^d convolution) and mini-MTL; returns the merged, the edge and the segmentation features."""

    def __init__(self, squeeze: nn.Module, tasks: MiniMultiTask | None) -> None:
        super().__init__()
        self.squeeze = squeeze
        self.tasks = tasks

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.squeeze(x)
        if self.tasks is None:
            return x, x, x
        out: tuple[Tensor, Tensor, Tensor] = self.tasks(x)
        return out


class _Own(nn.Module):
    """Replacement for CFF if it is disabled."""

    def forward(self, own: Tensor, others: list[Tensor]) -> Tensor:
        return own


def _decoder_block(
    spatial_dims: int, in_channels: int, out_channels: int, *, norm: LayerName, act: LayerName
) -> nn.Sequential:
    return nn.Sequential(activation(act), *separable(spatial_dims, in_channels, out_channels, norm))


def _rates(
    rates: str | Sequence[int | Sequence[int]] | None, spatial_dims: int
) -> Sequence[int | Sequence[int]] | None:
    if not isinstance(rates, str):
        return rates
    check_choice("aspp_rates", rates, ("auto",))
    return _ASPP_RATES[spatial_dims]
