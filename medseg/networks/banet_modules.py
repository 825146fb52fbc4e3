"""Modules of BA-Net (arXiv 2005.00966): PEE, interactive attention, mini-MTL and CFF, 2D and 3D."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from monai.networks.layers import Conv, Pad, Pool, get_norm_layer
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import RequestError
from medseg.networks.blocks import ConvUnit, activation
from medseg.networks.options import check_choice
from medseg.networks.resnet import per_axis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.networks.blocks import LayerName

__all__ = [
    "BoxMean",
    "CrossFeatureFusion",
    "InteractiveAttention",
    "MiniMultiTask",
    "PyramidEdgeExtraction",
    "resize_like",
    "separable",
]


class BoxMean(nn.Module):
    """Box filter: mean over a box around each voxel, with zero padding.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        size: Odd box size per axis in voxels.
    """

    def __init__(self, spatial_dims: int, size: Sequence[int]) -> None:
        super().__init__()
        # In 3D a separable filter is several times faster.
        single = [[s if i == axis else 1 for i, s in enumerate(size)] for axis in range(spatial_dims)]
        self.means = nn.Sequential()
        for box in single if spatial_dims == 3 else [list(size)]:
            # Padded explicitly, since 3D pooling does not support feature maps smaller than its kernel.
            self.means.append(
                Pad[Pad.CONSTANTPAD, spatial_dims]([n for s in reversed(box) for n in (s // 2,) * 2], 0.0)
            )
            self.means.append(Pool[Pool.AVG, spatial_dims](tuple(box), stride=1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the filtered feature map, with the shape of `x`."""
        out: Tensor = self.means(x)
        return out


class PyramidEdgeExtraction(nn.Module):
    """Pyramid edge extraction (PEE): reduce a stage and compare it with its local means at several sizes.

    With the reduced feature r: `fuse(r, r - mean_1(r), r - mean_2(r), ..)`; without `subtract` the means themselves,
    which span the same functions (`medseg.networks.convert.banet.subtraction_weight` converts between the two).

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of channels of the stage.
        channels: Number of output channels.
        sizes: Odd box sizes in voxels of the feature map, each a number or one per axis.
        subtract: Whether to subtract the means from the feature, or to use the means.
        norm: MONAI factory name or (name, arguments) of the normalization.
        act: MONAI factory name or (name, arguments) of the activation.

    Raises:
        RequestError: Even size, size below 1, or a number of values that does not match the axes.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: int,
        sizes: Sequence[int | Sequence[int]],
        *,
        subtract: bool = True,
        norm: LayerName = "batch",
        act: LayerName = "relu",
    ) -> None:
        super().__init__()
        boxes = [per_axis("edge_pool_sizes", size, spatial_dims) for size in sizes]
        if any(n % 2 == 0 for box in boxes for n in box):
            raise RequestError(f"invalid sizes {tuple(sizes)} in edge_pool_sizes; expected odd sizes.")
        conv = Conv[Conv.CONV, spatial_dims]
        self.subtract = subtract
        self.reduce = conv(in_channels, channels, kernel_size=1, bias=False)
        self.boxes = nn.ModuleList(BoxMean(spatial_dims, box) for box in boxes)
        self.fuse = nn.Sequential(
            conv((len(boxes) + 1) * channels, channels, kernel_size=1, bias=False),
            activation(act),
            separable(spatial_dims, channels, channels, norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, channels, *spatial)` for a stage `(B, in_channels, *spatial)`."""
        x = self.reduce(x)
        parts = [x]
        for box in self.boxes:
            mean = box(x)
            parts.append(x - mean if self.subtract else mean)
        out: Tensor = self.fuse(torch.cat(parts, dim=1))
        return out


class InteractiveAttention(nn.Module):
    """Interactive attention (IA): each task adds the features of the other task through its reversed gate.

    `E = e + (1 - sigmoid(e)) * g` and `S = g + (1 - sigmoid(g)) * e` with the edge features e and the segmentation
    features g. Learned gates apply a separable convolution before the sigmoid.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        channels: Number of channels of both features.
        learned: Whether the gates have weights.
        norm: MONAI factory name or (name, arguments) of the normalization in learned gates.
    """

    def __init__(self, spatial_dims: int, channels: int, *, learned: bool = False, norm: LayerName = "batch") -> None:
        super().__init__()
        self.edge_gate, self.seg_gate = (
            separable(spatial_dims, channels, channels, norm) if learned else nn.Identity() for _ in range(2)
        )

    def forward(self, edge: Tensor, seg: Tensor) -> tuple[Tensor, Tensor]:
        """Return the updated edge and segmentation features."""
        to_edge = (1 - torch.sigmoid(self.edge_gate(edge))) * seg
        to_seg = (1 - torch.sigmoid(self.seg_gate(seg))) * edge
        return edge + to_edge, seg + to_seg


