"""Channel-wise cross-fusion transformer (CCT) of UCTransNet (arXiv 2109.04335), 2D and 3D.

C_i is the number of channels of level i, C the sum over all levels.
"""

from __future__ import annotations

import logging
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, cast

import torch
from monai.networks.layers import Conv, get_norm_layer
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import by
from medseg.networks.blocks import activation, checks_apply
from medseg.notices import warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.networks.blocks import LayerName

__all__ = ["CCT", "Enlarge"]

logger = logging.getLogger(__name__)


class CCT(nn.Module):
    """Channel-wise cross-fusion transformer: each level attends to the channels of all levels; shapes are unchanged.

    Args:
        widths: Number of channels C_i of each level.
        patches: Patch size of each level in voxels of its feature map per axis, such that all levels have the same
            token grid.
        grid: Size of the token grid of the position embeddings.
        num_heads: Number of attention heads.
        num_layers: Number of transformer layers.
        mlp_ratio: Hidden width of the MLPs relative to the channels of the level.
        dropout: Dropout rates after the position embeddings, in the attention, and in the MLPs.
        pos_embed: Position embeddings, "learned" or "none".
        norm: MONAI factory name or (name, arguments) of the normalization in the reconstruction.
        act: MONAI factory name or (name, arguments) of the activation in the reconstruction.
    """

    def __init__(
        self,
        widths: Sequence[int],
        patches: Sequence[Sequence[int]],
        grid: Sequence[int],
        *,
        num_heads: int = 4,
        num_layers: int = 4,
        mlp_ratio: float = 4,
        dropout: tuple[float, float, float] = (0.1, 0.1, 0.0),
        pos_embed: str = "learned",
        norm: LayerName | None = "batch",
        act: LayerName = "relu",
    ) -> None:
        super().__init__()
        embed_dropout, attn_dropout, mlp_dropout = dropout
        table = grid if pos_embed == "learned" else None
        self.embeddings = nn.ModuleList(
            _Embedding(width, patch, table, embed_dropout) for width, patch in zip(widths, patches, strict=True)
        )
        self.layers = nn.ModuleList(
            _Layer(widths, num_heads, mlp_ratio, attn_dropout, mlp_dropout) for _ in range(num_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for width in widths)
        self.reconstructions = nn.ModuleList(
            _Reconstruction(width, patch, norm, act) for width, patch in zip(widths, patches, strict=True)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return feature maps of the same shapes, each with the output of the attention added."""
        grids = self._embed(maps)
        tokens = [_tokens(grid) for grid in grids]
        for layer in self.layers:
            tokens = layer(tokens)
        fused: list[Tensor] = []
        for i, (norm, rebuild) in enumerate(zip(self.norms, self.reconstructions)):  # noqa: B905 - TorchScript knows no `strict`
            # Contiguous, or an exported graph would be specialized to the strides of the example size.
            grid = norm(tokens[i]).transpose(1, 2).contiguous().reshape(grids[i].shape)
            fused.append(rebuild(grid) + maps[i])
        return fused

    def attention_maps(self, maps: list[Tensor]) -> list[list[Tensor]]:
        """Return the attention `(B, C_i, C)` per layer and level, averaged over the heads, before dropout."""
        tokens = [_tokens(grid) for grid in self._embed(maps)]
        found = []
        for layer in cast("list[_Layer]", self.layers):
            found.append([weights.mean(1) for weights in layer.attention.maps(*layer.normalized(tokens))])
            tokens = layer(tokens)
        return found

    def _embed(self, maps: list[Tensor]) -> list[Tensor]:
        grids: list[Tensor] = []
        for i, embedding in enumerate(self.embeddings):
            grids.append(embedding(maps[i]))
        return grids


class _Embedding(nn.Module):
    """Patch embedding of a feature map to a token grid `(B, C_i, *grid)`, with position embeddings.

    The position embeddings `(1, tokens, C_i)`, in row-major order as in the released weights, are interpolated linearly
    for other grids.
    """

    def __init__(self, width: int, patch: Sequence[int], grid: Sequence[int] | None, dropout: float) -> None:
        super().__init__()
        self.patches = Conv[Conv.CONV, len(patch)](width, width, kernel_size=tuple(patch), stride=tuple(patch))
        self.grid = list(grid or ())
        self.mode = "bilinear" if len(patch) == 2 else "trilinear"
        self.position_embeddings = None if grid is None else nn.Parameter(torch.zeros(1, prod(grid), width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        table = self.position_embeddings
        if table is not None:
            positions = torch.unflatten(table.transpose(1, 2), 2, self.grid)
            native = list(x.shape[2:]) == self.grid if torch.jit.is_scripting() else self._is_native(x)  # type: ignore[attr-defined]
            if not native:
                positions = F.interpolate(positions, size=x.shape[2:], mode=self.mode, align_corners=False)
            x = x + positions
        dropped: Tensor = self.dropout(x)
        return dropped

    def _is_native(self, x: Tensor) -> bool:
        # An exported graph always interpolates, which is exact on the native grid.
        return checks_apply() and list(x.shape[2:]) == self.grid

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}position_embeddings"
        table = state_dict.get(name)
        if isinstance(table, Tensor) and self.position_embeddings is not None and table.dim() == 3:
            source = _same_form(self.grid, table.shape[1])
            if source is not None and source != self.grid:
                text = f"{name}: position embeddings interpolated from {by(source)} to {by(self.grid)} tokens"
                warn(logger, "positions-interpolated", text, run=True)
                spread = table.transpose(1, 2).reshape(1, -1, *source)
                spread = F.interpolate(spread, size=self.grid, mode=self.mode, align_corners=False)
                state_dict[name] = _tokens(spread)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Layer(nn.Module):
    """Channel-wise cross attention and one MLP per level, each with pre-norm and residual connection."""

    def __init__(
        self, widths: Sequence[int], num_heads: int, mlp_ratio: float, attn_dropout: float, mlp_dropout: float
    ) -> None:
        super().__init__()
        self.query_norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for width in widths)
        self.context_norm = nn.LayerNorm(sum(widths), eps=1e-6)
        self.attention = _ChannelAttention(widths, num_heads, attn_dropout)
        self.mlps = nn.ModuleList(_mlp(width, round(mlp_ratio * width), mlp_dropout) for width in widths)

    def forward(self, tokens: list[Tensor]) -> list[Tensor]:
        queries, context = self.normalized(tokens)
        changes = self.attention(queries, context)
        updated: list[Tensor] = []
        for i, mlp in enumerate(self.mlps):
            x = tokens[i] + changes[i]
            updated.append(x + mlp(x))
        return updated

    def normalized(self, tokens: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the normalized queries per level, and the normalized concatenation of all levels."""
        queries: list[Tensor] = []
        for i, norm in enumerate(self.query_norms):
            queries.append(norm(tokens[i]))
        return queries, self.context_norm(torch.cat(tokens, dim=2))


class _ChannelAttention(nn.Module):
    """Multi-head attention over channels; the attention map of a head is C_i x C for any number of tokens.

    Heads do not split the channels; each has the full width of its level. The projections of all heads are fused.
    """

    def __init__(self, widths: Sequence[int], num_heads: int, dropout: float) -> None:
        super().__init__()
        context = sum(widths)
        self.num_heads = num_heads
        self.scale = 1 / sqrt(context)
        self.queries = nn.ModuleList(nn.Linear(width, num_heads * width, bias=False) for width in widths)
        self.key = nn.Linear(context, num_heads * context, bias=False)
        self.value = nn.Linear(context, num_heads * context, bias=False)
        self.outputs = nn.ModuleList(nn.Linear(width, width, bias=False) for width in widths)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: list[Tensor], context: Tensor) -> list[Tensor]:
        maps = self.maps(queries, context)
        value = self.value(context)
        changes: list[Tensor] = []
        for i, output in enumerate(self.outputs):
            # One matrix product sums over the channels of all heads.
            weights = self.dropout(maps[i]).transpose(2, 3).flatten(1, 2)
            changes.append(self.dropout(output(value @ weights.to(value.dtype) / self.num_heads)))
        return changes

    def maps(self, queries: list[Tensor], context: Tensor) -> list[Tensor]:
        """Return the attention maps of each level, `(B, heads, C_i, C)`."""
        key = self.key(context)
        found: list[Tensor] = []
        for i, project in enumerate(self.queries):
            query = project(queries[i])
            if torch.jit.is_scripting():  # type: ignore[attr-defined]
                found.append(_channel_map(query, key, self.num_heads, self.scale))
            else:
                found.append(_precise_channel_map(query, key, self.num_heads, self.scale))
        return found


def _precise_channel_map(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Return the attention map computed in float32 under autocast, since the scores sum over all tokens."""
    if query.is_meta or not torch.is_autocast_enabled(query.device.type):
        return _channel_map(query, key, heads, scale)
    with torch.autocast(query.device.type, enabled=False):
        return _channel_map(query.float(), key.float(), heads, scale)


def _channel_map(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Return softmax(norm(Q^T K / sqrt(C))), `(B, heads, C_i, C)`, for Q and K `(B, tokens, heads * channels)`."""
    query = torch.unflatten(query, 2, [heads, -1]).permute(0, 2, 3, 1)
    key = torch.unflatten(key, 2, [heads, -1]).transpose(1, 2)
    scores = query * scale @ key
    # Instance norm per sample and head, computed as layer norm over the last two axes.
    return F.layer_norm(scores, scores.shape[2:], eps=1e-5).softmax(dim=3)


class _Reconstruction(nn.Module):
    """Reconstruction of a feature map from tokens: 1^d convolution, norm, activation, nearest-neighbor upsampling.

    The paper upsamples first; this order is equivalent and cheaper by the number of voxels of a patch. In training only
    the running variance of a batch norm differs, by a factor n / (n - 1) for n tokens in the batch.
    """

    def __init__(self, width: int, patch: Sequence[int], norm: LayerName | None, act: LayerName) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONV, len(patch)](width, width, kernel_size=1)
        self.norm = nn.Identity() if norm is None else get_norm_layer(norm, spatial_dims=len(patch), channels=width)
        self.act = activation(act)
        self.enlarge = Enlarge(patch)

    def forward(self, x: Tensor) -> Tensor:
        enlarged: Tensor = self.enlarge(self.act(self.norm(self.conv(x))))
        return enlarged


class Enlarge(nn.Module):
    """Nearest-neighbor upsampling.

    Args:
        scale: Integer factor per spatial axis.
    """

    def __init__(self, scale: Sequence[int]) -> None:
        super().__init__()
        self.scale = list(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, C, *spatial * scale)`."""
        if max(self.scale) == 1:
            return x
        size: list[int] = []
        for axis, factor in enumerate(self.scale):
            size.append(x.shape[axis + 2] * factor)
        return F.interpolate(x, size=size, mode="nearest")


def _mlp(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """Return an MLP of norm, linear, GELU and linear, initialized as in the released code."""
    layers = nn.Sequential(
        nn.LayerNorm(width, eps=1e-6),
        nn.Linear(width, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, width),
        nn.Dropout(dropout),
    )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
    return layers


def _tokens(grid: Tensor) -> Tensor:
    """Return `(B, tokens, C)` in row-major order for `(B, C, *grid)`."""
    return grid.flatten(2).transpose(1, 2)


def _same_form(grid: Sequence[int], tokens: int) -> list[int] | None:
    """Return a grid of `tokens` tokens with the aspect ratio of `grid`, otherwise a cubic one, otherwise None."""
    scale = (tokens / prod(grid)) ** (1 / len(grid))
    side = round(tokens ** (1 / len(grid)))
    alike = [round(n * scale) for n in grid]
    if prod(alike) == tokens and all(a * grid[0] == n * alike[0] for a, n in zip(alike, grid, strict=True)):
        return alike
    return [side] * len(grid) if side ** len(grid) == tokens else None
