"""Drawing of overlays: panels with contours, orientation letters and scale bars, and pages with titles and legends.

The slices are chosen in `medseg.reporting.overlay`. Colors are those of Okabe and Ito (Color Universal Design, 2008),
which are distinguishable with color vision deficiencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

__all__ = ["Entry", "Panel", "compose", "draw_panel", "legend_entries", "volume_text"]

PALETTE = np.array(
    [(86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 158, 115), (240, 228, 66), (213, 94, 0), (0, 114, 178)],
    dtype=np.float32,
)
BACKGROUND, TEXT, FAINT = (18, 18, 22), (235, 235, 235), (150, 150, 158)
SLICE_HEIGHT, SLICE_LIMIT = 380, 640  # preferred height and maximum size of one of three slices, in pixels
IMAGE_HEIGHT, IMAGE_LIMIT = 480, 960  # the same for a 2D image
NARROWEST, MARGIN, GAP = 320, 18, 10
FILL_GRAY, FILL_COLOR = 0.32, 0.22  # opacity of the fill; lower on color images, whose colors must remain visible
LEGEND_LIMIT = 12
DASH = 4  # length in pixels of the white, the black and the open part, through which a contour below remains visible
BAR_LENGTHS = (500, 200, 100, 50, 20, 10, 5, 2, 1)  # mm


@dataclass(frozen=True)
class Panel:
    """One slice or 2D image before it is drawn.

    Attributes:
        pixels: Gray values (rows, columns) or colors (rows, columns, 3), uint8.
        marks: Labels (rows, columns) of the mask and, if given, of the reference.
        size: Height and width of a pixel in mm; None if unknown, for square pixels.
        letters: Orientation letters at left, right, top and bottom; empty for none.
        caption: Text below the panel.
    """

    pixels: NDArray[np.uint8]
    marks: list[NDArray[np.uint16]]
    size: tuple[float, float] | None
    letters: str
    caption: str


def draw_panel(panel: Panel) -> Image.Image:
    """Enlarge the pixels, then draw fill, contours, letters and scale bar at the final size."""
    height, width = _panel_size(panel)
    base = Image.fromarray(np.ascontiguousarray(panel.pixels)).convert("RGB")
    base = base.resize((width, height), Image.Resampling.LANCZOS)
    canvas = np.asarray(base, dtype=np.float32).copy()
    marks = [_enlarge(mark, height, width) for mark in panel.marks]
    _paint_mask(canvas, marks[0], FILL_GRAY if panel.pixels.ndim == 2 else FILL_COLOR)
    if len(marks) > 1:
        _paint_dashes(canvas, marks[1])
    drawn = Image.fromarray(np.rint(canvas).astype(np.uint8))
    _annotate(drawn, panel, height, width)
    return drawn


def _panel_size(panel: Panel) -> tuple[int, int]:
    """Return height and width in pixels: true proportions, and an integer scale for small images of square pixels."""
    rows, columns = panel.pixels.shape[:2]
    down, across = panel.size or (1.0, 1.0)
    unit = min(down, across)
    tall, wide = rows * down / unit, columns * across / unit
    aim, limit = (SLICE_HEIGHT, SLICE_LIMIT) if panel.size else (IMAGE_HEIGHT, IMAGE_LIMIT)
    factor = aim / tall
    if abs(down - across) < 0.01 * unit and factor > 0.6:
        factor = max(1, round(factor))
    factor = min(factor, limit / max(tall, wide))
    return max(1, round(tall * factor)), max(1, round(wide * factor))


def _enlarge(mark: NDArray[np.uint16], height: int, width: int) -> NDArray[np.uint16]:
    """Resize by nearest neighbor."""
    rows = ((np.arange(height) + 0.5) * mark.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * mark.shape[1] / width).astype(int)
    return np.asarray(mark[rows[:, None], columns], dtype=np.uint16)


def _paint_mask(canvas: NDArray[np.float32], mark: NDArray[np.uint16], opacity: float) -> None:
    """Blend each label with its color; its outermost two pixels are opaque."""
    colors = PALETTE[(mark.astype(int) - 1) % len(PALETTE)]
    inside = mark > 0
    canvas[inside] = (1 - opacity) * canvas[inside] + opacity * colors[inside]
    edge = inside & _is_border(mark, distance=2)
    canvas[edge] = colors[edge]


def _is_border(mark: NDArray[np.uint16], distance: int) -> NDArray[np.bool_]:
    """Find the pixels with another label within `distance` pixels up, down, left or right."""
    found = np.zeros(mark.shape, dtype=bool)
    for step in range(1, distance + 1):
        down = mark[step:] != mark[:-step]
        across = mark[:, step:] != mark[:, :-step]
        found[step:] |= down
        found[:-step] |= down
        found[:, step:] |= across
        found[:, :-step] |= across
    return found


def _paint_dashes(canvas: NDArray[np.float32], mark: NDArray[np.uint16]) -> None:
    """Draw the borders between labels as white and black dashes, which are visible on any background."""
    rows, columns = np.nonzero(mark[1:] != mark[:-1])
    _dash(canvas, rows, columns, along=columns)
    _dash(canvas, rows + 1, columns, along=columns)
    rows, columns = np.nonzero(mark[:, 1:] != mark[:, :-1])
    _dash(canvas, rows, columns, along=rows)
    _dash(canvas, rows, columns + 1, along=rows)


def _dash(
    canvas: NDArray[np.float32], rows: NDArray[np.intp], columns: NDArray[np.intp], *, along: NDArray[np.intp]
) -> None:
    """Color pixels by their position along the line: white, black, unchanged, and so on."""
    for part, level in enumerate((255, 0)):
        pick = along // DASH % 3 == part
        canvas[rows[pick], columns[pick]] = level


def _annotate(drawn: Image.Image, panel: Panel, height: int, width: int) -> None:
    """Draw orientation letters at the sides, and a scale bar if pixel sizes are known."""
    pen = ImageDraw.Draw(drawn)
    if panel.letters:
        spots = (
            (6, height / 2, "lm"),
            (width - 6, height / 2, "rm"),
            (width / 2, 4, "ma"),
            (width / 2, height - 4, "md"),
        )
        for letter, (x, y, anchor) in zip(panel.letters, spots, strict=True):
            pen.text((x, y), letter, font=_font(17), fill=TEXT, anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0))
    if panel.size:
        pixels_per_mm = width / (panel.pixels.shape[1] * panel.size[1])
        _draw_bar(pen, pixels_per_mm, height, width)


def _draw_bar(pen: ImageDraw.ImageDraw, pixels_per_mm: float, height: int, width: int) -> None:
    """Draw a scale bar of a round length, at most a third of the width, in the lower right corner."""
    length = next((mm for mm in BAR_LENGTHS if mm * pixels_per_mm <= width / 3), None)
    if length is None:
        return
    right, y = width - 10, height - 10
    left = right - length * pixels_per_mm
    pen.line((left - 1, y, right + 1, y), fill=(0, 0, 0), width=5)
    pen.line((left, y, right, y), fill=TEXT, width=3)
    middle = ((left + right) / 2, y - 4)
    pen.text(middle, f"{length} mm", font=_font(13), fill=TEXT, anchor="md", stroke_width=2, stroke_fill=(0, 0, 0))


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


@dataclass(frozen=True)
class Entry:
    """An entry of the legend: text with a colored swatch, with the dashes of the reference, or alone."""

    text: str
    color: tuple[int, int, int] | None = None
    dashed: bool = False


def legend_entries(
    voxels: list[NDArray[np.int64]], labels: Mapping[int, str] | None, measure: Callable[[int], str]
) -> list[Entry]:
    """Return an entry with name, color and size of each label, or one entry for many unnamed objects."""
    mask, truth = voxels[0], voxels[1] if len(voxels) > 1 else None
    present = [int(value) for value in np.flatnonzero(mask) if value]
    end = [Entry("reference", dashed=True)] if truth is not None else []
    if labels is None and len(present) > len(PALETTE):
        text = f"{len(present)} objects, {measure(int(mask[1:].sum()))}"
        return [Entry(text + _reference(truth, None, measure), _color(present[0])), *end]
    names = {value: name for value, name in (labels or {}).items() if value}
    values = sorted({*present, *names})
    if len(values) > LEGEND_LIMIT:
        values = sorted(present, key=lambda value: -mask[value])[:LEGEND_LIMIT]
    entries = []
    for value in values:
        count = int(mask[value]) if value < len(mask) else 0
        size = measure(count) if count else "none"
        text = f"{names.get(value, f'label {value}')}  {size}{_reference(truth, value, measure)}"
        entries.append(Entry(text, _color(value)))
    if not values:
        entries.append(Entry("empty mask"))
    if len(present) > len(values):
        entries.append(Entry(f"+ {len(present) - len(values)} more"))
    return entries + end


def _reference(truth: NDArray[np.int64] | None, value: int | None, measure: Callable[[int], str]) -> str:
    """Return the size of one label, or of all, in the reference, in parentheses."""
    if truth is None:
        return ""
    count = int(truth[1:].sum()) if value is None else int(truth[value]) if value < len(truth) else 0
    return f" (reference {measure(count) if count else 'none'})"


def _color(value: int) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in PALETTE[(value - 1) % len(PALETTE)])
    return red, green, blue


def volume_text(cubic_mm: float) -> str:
    """Format a volume in mL from 1 mL up, otherwise in cubic millimeters, with about three digits."""
    value, unit = (cubic_mm / 1000, "mL") if cubic_mm >= 1000 else (cubic_mm, "mm³")
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def compose(title: str, panels: list[Panel], legend: list[Entry], note: str) -> Image.Image:
    """Compose a page of a title, panels side by side with their captions, a legend and a note."""
    drawn = [draw_panel(panel) for panel in panels]
    inner = max(sum(panel.width for panel in drawn) + GAP * (len(drawn) - 1), NARROWEST)
    rows = _wrap(legend, inner)
    top = MARGIN + 34
    bottom = top + max(panel.height for panel in drawn)
    height = bottom + 34 + 26 * len(rows) + (24 if note else 0) + MARGIN - 8
    page = Image.new("RGB", (inner + 2 * MARGIN, height), BACKGROUND)
    pen = ImageDraw.Draw(page)
    _write(pen, (MARGIN, MARGIN + 10), _shorten(title, inner, 19), 19, TEXT)
    x = MARGIN
    for panel, image in zip(panels, drawn, strict=True):
        page.paste(image, (x, (top + bottom - image.height) // 2))
        _write(pen, (x, bottom + 13), panel.caption, 13, FAINT)
        x += image.width + GAP
    for line, row in enumerate(rows):
        _draw_legend_row(pen, row, bottom + 47 + 26 * line)
    if note:
        _write(pen, (MARGIN, height - MARGIN - 2), note, 12, FAINT)
    return page


def _wrap(legend: list[Entry], width: int) -> list[list[Entry]]:
    """Split legend entries into rows no wider than the page, with at least one entry each."""
    rows: list[list[Entry]] = []
    used = 0
    for entry in legend:
        need = _entry_width(entry)
        if not rows or used + need > width:
            rows.append([])
            used = 0
        rows[-1].append(entry)
        used += need
    return rows


def _entry_width(entry: Entry) -> int:
    swatch = 24 if entry.color or entry.dashed else 0
    return swatch + int(_font(15).getlength(entry.text)) + 24


def _draw_legend_row(pen: ImageDraw.ImageDraw, row: list[Entry], y: int) -> None:
    """Draw the swatches and texts of a row of entries, side by side."""
    x = MARGIN
    for entry in row:
        start = x
        if entry.color:
            fill = tuple((c + b) // 2 for c, b in zip(entry.color, BACKGROUND, strict=True))
            pen.rectangle((x, y - 7, x + 15, y + 7), fill=fill, outline=entry.color, width=2)
            start += 24
        elif entry.dashed:
            for piece in range(3):
                pen.line((x + 6 * piece, y, x + 6 * piece + 3, y), fill=TEXT, width=2)
            start += 24
        _write(pen, (start, y), entry.text, 15, TEXT)
        x += _entry_width(entry)


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, color: tuple[int, int, int]
) -> None:
    """Write text centered on the line `y`; Pillow's font lacks "³", which is drawn as a small, raised 3."""
    x, y = place
    for index, part in enumerate(text.split("³")):
        if index:
            small = _font(round(size * 0.65))
            pen.text((x, y - 0.28 * size), "3", font=small, fill=color, anchor="lm")
            x += small.getlength("3")
        pen.text((x, y), part, font=_font(size), fill=color, anchor="lm")
        x += _font(size).getlength(part)


def _shorten(text: str, width: int, size: int) -> str:
    """Shorten a long text in its middle, so that the end of a file name remains readable."""
    font = _font(size)
    keep = len(text)
    shown = text
    while font.getlength(shown) > width and keep > 8:
        keep -= 1
        shown = f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
    return shown
