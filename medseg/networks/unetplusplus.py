"""UNet++ (Zhou et al.; DLMIA 2018, arXiv 1807.10165; TMI 2020, arXiv 1912.05074), 2D and 3D.

Written from the equations of the papers. X(i,j) is the node in row i (0 is full resolution) and column j (0 is the
encoder); L is the depth.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from monai.networks.layers import Conv, Pool
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import RequestError
from medseg.networks.blocks import checks_apply, conv_pair, he_init, match_size, upsampler
from medseg.networks.options import check_choice, check_numbers, per_axis
from medseg.networks.sizes import check_bottom, check_image, check_minimum, total_stride

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from medseg.networks.blocks import LayerName
    from medseg.types import TrainingOutput

__all__ = ["LevelSize", "UNetPlusPlus", "preset"]


class LevelSize(NamedTuple):
    """Size of a pruned `UNetPlusPlus`, to choose the level of pruning.

    Attributes:
        level: "1" to "L" for the network pruned to that head, "mean" for the full network with all heads.
        parameters: Number of parameters.
        megabytes: Size of the parameters in memory and on disk, in 10^6 bytes.
    """

    level: str
    parameters: int
    megabytes: float


class UNetPlusPlus(nn.Module):
    """UNet++: nested U-Nets of all depths from 1 to L = `len(features) - 1`.

    Each node has two 3^d convolutions. X(i,0) is the encoder; X(i,j) joins the previous nodes of its row with the
    upsampled X(i+1,j-1), which reduces the semantic gap between encoder and decoder. Head j, a 1^d convolution,
    computes logits from X(0,j) at full resolution and depends only on the nodes with i+k <= j, which `prune` keeps.
    Train all heads with `medseg.components.DeepSupervision`, then choose a head or their mean on validation data.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of image channels.
        out_channels: Number of output channels.
        features: Channels per row, finest first; L + 1 entries, at least two.
        strides: Stride between adjacent rows, finest first, a number or one number per axis, e.g.
            `((1, 2, 2), (2, 2, 2))` for thick slices; 2 by default.
        upsample: "deconv", transposed convolution to the width of the finer row, or "interp", linear interpolation
            with unchanged channels.
        down: Downsampling by "maxpool", or by "conv", strided first convolutions. Max-pooling rounds odd sizes down and
            requires the total stride as minimum size on every axis; strided convolutions round up and require it on one
            axis.
        skip_mode: Skip connections of a node: "dense" to all previous nodes of the row (UNet++), "long" to X(i,0) only
            (an ensemble of U-Nets with a shared encoder, whose last head has no gradient in the inner nodes), "short"
            to X(i,j-1) only (UNet+).
        cat_order: Order of concatenation, "skip_first" or "up_first".
        norm: MONAI factory name or (name, arguments) of the normalization after every 3^d convolution; None as in the
            paper of 2018.
        act: MONAI factory name or (name, arguments) of the activation.
        dropout: Dropout rate (or MONAI factory name and arguments) after every 3^d convolution.
        bias: Whether the 3^d convolutions have a bias.
        up_bias: Whether the transposed convolutions have a bias.
        head_bias: Whether the heads have a bias.
        deep_supervision: Whether to build all heads or only head L.
        output_mode: Output of `forward`, see `set_output`: "head", "mean" or "mean_logits".
        head: Index of the head for "head", 1 (shallowest) to L; L by default.
        head_activation: Activation of the logits for "mean": "sigmoid", or "softmax" for exclusive classes. Optional
            for a single output channel, which always uses "sigmoid".
        interp_align_corners: Whether the interpolation aligns the corner voxels.

    Attributes:
        levels: Indices of the existing heads, shallowest first.
        arguments: Constructor arguments by name; `UNetPlusPlus(**arguments)` builds an equal network.

    Raises:
        RequestError: Unknown or contradictory options.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (32, 64, 128, 256, 512),
        *,
        strides: Sequence[int | Sequence[int]] | None = None,
        upsample: str = "deconv",
        down: str = "maxpool",
        skip_mode: str = "dense",
        cat_order: str = "skip_first",
        norm: LayerName | None = None,
        act: LayerName = "relu",
        dropout: LayerName | float = 0.0,
        bias: bool = True,
        up_bias: bool = True,
        head_bias: bool = True,
        deep_supervision: bool = True,
        output_mode: str = "head",
        head: int | None = None,
        head_activation: str | None = None,
        interp_align_corners: bool = True,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_choice("upsample", upsample, ("deconv", "interp"))
        check_choice("down", down, ("maxpool", "conv"))
        check_choice("skip_mode", skip_mode, ("dense", "long", "short"))
        check_choice("cat_order", cat_order, ("skip_first", "up_first"))
        check_numbers(spatial_dims, features)
        depth = len(features) - 1
        self.arguments = arguments
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.strides = per_axis(strides, depth, spatial_dims)
        self.down = down
        self.levels = tuple(range(1, depth + 1)) if deep_supervision else (depth,)
        self.set_output(output_mode, head=head, head_activation=head_activation)

        self.diagonals = nn.ModuleList(self._diagonal(row) for row in range(depth + 1))
        convolution = Conv[Conv.CONV, spatial_dims]
        self.heads = nn.ModuleDict(
            {str(n): convolution(features[0], out_channels, kernel_size=1, bias=head_bias) for n in self.levels}
        )
        he_init(self)

    @classmethod
    def from_preset(
        cls, name: str, spatial_dims: int, in_channels: int, out_channels: int, **changes: Any
    ) -> UNetPlusPlus:
        """Build a published configuration.

        Args:
            name: Name of the preset, see `preset`.
            spatial_dims: Number of spatial dimensions, 2 or 3.
            in_channels: Number of image channels.
            out_channels: Number of output channels.
            **changes: Arguments that override the preset.

        Raises:
            RequestError: Unknown preset or invalid options.
        """
        return cls(spatial_dims, in_channels, out_channels, **{**preset(name, spatial_dims), **changes})

    def _diagonal(self, row: int) -> _Diagonal:
        """Return the nodes X(row,0), X(row-1,1), .., X(0,row)."""
        its = self.arguments
        dims, features, interp = self.spatial_dims, its["features"], its["upsample"] == "interp"
        options = {name: its[name] for name in ("norm", "act", "dropout", "bias")}
        stride = self.strides[row - 1] if row else (1,) * dims
        pooled = row > 0 and self.down == "maxpool"
        pool = Pool[Pool.MAX, dims](kernel_size=stride, stride=stride) if pooled else nn.Identity()
        channels = features[row - 1] if row else self.in_channels
        encoder = conv_pair(dims, channels, features[row], stride=1 if pooled else stride, **options)
        nodes = nn.ModuleList()
        for column in range(1, row + 1):
            i = row - column
            width = features[i + 1] if interp else features[i]
            up = upsampler(
                *(dims, features[i + 1], width, self.strides[i]),
                mode=its["upsample"],
                bias=its["up_bias"],
                align_corners=its["interp_align_corners"],
            )
            skips = column if its["skip_mode"] == "dense" else 1
            convs = conv_pair(dims, width + skips * features[i], features[i], **options)
            nodes.append(_Node(up, convs, its["skip_mode"], its["cat_order"]))
        return _Diagonal(pool, encoder, nodes)

    def set_output(self, mode: str, *, head: int | None = None, head_activation: str | None = None) -> None:
        """Set the output of `forward`; weights and the `aux` of `forward_train` are unchanged.

        Args:
            mode: "head" (fast mode) returns the logits of one head and computes only the required nodes; "mean"
                (accurate mode) returns the logits of the mean probability of all heads; "mean_logits" returns the mean
                of the logits of all heads.
            head: Index of the head for "head", 1 (shallowest) to L; L by default.
            head_activation: "sigmoid" or "softmax", for "mean"; unchanged by default.

        Raises:
            RequestError: Unknown head or mode, or no activation for several output channels.
        """
        check_choice("output_mode", mode, ("head", "mean", "mean_logits"))
        head_activation = head_activation or self.arguments["head_activation"]
        if head_activation is not None:
            check_choice("head_activation", head_activation, ("sigmoid", "softmax"))
        self._check_output(mode, head, head_activation)
        self.arguments |= {"output_mode": mode, "head": head, "head_activation": head_activation}
        self.output_mode = mode
        self.head = self.levels[-1] if head is None else head
        self.exclusive = head_activation == "softmax"

    def _check_output(self, mode: str, head: int | None, head_activation: str | None) -> None:
        if head is not None and mode != "head":
            raise RequestError(f'head={head} requires output_mode="head"; {mode!r} uses all heads. Remove it.')
        if head is not None and head not in self.levels:
            raise RequestError(f"Unknown head {head}: {self._heads_here()}.")
        if mode != "head" and not self.arguments["deep_supervision"]:
            raise RequestError(
                f"output_mode={mode!r} averages all heads, but deep_supervision=False builds only one. "
                'Choose output_mode="head", or deep_supervision=True and train all heads.'
            )
        if head_activation == "softmax" and self.out_channels == 1:
            raise RequestError(
                'head_activation="softmax" is 1 everywhere for a single output channel; choose "sigmoid", or '
                "out_channels=2."
            )
        if mode == "mean" and head_activation is None and self.out_channels > 1:
            raise RequestError(
                f'output_mode="mean" requires head_activation for {self.out_channels} output channels: choose '
                '"softmax" for exclusive classes, "sigmoid" for overlapping classes.'
            )

    def _heads_here(self) -> str:
        if len(self.levels) == 1 and not self.arguments["deep_supervision"]:
            return f"only head {self.levels[0]} was built (deep_supervision=False)"
        return f"choose one of {', '.join(map(str, self.levels))}"

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, out_channels, *spatial)` according to the output mode.

        Raises:
            SizeError: Invalid input shape; the message names the nearest valid sizes.
        """
        deepest = self.head if self.output_mode == "head" else len(self.strides)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check(x, deepest)
        rows = self._nodes(x, deepest)
        return self._combine(self._apply_heads(rows[0], self.output_mode != "head"))

    def forward_train(self, x: Tensor) -> TrainingOutput:
        """Return `logits`, `aux` and `features`; all nodes are computed in every output mode.

        `aux` contains the logits of all heads at the size of the image, shallowest first. `features` contains the taps
        of the deepest nested U-Net: E1..EL are X(0,0)..X(L-1,0), B is X(L,0), DL..D1 are X(L-1,1)..X(0,L).
        """
        depth = len(self.strides)
        self._check(x, depth)
        rows = self._nodes(x, depth)
        heads = self._apply_heads(rows[0], True)
        chosen = [heads[self.levels.index(self.head)]] if self.output_mode == "head" else heads
        taps = {f"E{i + 1}": rows[i][0] for i in range(depth)}
        taps["B"] = rows[depth][0]
        taps |= {f"D{i + 1}": rows[i][depth - i] for i in reversed(range(depth))}
        return {"logits": self._combine(chosen), "aux": heads, "features": taps}

    def _nodes(self, x: Tensor, deepest: int) -> list[list[Tensor]]:
        """Return the nodes X(i,j) with i+j <= deepest, one list per row i."""
        rows: list[list[Tensor]] = []
        for row, diagonal in enumerate(self.diagonals):
            if row <= deepest:
                diagonal(x if row == 0 else rows[row - 1][0], rows)
        return rows

    def _apply_heads(self, nodes: list[Tensor], every: bool) -> list[Tensor]:
        """Return the logits of all heads or of the selected head, from X(0,0), X(0,1), .."""
        logits: list[Tensor] = []
        for level, head in self.heads.items():
            if every or int(level) == self.head:
                logits.append(head(nodes[int(level)]))
        return logits

    def _combine(self, heads: list[Tensor]) -> Tensor:
        if len(heads) == 1:
            return heads[0]
        if self.output_mode == "mean_logits":
            return torch.stack(heads).mean(0)
        return _logit_of_mean(heads, self.exclusive)

    def _check(self, x: Tensor, deepest: int) -> None:
        if not checks_apply():
            return
        name = type(self).__name__
        check_image(x, name, self.spatial_dims, self.in_channels)
        step = total_stride(self.strides[:deepest])
        if self.down == "conv" and any(n > s for n, s in zip(x.shape[2:], step, strict=True)):
            return  # two voxels or more at the bottom
        check_minimum(x.shape[2:], step, name)
        check_bottom(x, step, self.diagonals[deepest].modules(), name)

    def prune(self, level: int, *, keep_heads: bool = False) -> UNetPlusPlus:
        """Return a pruned network whose output equals that of head `level` bit for bit.

        The network has depth `level` and copies of the nodes X(i,k) with i+k <= level; tensor names are unchanged.

        Args:
            level: Index of the head, 1 to L.
            keep_heads: Whether to keep the shallower heads too, for further training or pruning.

        Raises:
            RequestError: Unknown head.
        """
        if level not in self.levels:
            raise RequestError(f"Cannot prune to level {level}: {self._heads_here()}.")
        changes = {"features": self.arguments["features"][: level + 1], "strides": self.strides[:level]}
        output = {"deep_supervision": keep_heads, "output_mode": "head", "head": None}
        with torch.device("meta"):
            pruned = type(self)(**{**self.arguments, **changes, **output})
        state = self.state_dict()
        pruned.load_state_dict({name: state[name].clone() for name in pruned.state_dict()}, assign=True)
        return pruned.train(self.training)

    def level_sizes(self) -> list[LevelSize]:
        """Return the size of the network pruned to each head, shallowest first, and last the size for the mean."""
        ways: dict[str, Iterable[nn.Module]] = {
            str(level): [*self.diagonals[: level + 1], self.heads[str(level)]] for level in self.levels
        }
        if len(self.levels) > 1:
            ways["mean"] = [self]
        found = []
        for level, modules in ways.items():
            weights = [weight for module in modules for weight in module.parameters()]
            size = sum(weight.numel() * weight.element_size() for weight in weights)
            found.append(LevelSize(level, sum(weight.numel() for weight in weights), size / 1e6))
        return found


class _Diagonal(nn.Module):
    """Nodes X(i,j) with the same i+j, from the encoder node X(i+j,0) to X(0,i+j)."""

    def __init__(self, pool: nn.Module, encoder: nn.Module, nodes: nn.ModuleList) -> None:
        super().__init__()
        self.pool = pool
        self.encoder = encoder
        self.nodes = nodes

    def forward(self, x: Tensor, rows: list[list[Tensor]]) -> None:
        """Append one node to each existing row, and one new row."""
        x = self.encoder(self.pool(x))
        rows.append([x])
        for place, node in enumerate(self.nodes):
            row = rows[len(rows) - 2 - place]
            x = node(x, row)
            row.append(x)


class _Node(nn.Module):
    """Node: upsample the node below, join the previous nodes of the row, and apply two convolutions."""

    def __init__(self, up: nn.Module, convs: nn.Module, skip_mode: str, cat_order: str) -> None:
        super().__init__()
        self.up = up
        self.convs = convs
        self.skip_mode = skip_mode
        self.up_first = cat_order == "up_first"

    def forward(self, below: Tensor, row: list[Tensor]) -> Tensor:
        # Pads voxels lost by pooling, and crops voxels added by strided convolutions (negative padding).
        x = match_size(self.up(below), row[0])
        skips = row
        if self.skip_mode == "long":
            skips = row[:1]
        elif self.skip_mode == "short":
            skips = row[-1:]
        # TorchScript does not support [x, *skips].
        joined = [x] + skips if self.up_first else skips + [x]  # noqa: RUF005
        out: Tensor = self.convs(torch.cat(joined, dim=1))
        return out


def _logit_of_mean(heads: list[Tensor], exclusive: bool) -> Tensor:
    """Return the logits of the mean probability of several logits `(B, C, *spatial)`.

    Computed in log space, since a float32 sigmoid saturates at 1 from logit 17 on.
    """
    z = torch.stack(heads)
    if z.dtype == torch.float16 or z.dtype == torch.bfloat16:
        z = z.float()
    if exclusive:
        mean = torch.logsumexp(F.log_softmax(z, dim=2), dim=0) - math.log(len(heads))
    else:
        mean = torch.logsumexp(F.logsigmoid(z), dim=0) - torch.logsumexp(F.logsigmoid(-z), dim=0)
    return mean.to(heads[0].dtype)


def preset(name: str, spatial_dims: int) -> dict[str, Any]:
    """Return the `UNetPlusPlus` arguments of a published configuration, for example for a config file.

    Args:
        name: "paper2018", the network of the paper (no normalization, transposed convolutions, dropout, mean of the
            heads); "bn_interp", the common port with batch norm and linear interpolation; "nnunet", the authors' later
            version in nnU-Net (depth 5, strided convolutions, instance norm, leaky ReLU, widths up to 480 in 2D and 320
            in 3D).
        spatial_dims: Number of spatial dimensions, 2 or 3.

    Raises:
        RequestError: Unknown preset.
    """
    widest = 480 if spatial_dims == 2 else 320
    presets: dict[str, dict[str, Any]] = {
        "paper2018": {
            "cat_order": "up_first",
            "dropout": 0.5,
            "output_mode": "mean",
            "head_activation": "sigmoid",
        },
        "bn_interp": {"upsample": "interp", "norm": "batch"},
        "nnunet": {
            "features": tuple(min(32 * 2**row, widest) for row in range(6)),
            "down": "conv",
            "norm": ("instance", {"affine": True}),
            "act": ("leakyrelu", {"negative_slope": 0.01}),
            "up_bias": False,
            "head_bias": False,
        },
    }
    check_choice("preset", name, tuple(presets))
    return presets[name]
