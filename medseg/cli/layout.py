"""Tables that fit the width of the terminal without truncating anything.

In a table that is too wide, names and texts are wrapped first, then the table is transposed, and finally each row
becomes a paragraph. Numbers are never wrapped. If standard output is not a terminal, the width is unlimited.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.cells import cell_len, chop_cells
from rich.text import Text

from medseg.cli.console import output
from medseg.errors import visible

__all__ = ["Column", "layout", "show_table", "wrap"]

_GAP: Final = "  "
_INDENT: Final = "  "
# Narrower names are hard to read.
_NARROWEST: Final = 12
# Transposed tables of more rows are hard to read.
_MAX_TRANSPOSED: Final = 8
# Long names break after these characters.
_PIECES: Final = re.compile(r"[^\s_/.,:-]*[_/.,:-]*")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Header of the column.
        number: Whether the cells are numbers, which are right-aligned and never wrapped.
    """

    name: str
    number: bool = False


@dataclass(frozen=True)
class _Cell:
    text: str
    style: str = ""
    number: bool = False

    @property
    def width(self) -> int:
        return cell_len(self.text)

    @property
    def narrowest(self) -> int:
        """Smallest width at which the cell is not truncated and still readable."""
        return self.width if self.number else min(self.width, _NARROWEST)

    @property
    def whole(self) -> int:
        """Smallest width at which the cell is wrapped between words only."""
        return max(self.narrowest, *map(cell_len, self.text.split()), 0)


def show_table(columns: Sequence[Column | str], rows: Sequence[Sequence[Any]], *, title: str = "") -> None:
    """Print a table to standard output, at most as wide as the terminal.

    Args:
        columns: Headers; a string is the header of a text column.
        rows: Rows with one cell per column: strings, or `rich.text.Text` with a style.
        title: Title above the table.
    """
    width = output.width if output.is_terminal else None
    if title:
        output.print(Text("\n".join(wrap(visible(title), width)) if width else visible(title), style="bold"))
    for line in layout(columns, rows, width=width):
        output.print(line)


def layout(columns: Sequence[Column | str], rows: Sequence[Sequence[Any]], *, width: int | None) -> list[Text]:
    """Return the lines of a table, none wider than `width` unless its numbers need more.

    Args:
        columns: Headers, as for `show_table`.
        rows: Cells, as for `show_table`.
        width: Width in terminal cells, or None if unlimited.
    """
    known = [column if isinstance(column, Column) else Column(column) for column in columns]
    head = [_Cell(visible(column.name), "bold") for column in known]
    body = [[_cell(value, column.number) for value, column in zip(row, known, strict=True)] for row in rows]
    right = [column.number for column in known]
    if width is None or _narrowest(head, body) <= width:
        return _lines(head, body, right, width)
    first, *others = zip(*body, strict=True)
    transposed = [[name, *cells] for name, cells in zip(head[1:], others, strict=True)]
    transposed_head = [head[0], *(_Cell(cell.text, "bold") for cell in first)]
    if len(body) <= _MAX_TRANSPOSED and _narrowest(transposed_head, transposed) <= width:
        return _lines(transposed_head, transposed, [False, *(True for _ in body)], width)
    return [line for row in body for line in _paragraph(head, row, width)]


def _cell(value: Any, number: bool) -> _Cell:
    if isinstance(value, Text):
        return _Cell(visible(value.plain), str(value.style), number)
    return _Cell(visible(str(value)), "", number)


def _narrowest(head: Sequence[_Cell], body: Sequence[Sequence[_Cell]]) -> int:
    """Return the smallest width at which no cell of a table is truncated."""
    return sum(_smallest_widths(head, body)) + len(_GAP) * (len(head) - 1)


def _smallest_widths(head: Sequence[_Cell], body: Sequence[Sequence[_Cell]]) -> list[int]:
    return [max(cell.narrowest for cell in column) for column in zip(head, *body, strict=True)]


def _lines(
    head: Sequence[_Cell], body: Sequence[Sequence[_Cell]], right: Sequence[bool], width: int | None
) -> list[Text]:
    """Return header, rule and rows."""
    widths = _widths(head, body, width)
    rule = Text(_GAP.join("─" * each for each in widths), style="dim")
    return [*_row(head, widths, right), rule, *(line for row in body for line in _row(row, widths, right))]


def _widths(head: Sequence[_Cell], body: Sequence[Sequence[_Cell]], width: int | None) -> list[int]:
    """Return the column widths; the widest text columns are narrowed until the table fits."""
    columns = list(zip(head, *body, strict=True))
    widths = [max(cell.width for cell in column) for column in columns]
    if width is None:
        return widths
    smallest = _smallest_widths(head, body)
    whole = [max(cell.whole for cell in column) for column in columns]
    for _ in range(sum(widths) + len(_GAP) * (len(widths) - 1) - width):
        number = max(range(len(widths)), key=lambda n: (widths[n] > whole[n], widths[n] > smallest[n], widths[n]))
        widths[number] -= 1
    return widths


def _row(cells: Sequence[_Cell], widths: Sequence[int], right: Sequence[bool]) -> list[Text]:
    """Return the lines of a row, several if cells are wrapped."""
    wrapped = [wrap(cell.text, width) for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for number in range(max(map(len, wrapped))):
        line = Text()
        for cell, pieces, width, flush_right in zip(cells, wrapped, widths, right, strict=True):
            piece = pieces[number] if number < len(pieces) else ""
            space = " " * (width - cell_len(piece))
            line.append(space if flush_right else "").append(piece, cell.style or None)
            line.append(("" if flush_right else space) + _GAP)
        line.rstrip()
        lines.append(line)
    return lines


def _paragraph(head: Sequence[_Cell], row: Sequence[_Cell], width: int) -> list[Text]:
    """Return a row as a paragraph: its first cell, and below it the other cells, each after its header."""
    lines = [Text(piece, style="bold") for piece in wrap(row[0].text, width)]
    items = [f"{name.text} {cell.text}" for name, cell in zip(head[1:], row[1:], strict=True) if cell.text]
    line = ""
    for piece in (piece for item in items for piece in wrap(item, width - len(_INDENT))):
        joined = f"{line}{_GAP}{piece}" if line else _INDENT + piece
        if line and cell_len(joined) > width:
            lines.append(Text(line))
            joined = _INDENT + piece
        line = joined
    return [*lines, Text(line)]


def wrap(text: str, width: int) -> list[str]:
    """Break a text at spaces, within long words after characters such as `_`, and elsewhere only if necessary."""
    lines = [""]
    for word in text.split():
        gap = " " if lines[-1] else ""
        if cell_len(lines[-1] + gap + word) <= width:
            lines[-1] += gap + word
            continue
        if lines[-1]:
            lines.append("")
        for part in _PIECES.findall(word):
            for piece in chop_cells(part, width) if cell_len(part) > width else [part]:
                if lines[-1] and cell_len(lines[-1] + piece) > width:
                    lines.append("")
                lines[-1] += piece
    return lines
