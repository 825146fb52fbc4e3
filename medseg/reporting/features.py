"""Pictures of features: where each block of a network looks, and how alike its channels and its blocks are.

The pictures are those of SelfReg (Zhu et al., MICCAI 2024, arXiv 2406.14896, figure 1): one row per network, one column
per tap. Several networks, or one before and after a change, stand below each other on the same scale of colors.
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
# From dark blue over green to yellow, brighter with each step: for numbers.
NUMBERS = np.array([(38, 20, 92), (49, 72, 140), (33, 121, 142), (53, 173, 120), (163, 213, 60), (250, 232, 60)])
# From blue over green and yellow to red: for maps over a gray image.
HEAT = np.array([(0, 0, 140), (0, 60, 255), (0, 220, 220), (130, 255, 110), (255, 220, 0), (255, 50, 0), (140, 0, 0)])


def plot_attention_grid(
    image: Tensor, attention: Mapping[str, Mapping[str, Tensor]], label: Tensor | None = None
) -> Image.Image:
    """Draw attention maps half transparent over one gray image.

    Of a volume, the slice along the first axis with the largest labeled area is shown; without a label the middle one.

    Args:
        image: `(*spatial)`, 2D or 3D; shown from its lowest to its highest value.
        attention: network -> tap -> `(*spatial)`, 0 to 1, e.g. from `medseg.metrics.features.attention_maps`.
        label: `(*spatial)`; not 0 where something is labeled.

    Raises:
        SizeError: a map has another size than the image.
    """
    index = _slice_index(image, label)
    gray = _unit(_array(image)[index])
    rows = {}
    for network, maps in attention.items():
        for tap, found in maps.items():
            if found.shape != image.shape:
                raise SizeError(
                    f"attention map '{tap}' of '{network}' is {tuple(found.shape)} and the image "
                    f"{tuple(image.shape)}; give maps at the size of the image."
                )
        rows[network] = [(tap, _overlay(gray, _array(found)[index])) for tap, found in maps.items()]
    return _page(rows)


def plot_channel_similarity(features: Mapping[str, Mapping[str, Tensor]], *, seed: int = 0) -> Image.Image:
    """Draw the similarity of the channels of each tap, dark for 0 and below to bright for 1.

    Of more than 32 channels a random choice of 32 is drawn; the number beside the tap, its redundancy, is of all.

    Args:
        features: network -> tap -> `(B, C, *spatial)`.
        seed: of the choice of channels.
    """
    rows = {
        network: [(f"{tap}  {redundancy(found):.2f}", _matrix(_some(found, seed))) for tap, found in taps.items()]
        for network, taps in features.items()
    }
    return _page(rows)


def plot_tap_similarity(features: Mapping[str, Mapping[str, Tensor]]) -> Image.Image:
    """Draw, per network, the similarity (linear CKA) of each two taps, dark for 0 to bright for 1.

    Args:
        features: network -> tap -> `(B, C, *spatial)`.
    """
    rows = {
        network: [(" ".join(taps), _colored(_array(tap_similarity(taps)), NUMBERS))]
        for network, taps in features.items()
    }
    return _page(rows)


def _slice_index(image: Tensor, label: Tensor | None) -> int | slice:
    """Return the index along the first axis of a volume; of a picture, everything."""
    if image.dim() == 2:
        return slice(None)
    if image.dim() != 3:
        raise SizeError(f"the image is {tuple(image.shape)}; expected a picture or a volume without channels.")
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
    """Map 0..1 to colors; values beyond get those of the ends."""
    steps = np.linspace(0, 1, len(colors))
    return np.stack([np.interp(values, steps, channel) for channel in colors.T], axis=-1).round().astype(np.uint8)


def _overlay(gray: NDArray[np.float32], attention: NDArray[np.float32]) -> NDArray[np.uint8]:
    mixed = 0.5 * 255 * gray[..., None] + 0.5 * _colored(attention, HEAT)
    return mixed.round().astype(np.uint8)


def _page(rows: Mapping[str, list[Cell]]) -> Image.Image:
    """Put pictures in rows, each with its caption above it, each row with its name."""
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
    """Scale to the size of a cell in true proportions, without smoothing."""
    rows, columns = pixels.shape[:2]
    factor = CELL / max(rows, columns)
    size = (max(1, round(columns * factor)), max(1, round(rows * factor)))
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