class MiniMultiTask(nn.Module):
    """Mini multi-task learning (mini-MTL): an edge and a segmentation branch with interactive attention.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        channels: Number of input and output channels.
        seg_channels: Number of channels of the segmentation logits.
        edge_channels: Number of channels of the edge logits.
        learned_gates: Whether the gates have weights, see `InteractiveAttention`.
        use_ia: Whether to use interactive attention between the branches.
        merge: Output, "seg", "sum" or "concat", see `BANet`.
        conv_type: Convolutions of the branches, "separable" or "dense", see `BANet`.
        norm: MONAI factory name or (name, arguments) of the normalization.
        act: MONAI factory name or (name, arguments) of the activation in dense branches.

    Raises:
        RequestError: Unknown option.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        seg_channels: int,
        edge_channels: int,
        *,
        learned_gates: bool = False,
        use_ia: bool = True,
        merge: str = "sum",
        conv_type: str = "separable",
        norm: LayerName = "batch",
        act: LayerName = "relu",
    ) -> None:
        super().__init__()
        check_choice("merge", merge, ("seg", "sum", "concat"))
        check_choice("conv_type", conv_type, ("separable", "dense"))
        conv = Conv[Conv.CONV, spatial_dims]

        def branch() -> nn.Sequential:
            if conv_type == "separable":
                return separable(spatial_dims, channels, channels, norm)
            return ConvUnit(spatial_dims, channels, channels, norm=norm, act=act, bias=False)

        self.merge = merge
        self.edge_branch, self.seg_branch = branch(), branch()
        self.exchange: InteractiveAttention | None = None
        if use_ia:
            self.exchange = InteractiveAttention(spatial_dims, channels, learned=learned_gates, norm=norm)
        self.edge_head = conv(channels, edge_channels, kernel_size=3, padding=1)
        self.seg_head = conv(channels, seg_channels, kernel_size=3, padding=1)
        self.join = conv(2 * channels, channels, kernel_size=1, bias=False) if merge == "concat" else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the merged features, and the inputs of `edge_head` and `seg_head`."""
        edge, seg = self.edge_branch(x), self.seg_branch(x)
        if self.exchange is not None:
            edge, seg = self.exchange(edge, seg)
        if self.merge == "seg":
            return seg, edge, seg
        if self.merge == "sum":
            return edge + seg, edge, seg
        return self.join(torch.cat([edge, seg], dim=1)), edge, seg


class CrossFeatureFusion(nn.Module):
    """Cross feature fusion (CFF): add the gated features of the other stages through the reversed gate of a stage.

    `C_i = F_i + (1 - sigmoid(F_i)) * sum_j sigmoid(F_j) * F_j` over the other stages j, resized to stage i. Learned
    gates apply a 3^d convolution before the sigmoid.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        channels: Number of channels of each stage.
        resize: Whether to resize each of the other stages, finest first.
        learned_gates: Whether the gates have weights.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        *,
        resize: Sequence[bool] = (True, True, True),
        learned_gates: bool = False,
    ) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        gates = [
            conv(channels, channels, kernel_size=3, padding=1, bias=False) if learned_gates else nn.Identity()
            for _ in range(1 + len(resize))
        ]
        self.resize = list(resize)
        self.own_gate = gates[0]
        self.gates = nn.ModuleList(gates[1:])

    def forward(self, own: Tensor, others: list[Tensor]) -> Tensor:
        """Return `own` `(B, channels, *spatial)`, fused with the other stages (finest first)."""
        gathered = torch.zeros_like(own)
        for i, gate in enumerate(self.gates):  # TorchScript cannot zip lists of unknown length
            other = resize_like(others[i], own) if self.resize[i] else others[i]
            gathered = gathered + torch.sigmoid(gate(other)) * other
        return own + (1 - torch.sigmoid(self.own_gate(own))) * gathered


def separable(spatial_dims: int, in_channels: int, out_channels: int, norm: LayerName) -> nn.Sequential:
    """Return a depthwise 3^d convolution, a norm and a 1^d convolution, without bias and activation."""
    conv = Conv[Conv.CONV, spatial_dims]
    return nn.Sequential(
        conv(in_channels, in_channels, kernel_size=3, padding=1, groups=in_channels, bias=False),
        get_norm_layer(norm, spatial_dims=spatial_dims, channels=in_channels),
        conv(in_channels, out_channels, kernel_size=1, bias=False),
    )


def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """Resize a feature map to the spatial size of another by linear interpolation with aligned corners."""
    mode = "bilinear" if x.dim() == 4 else "trilinear"
    return F.interpolate(x, size=like.shape[2:], mode=mode, align_corners=True)
