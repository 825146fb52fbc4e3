"""The documentation does what it says: commands and Python blocks run, names, links and pages exist.

Commands that take hours on real data run on a few small volumes, for one step of one epoch (`_small`).
"""

from __future__ import annotations

import json
import logging
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer

from medseg.cli import app, main
from medseg.cli.console import reset
from medseg.studies.phantoms import write_phantoms
from tests.docs.blocks import CARDS, PAGES, ROOT, Block, blocks, medseg_commands, starts_empty
from tests.test_architecture import FLOORS

REPOSITORY = "https://github.com/medseg/medseg"
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_SHORT = {"max_epochs": 1, "steps_per_epoch": 1, "val_interval": 1, "num_workers": 0, "pictures": 0}
_SKIPPED = [block for page in PAGES for block in blocks(page) if block.skip]


def _names(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Blocks that run


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.language in ("bash", "python") for block in blocks(page))], ids=_names
)
def test_a_page_runs_from_top_to_bottom(
    page: Path, enter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = enter(empty=starts_empty(page))
    monkeypatch.setattr("medseg.studies.phantoms.write_phantoms", partial(write_phantoms, shape=(40, 40, 32), unseen=1))
    variables = {"PWD": str(folder)}
    for block in blocks(page):
        if block.skip:
            continue
        if block.language == "python":
            code = compile("\n" * block.line + block.text, str(block), "exec")  # tracebacks show the page's line
            exec(code, {"__name__": "documentation"})
        elif block.language == "bash":
            _run_shell(block, variables, monkeypatch)


def _run_shell(block: Block, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for number, line in enumerate(block.commands, 1):
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        while words and (assigned := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
            variables[assigned[1]] = assigned[2].replace("/path/to", variables["PWD"])
            del words[0]
        if words:
            code = _run(words, monkeypatch)
            expected = block.exit_code if number == len(block.commands) else 0
            assert code == expected, f"{block}: exit code {code} of: {line}"


def _run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command and return its exit code, or check what a program of others is given."""
    if words[0] == "medseg":
        return _in_process(_small(words), main, monkeypatch)
    if words[:4] == ["python", "-m", "monai.bundle", "run"]:
        options = [f"--{name}={value}" for name, value in _SHORT.items()] if "train.json" in " ".join(words) else []
        argv = ["monai.bundle", *words[3:], *options]
        return _in_process(argv, lambda: runpy.run_module("monai.bundle", run_name="__main__"), monkeypatch)
    return _CHECKED[words[0]](words)


def _in_process(argv: list[str], program: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if argv[0] != "medseg" else "default")
        try:
            program()
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _small(words: list[str]) -> list[str]:
    """Shorten a command that would take minutes or hours: one step of training, few cases, no measurement."""
    if words[1] == "train":
        words = [f"max_epochs={_SHORT['max_epochs']}" if word.startswith("max_epochs=") else word for word in words]
        given = {word.partition("=")[0] for word in words}
        return [*words, *(f"--set={name}={value}" for name, value in _SHORT.items() if name not in given)]
    if words[1] == "plan":
        return [*_without(_without(words, "--budget"), "--memory"), "--no-measure", "--memory", "1200M"]
    return [*words, "--cases", "4"] if words[1] == "phantoms" else words


def _without(words: list[str], option: str) -> list[str]:
    at = words.index(option) if option in words else len(words)
    return words[:at] + words[at + 2 :]


def _check_make(words: list[str]) -> int:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert words[1] in targets
    return 0


def _check_pip(words: list[str]) -> int:
    named = {extra for word in words for extra in re.findall(r"medseg\[([\w,]+)\]", word)}
    assert {extra for names in named for extra in names.split(",")} <= _extras()
    return 0


def _check_docker(words: list[str]) -> int:
    files = [Path(word) for word in words if word.startswith("docker/")]
    assert files
    assert all((ROOT / path).is_file() for path in files)
    if "--target" in words:
        assert f" AS {words[words.index('--target') + 1]}" in (ROOT / files[0]).read_text(encoding="utf-8")
    return 0


_CHECKED: dict[str, Callable[[list[str]], int]] = {"make": _check_make, "pip": _check_pip, "docker": _check_docker}


def _extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    part = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = ", part, re.MULTILINE))


# Blocks that do not


@pytest.mark.parametrize("block", _SKIPPED, ids=str)
def test_a_skipped_block_says_why(block: Block) -> None:
    assert len(block.skip.split()) > 2
    for path in re.findall(r"\b(?:tests|docker)/[\w/]+(?:\.py)?", block.skip):
        assert (ROOT / path).exists()
    pytest.skip(f"documentation, not run: {block.skip}")


def test_every_block_has_a_known_language() -> None:
    unknown = [str(b) for p in PAGES for b in blocks(p) if b.language not in ("bash", "python", "json", "text")]
    assert not unknown


def test_json_blocks_are_json() -> None:
    for block in (block for page in PAGES for block in blocks(page) if block.language == "json"):
        text = block.text if block.text.startswith("{") else f"{{{block.text}}}"
        assert json.loads(text), block


# Names


@pytest.mark.parametrize("page", [*PAGES, *CARDS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=_names)
def test_every_command_and_option_exists(page: Path) -> None:
    for where, words, whole in medseg_commands(page):
        command: Any = typer.main.get_command(app)
        root = command.context_class(command, info_name="medseg")
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        assert not hasattr(command, "commands") or not words or words[0].startswith(("-", "X")), where
        context = command.context_class(command, info_name=command.name, parent=root)
        known = {name for one in command.get_params(context) for name in one.opts + one.secondary_opts}
        assert {word.partition("=")[0] for word in words if word.startswith("-") and word != "-"} <= known, where
        if whole and not hasattr(command, "commands") and "--help" not in words:
            reset()
            command.make_context(command.name, list(words), parent=root)
    reset()


def test_the_readme_lists_every_extra() -> None:
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == _extras()


def test_the_readme_fits_two_screens() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 95
    assert "make demo" in text
    assert "make test" in text


# Links


@pytest.mark.parametrize("page", [*PAGES, *CARDS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=_names)
def test_links_to_this_repository_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        place, _, anchor = (
            link.removeprefix(f"{REPOSITORY}/blob/main/").removeprefix(f"{REPOSITORY}/tree/main/").partition("#")
        )
        if place.startswith(("http:", "https:", "mailto:")):
            continue
        target = ROOT / place if link.startswith(REPOSITORY) else page.parent / place if place else page
        if _is_generated(target):
            continue
        assert target.exists(), f"{_names(page)}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{_names(page)}: {link}"


def _is_generated(target: Path) -> bool:
    """Whether a page is made when the site is built, which checks the links to those."""
    made = [ROOT / "docs" / name for name in ("models", "reference/commands", "reference/python")]
    return target.name != "index.md" and target.parent.resolve() in made


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_of_the_readme_work_on_the_package_index() -> None:
    links = _LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10
    assert all(link.startswith("https://") for link in links)


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site: links, anchors and navigation checked by mkdocs, whose warnings are errors."""
    pytest.importorskip("mkdocs", reason='mkdocs is not installed: pip install "medseg[docs]"')
    pytest.importorskip("mkdocstrings", reason='mkdocstrings is not installed: pip install "medseg[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_site_has_every_command_setting_and_model(site: Path) -> None:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert hasattr(command, "commands") or (site / "reference" / "commands" / name / "index.html").is_file()
    page = (site / "reference" / "settings" / "index.html").read_text(encoding="utf-8")
    base = json.loads((ROOT / "medseg" / "bundle" / "templates" / "base.json").read_text(encoding="utf-8"))
    assert all(f"<code>{name}</code>" in page for name in base["knobs"])
    assert all((site / "models" / card.parents[1].name / "index.html").is_file() for card in CARDS)


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link rel="stylesheet")[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text("utf-8")
        )
        assert not loaded, page


def test_pictures_of_models_name_source_and_license() -> None:
    folder = ROOT / "docs" / "assets" / "models"
    credits = json.loads((folder / "credits.json").read_text(encoding="utf-8"))
    assert sorted(credits) == sorted(path.stem for path in folder.glob("*.png"))
    for name, credit in credits.items():
        assert credit["source"]
        assert credit["license"].startswith("CC")
        assert (ROOT / "bundles" / name / "models" / "model.pt").is_file()


def test_the_design_page_has_every_room_on_its_floor() -> None:
    page = (ROOT / "docs" / "explanation" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", page, re.MULTILINE)
    shown = {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}
    floors = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
    package = ROOT / "medseg"
    rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert shown == {room: floors[room] for room in rooms - {"__init__", "__main__"}}


def test_the_design_page_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "explanation" / "design.md").read_text(encoding="utf-8")
    flow = page.partition("## Data flow")[2].partition("## Decisions")[0]
    for path in re.findall(r"\b(\w+/\w+\.py)\b", flow):
        assert (ROOT / "medseg" / path).is_file(), path
