"""What surrounds the package: workflows, pre-commit hooks, citation, versions, changelog."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from medseg.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
REPOSITORY = "https://github.com/medseg/medseg"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    return tomllib.loads(text("pyproject.toml"))["project"]


def jobs(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values())


def recipe(target: str) -> list[str]:
    """Return the commands of a target of the Makefile, with its variables."""
    lines = text("Makefile").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{target}:"))
    body = itertools.takewhile(bool, lines[start + 1 :])
    return [line.strip() for line in body if line.startswith("\t")]


def choices(job: dict[str, Any], expression: str) -> list[str]:
    """Return the values of a matrix expression, or the text itself."""
    found = re.fullmatch(r"\$\{\{ matrix\.(\w+) \}\}", expression)
    return job["strategy"]["matrix"][found[1]] if found else [expression]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_nothing_but_targets_of_the_makefile(path: Path) -> None:
    for job in jobs(path):
        for step in job["steps"]:
            program, _, rest = step.get("run", "make test").partition(" ")
            assert program == "make"
            for target in choices(job, rest if rest.startswith("$") else rest.split()[0]):
                assert recipe(target)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_write_only_where_it_publishes(path: Path) -> None:
    whole = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert whole["permissions"] == {"contents": "read"}
    for job in jobs(path):
        assert job["timeout-minutes"] <= 120
        assert not job.get("permissions") or "environment" in job


def test_the_tests_run_on_every_python_that_is_promised() -> None:
    (job,) = jobs(ROOT / ".github" / "workflows" / "tests.yml")
    classifiers = [line.rpartition(" ")[2] for line in project()["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert job["strategy"]["matrix"]["python"] == classifiers
    assert project()["requires-python"] == f">={classifiers[0]}"


def test_pre_commit_runs_what_make_lint_runs() -> None:
    (local,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    hooks = [hook["entry"] for hook in local["hooks"]]
    commands = [command.replace("$(BIN)", ".venv/bin") for command in recipe("lint")]
    assert len(hooks) == len(commands)
    assert all(command.startswith(hook) for hook, command in zip(hooks, commands, strict=True))


def test_each_hook_finds_its_files() -> None:
    (local,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.yml")] + ["CITATION.cff"]
    for hook in local["hooks"]:
        if "files" in hook:
            assert any(re.search(hook["files"], name) for name in files), hook["id"]


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == __version__
    released = re.search(rf"^## {re.escape(__version__)} \((\d{{4}}-\d\d-\d\d)\)$", text("CHANGELOG.md"), re.MULTILINE)
    assert str(citation.get("date-released", "")) == (released[1] if released else "")


def test_the_changelog_has_one_dated_section_per_version() -> None:
    first, *others = re.findall(r"^## (.+)$", text("CHANGELOG.md"), re.MULTILINE)
    dated = others if first == "Unreleased" else [first, *others]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", section) for section in dated)
    assert len(set(dated)) == len(dated)


def test_the_project_is_in_one_place() -> None:
    urls = project()["urls"]
    assert urls["Source"] == yaml.safe_load(text("CITATION.cff"))["repository-code"] == REPOSITORY
    assert f"repo_url: {REPOSITORY}" in text("mkdocs.yml")
    assert f"site_url: {urls['Documentation']}" in text("mkdocs.yml")
    chooser = yaml.safe_load(text(".github/ISSUE_TEMPLATE/config.yml"))
    assert all(link["url"].startswith(REPOSITORY) for link in chooser["contact_links"])
