"""Tables show every name and number, however narrow the terminal is."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.text import Text

from medseg.cli import layout as layout_module
from medseg.cli.layout import Column, layout, show_table

RUNS = [f"abdomen_ct_unetplusplus_selfreg_{number}_with_many_more_words" for number in range(12)]
LABELS = [f"label_{number}_superior_mesenteric_artery" for number in range(30)]


def _numbers(run: int) -> list[str]:
    return [f"{0.1 + run / 100 + label / 1000:.4f}" for label in range(30)]


def _comparison(runs: int) -> tuple[list[Any], list[list[Any]]]:
    columns = ["run", *(Column(label, number=True) for label in LABELS)]
    return columns, [[name, *_numbers(number)] for number, name in enumerate(RUNS[:runs])]


def _plain(lines: list[Text]) -> str:
    return "\n".join(line.plain for line in lines)


def _joined(text: str) -> str:
    """The characters of a text without the spaces and breaks between them."""
    return re.sub(r"\s+", "", text)


def _columns_read_down(lines: list[Text]) -> str:
    """What each column holds, its wrapped pieces joined again."""
    rule = next(line.plain for line in lines if set(line.plain) <= {"─", " "} and line.plain)
    spans = [match.span() for match in re.finditer("─+", rule)]
    return " ".join(_joined("".join(line.plain[start:end] for line in lines)) for start, end in spans)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("runs", [1, 3, 12])
def test_thirty_labels_with_long_names_are_all_there(width: int, runs: int) -> None:
    lines = layout(*_comparison(runs), width=width)
    assert max(cell_len(line.plain) for line in lines) <= width
    words = set(_plain(lines).split())
    assert {number for run in range(runs) for number in _numbers(run)} <= words
    readable = _joined(_plain(lines)) if not any(set(line.plain) <= {"─", " "} for line in lines) else ""
    text = readable or _columns_read_down(lines)
    assert all(name in text for name in (*RUNS[:runs], *LABELS))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_texts_are_wrapped_and_names_last(width: int) -> None:
    rows = [
        ("hippocampus_mri_uctransnet", "yes", "anterior, posterior", "Segments the hippocampus in cropped MRI " * 2)
    ]
    lines = layout(["bundle", "weights", "labels", "task"], rows, width=width)
    assert max(cell_len(line.plain) for line in lines) <= width
    assert "hippocampus_mri_uctransnet" in _columns_read_down(lines)
    assert ("hippocampus_mri_uctransnet" in _plain(lines)) == (width >= 80)
    assert "Segmentsthehippocampus" in _columns_read_down(lines)


def test_without_a_terminal_nothing_is_squeezed(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(layout_module.output, "_force_terminal", False)
    columns, rows = _comparison(12)
    show_table(columns, rows, title="Dice")
    title, head, _, *body = capsys.readouterr().out.splitlines()
    assert title == "Dice"
    assert head.split() == ["run", *LABELS]
    assert [line.split() for line in body] == rows


def test_in_a_terminal_its_width_counts(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(layout_module.output, "_force_terminal", True)
    monkeypatch.setattr(layout_module.output, "_width", 80)
    show_table(*_comparison(3), title="Dice of the runs " * 10)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, printed.splitlines())) <= 80


def test_wide_characters_count_as_they_are_shown() -> None:
    lines = layout(["name", Column("Dice", number=True)], [["肝臓" * 20, "0.5"], ["a", "0.25"]], width=40)
    assert max(cell_len(line.plain) for line in lines) <= 40
    assert "肝臓" * 20 in "".join(re.findall("[肝臓]", _plain(lines)))


def test_a_style_stays_with_its_cell_and_controls_are_shown() -> None:
    lines = layout(["check", "status"], [["a\x1b[2J", Text("failed", style="red")]], width=80)
    assert r"a\x1b[2J" in _plain(lines)
    assert [str(span.style) for span in lines[-1].spans] == ["red"]


def test_an_empty_table_is_its_head() -> None:
    assert _plain(layout(["label", "Dice"], [], width=80)).split("\n")[0] == "label  Dice"
