"""BA-Net (Wang, Chen, Ji, Fan, Li; arXiv 2005.00966; Medical Image Analysis 78, 102395, 2022), 2D and 3D.

In this boundary-aware context neural network each of the four stages of a dilated ResNet passes three modules: pyramid
edge extraction (PEE), a segmentation and an edge branch that talk to each other (mini-MTL with interactive attention,
IA), and cross feature fusion (CFF) with the other stages. A decoder joins the fused stages and the context of an ASPP.
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

# Where a rate is as large as the map, a dilated kernel meets nothing but padding beside its center.
_ASPP_RATES = {2: (6, 12, 18), 3: (1, 2, 3)}
_STAGES = 4

logger = logging.getLogger(__name__)


class BANet(nn.Module):
    """BA-Net as the articles describe it (`variant="paper"`) or as its authors coded it ("official").

    Edge maps, gates and the fusion of tasks differ between the two: "official" gives the plain local means to PEE
    instead of what the feature exceeds them by, and passes every gate of IA and CFF through a convolution of its own;
    "paper" subtracts, and its gates have no weights.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the logits and of the segmentation maps of the stages.
        backbone: "resnet50", "resnet101" or "resnet152".
        blocks: bottlenecks of the four stages, in place of the backbone's.
        base_width: channels of the stem; the stages have 4, 8, 16 and 32 times as many.
        strides: down-sampling of the stem convolution, of the pooling after it, and of stages 1 to 4; numbers or one
            per axis. The map that decides has the stride of stage 1 (4 by default): for structures of few voxels start
            with 1 instead of 2, for thick slices with `((1, 2, 2), (1, 2, 2), 1, 2, 1, 1)`.
        dilations: of stages 3 and 4 (the first block of a stage takes half).
        multi_grid: dilations of the blocks of stage 4, in turn, in place of that rule; None for the rule. The article
            has `dilations=(2, 2), multi_grid=None`.
        reduce_dim: channels of PEE, mini-MTL, CFF and decoder.
        aspp_dim: channels of the ASPP.
        aspp_rates: dilations of its 3^d branches, numbers or one per axis; "auto" is (6, 12, 18) in 2D and (1, 2, 3) in
            3D, where maps are smaller; None for no ASPP.
        aspp_pool_norm: norm in the ASPP's pooled branch, see `medseg.networks.resnet.ASPP`.
        edge_pool_sizes: per stage the odd sizes of the local means of PEE, in voxels of its map; numbers or one per
            axis, e.g. `(1, 5, 5)`.
        edge_channels: channels of the edge maps; `out_channels` by default.
        variant: "paper" or "official".
        merge: what mini-MTL hands on: "seg", the segmentation branch ("official"); "sum" of both branches ("paper"); or
            "concat", both through a 1^d convolution. None for the variant's own.
        conv_type: of the two branches: "separable" (depthwise 3^d, norm, 1^d, no activation) or "dense" (3^d, norm,
            activation).
        use_pee: PEE; without it a stage is only squeezed to `reduce_dim`.
        use_mtl: mini-MTL; without it there are no maps of the stages.
        use_ia: interactive attention between the branches of mini-MTL.
        use_cff: cross feature fusion.
        use_aspp: the ASPP, as `aspp_rates=None` does.
        norm: MONAI factory name or (name, arguments).
        act: MONAI factory name or (name, arguments).
        pretrained: local file of ResNet weights, see `medseg.networks.resnet.load_pretrained`.

    Attributes:
        step: total stride per axis; an image needs twice as many voxels.

    Raises:
        RequestError: options that contradict each other or are not known.
        WeightsError: the file of `pretrained` is missing or does not fit.
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
            raise RequestError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")
        if len(edge_pool_sizes) != _STAGES:
            raise RequestError(f"edge_pool_sizes={edge_pool_sizes!r} must hold the sizes of each of the 4 stages.")
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
        # Known here, so that a graph holds no resizing that changes nothing.
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
            SizeError: the tensor does not fit this network; names the nearest size that does.
        """
        decoded = self._run(x)[3]
        return resize_like(self.head(decoded[-1]), x)

    def forward_train(self, x: Tensor) -> TrainingOutput:
        """Return `logits`, `aux`, `edges` and `features` (see `medseg.types.TrainingOutput`).

        `aux` and `edges` are the segmentation and edge logits of stages 1 to 4 at the size of the image; without
        mini-MTL they are left out. Taps: `E1..E4` the stages of the encoder, `B` the output of the ASPP (without ASPP
        the deepest stage before its fusion), `D4..D1` the decoder, of which `D1` is read by the last convolutions.
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
        """Return the encoder's stages, their edge and segmentation features, the context and the decoder's maps."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check(x)
        encoded: list[Tensor] = self.backbone(x)
        merged: list[Tensor] = []
        tasks: list[tuple[Tensor, Tensor]] = []
        for i, stage in enumerate(self.stages):  # TorchScript zips no lists of unknown length
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
                f"This {name} divides each axis down by {by(self.step)} and needs two voxels there, an image of "
                f"{by(least)} or more; it got {by(size)}. The nearest size that fits is {by(nearest)}: pad the "
                "image, or give smaller strides."
            )
        if self.aspp is not None:
            self._check_context(self.aspp, len(x), size)

    def _check_context(self, aspp: ASPP, batch: int, size: tuple[int, ...]) -> None:
        name = type(self).__name__
        if batch == 1 and any(isinstance(m, _BatchNorm) and m.training for m in aspp.pool):
            raise SizeError(
                f"This {name} is training with a batch of one image, of which the ASPP's pooled branch leaves one "
                "voxel per channel: its batch norm has no variance there. Give a batch of two or more, or build the "
                "network with aspp_pool_norm=None."
            )
        deepest = [-(-n // s) for n, s in zip(size, self.step, strict=True)]
        wide = [r for r in aspp.rates if any(a >= n > 1 for a, n in zip(r, deepest, strict=True))]
        if wide and not self._warned:
            self._warned = True
            text = (
                f"an image of {by(size)} leaves this {name} a deepest map of {by(deepest)}, on which the ASPP rates "
                f"{', '.join(map(by, wide))} reach into nothing but padding: these branches act like 1^d convolutions. "
                "Give larger images, or smaller aspp_rates"
            )
            warn(logger, "context-exceeds-image", text, run=True)


class _Stage(nn.Module):
    """PEE (or a plain squeeze), then mini-MTL: the merged feature, and those of the edge and segmentation branch."""

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
    """What stands in for CFF where it is switched off."""

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
