"""Figures of features: attention maps, and similarities between the channels and between the blocks of a network.

The figures follow SelfReg (Zhu et al., MICCAI 2024, arXiv 2406.14896, figure 1): one row per network, one column per
tap (feature map of a block). Several networks, or one before and after a change, are drawn on the same color scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from medseg.errors import SizeError
from medseg.metrics.features import channel_similarity, redundancy, tap_similarity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    Cell = tuple[str, NDArray[np.uint8]]

__all__ = ["plot_attention_grid", "plot_channel_similarity", "plot_tap_similarity"]

CELL, GAP, MARGIN, LINE = 160, 8, 16, 20  # pixels
BACKGROUND, TEXT = (255, 255, 255), (20, 20, 24)
SHOWN_CHANNELS = 32
# Color map of similarities, from dark blue over green to yellow, with increasing brightness.
NUMBERS = np.array([(38, 20, 92), (49, 72, 140), (33, 121, 142), (53, 173, 120), (163, 213, 60), (250, 232, 60)])
# Color map of attention over a gray image, from blue over green and yellow to red.
HEAT = np.array([(0, 0, 140), (0, 60, 255), (0, 220, 220), (130, 255, 110), (255, 220, 0), (255, 50, 0), (140, 0, 0)])


def plot_attention_grid(
    image: Tensor, attention: Mapping[str, Mapping[str, Tensor]], label: Tensor | None = None
) -> Image.Image:
    """Draw attention maps at half opacity over a gray image.

    For a volume, the slice along the first axis with the largest foreground is shown; without a label the middle one.

    Args:
        image: Image of shape (H, W) or (D, H, W), drawn from its lowest to its highest value.
        attention: Attention maps by network and tap, of the image's shape with values in [0, 1], for example from
            `medseg.metrics.features.attention_maps`.
        label: Label of the image's shape, whose foreground is not 0.

    Raises:
        SizeError: A map whose shape differs from the image's, or an image that is neither 2D nor 3D.
    """
    index = _slice_index(image, label)
    gray = _unit(_array(image)[index])
    rows = {}
    for network, maps in attention.items():
        for tap, found in maps.items():
            if found.shape != image.shape:
                raise SizeError(
                    f"Shape mismatch: attention map '{tap}' of '{network}' is {tuple(found.shape)} and the image "
                    f"{tuple(image.shape)}. Resize the map to the image."
                )
        rows[network] = [(tap, _overlay(gray, _array(found)[index])) for tap, found in maps.items()]
    return _page(rows)


def plot_channel_similarity(features: Mapping[str, Mapping[str, Tensor]], *, seed: int = 0) -> Image.Image:
    """Draw the similarity matrix of the channels of each tap, from dark for 0 and below to bright for 1.

    Of more than 32 channels, 32 are drawn at random; the redundancy next to the tap's name is that of all channels.

    Args:
        features: Feature maps of shape (B, C, *spatial), by network and tap.
        seed: Seed of the random choice of channels.
    """
    rows = {
        network: [(f"{tap}  {redundancy(found):.2f}", _matrix(_some(found, seed))) for tap, found in taps.items()]
        for network, taps in features.items()
    }
    return _page(rows)


def plot_tap_similarity(features: Mapping[str, Mapping[str, Tensor]]) -> Image.Image:
    """Draw the similarity matrix (linear CKA) of the taps of each network, from dark for 0 to bright for 1.

    Args:
        features: Feature maps of shape (B, C, *spatial), by network and tap.
    """
    rows = {
        network: [(" ".join(taps), _colored(_array(tap_similarity(taps)), NUMBERS))]
        for network, taps in features.items()
    }
    return _page(rows)


def _slice_index(image: Tensor, label: Tensor | None) -> int | slice:
    """Return the index of the slice along the first axis of a volume; the whole image in 2D."""
    if image.dim() == 2:
        return slice(None)
    if image.dim() != 3:
        raise SizeError(
            f"Invalid shape: the image is {tuple(image.shape)}. Expected (H, W) or (D, H, W), without channels."
        )
    if label is None or not label.any():
        return len(image) // 2
    return int((label != 0).flatten(1).sum(1).argmax())


def _some(feature: Tensor, seed: int) -> Tensor:
    channels = feature.shape[1]
    if channels <= SHOWN_CHANNELS:
        return feature
    drawn = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))[:SHOWN_CHANNELS]
    return feature[:, drawn.sort().values.to(feature.device)]


def _matrix(feature: Tensor) -> NDArray[np.uint8]:
    return _colored(_array(channel_similarity(feature)), NUMBERS)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.asarray(tensor.detach().float().cpu().numpy(), dtype=np.float32)


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = float(values.min()), float(values.max())
    return (values - low) / max(high - low, 1e-7)


def _colored(values: NDArray[np.float32], colors: NDArray[np.int_]) -> NDArray[np.uint8]:
    """Map values in [0, 1] to colors; values outside are clipped."""
    steps = np.linspace(0, 1, len(colors))
    return np.stack([np.interp(values, steps, channel) for channel in colors.T], axis=-1).round().astype(np.uint8)


def _overlay(gray: NDArray[np.float32], attention: NDArray[np.float32]) -> NDArray[np.uint8]:
    mixed = 0.5 * 255 * gray[..., None] + 0.5 * _colored(attention, HEAT)
    return mixed.round().astype(np.uint8)


def _page(rows: Mapping[str, list[Cell]]) -> Image.Image:
    """Compose a page of one row of captioned figures per network, headed by its name."""
    columns = max((len(cells) for cells in rows.values()), default=0)
    height = CELL + 2 * LINE + GAP
    page = Image.new("RGB", (2 * MARGIN + max(columns, 1) * (CELL + GAP), 2 * MARGIN + len(rows) * height), BACKGROUND)
    pen = ImageDraw.Draw(page)
    for row, (name, cells) in enumerate(rows.items()):
        top = MARGIN + row * height
        pen.text((MARGIN, top), name, font=ImageFont.load_default(size=15), fill=TEXT)
        for column, (caption, pixels) in enumerate(cells):
            left = MARGIN + column * (CELL + GAP)
            pen.text((left, top + LINE), caption, font=ImageFont.load_default(size=12), fill=TEXT)
            page.paste(_fitted(pixels), (left, top + 2 * LINE))
    return page


def _fitted(pixels: NDArray[np.uint8]) -> Image.Image:
    """Scale to the size of a cell in true proportions, by nearest neighbor."""
    rows, columns = pixels.shape[:2]
    factor = CELL / max(rows, columns)
    size = (max(1, round(columns * factor)), max(1, round(rows * factor)))
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
