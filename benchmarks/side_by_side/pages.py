"""Insertion of generated text between the markers of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["commit_of", "replace_between", "table"]


def replace_between(page: Path, name: str, text: str) -> None:
    """Insert text between `<!-- name: begin -->` and `<!-- name: end -->` of a page, or print it if the page is "-".

    Raises:
        SystemExit: the page does not have both marks.
    """
    if str(page) == "-":
        print(text)
        return
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = page.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise SystemExit(f"expected '{begin}' and '{end}' exactly once in {page}")
    before, after = content.partition(begin)[0], content.partition(end)[2]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with one text column followed by number columns."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---", *["--:"] * (len(head) - 1)], *rows)]


def commit_of(record: dict[str, Any]) -> str:
    """Return the name of the commit of a record."""
    return f"commit {record['commit'][:10]}{' with changes' if record['package_changed'] else ''}"
