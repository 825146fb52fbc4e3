"""Code blocks of the documentation, and what the comments above them say about running them.

Directly above a block, `<!-- test: skip REASON -->` keeps it from being run, and `<!-- test: exit 1 -->` gives the exit
code of its last command. `<!-- workspace: empty -->` at the top of a page runs it in an empty folder instead of one
with data.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CARDS = sorted((ROOT / "bundles").glob("*/docs/README.md"))

_BLOCK = re.compile(
    r"(?:^<!-- test: (?P<note>.+?) -->\n)?^(?P<fence>```)(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_INLINE = re.compile(r"`(medseg [^`]+)`")
_NUMBER = re.compile(r"exit (\d+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, in which language, and what the comment above it says."""

    page: Path
    line: int
    language: str
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def skip(self) -> str:
        """Why it is not run; empty if it is."""
        return self.note.removeprefix("skip ") if self.note.startswith("skip ") else ""

    @property
    def exit_code(self) -> int:
        """Exit code of the last command."""
        found = _NUMBER.fullmatch(self.note)
        return int(found[1]) if found else 0

    @property
    def commands(self) -> list[str]:
        """Lines of a shell block, without comments, continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    content = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            content.count("\n", 0, found.start("fence")) + 1,
            found["language"],
            found["text"],
            found["note"] or "",
        )
        for found in _BLOCK.finditer(content)
    ]


def starts_empty(page: Path) -> bool:
    """Whether a page is run in an empty folder."""
    return page.read_text(encoding="utf-8").startswith("<!-- workspace: empty -->")


def medseg_commands(page: Path) -> Iterator[tuple[str, list[str], bool]]:
    """Yield every `medseg` command of a page: where it is, its arguments, and whether it is whole (in a block)."""
    found = blocks(page)
    for block in found:
        for line in block.commands if block.language in ("bash", "") else ():
            if re.match(r"(\S*/)?medseg ", line):
                yield f"{block}: {line}", shlex.split(line, comments=True)[1:], True
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    for inline in _INLINE.finditer(text):
        yield f"{page.relative_to(ROOT)}: {inline[1]}", inline[1].split()[1:], False
