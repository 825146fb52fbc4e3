"""What the commands share: pages with examples and defaults, global options, `--json [FILE]`, completion."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from medseg.bundle.catalog import shipped_bundles
from medseg.cli import app, completion, console
from medseg.cli.options import with_options

ROOT: Any = typer.main.get_command(app)


def _pages(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _pages(command, (*path, name))
        else:
            yield (*path, name)


def _context(path: tuple[str, ...], arguments: list[str] | None = None) -> Any:
    """Parse the arguments of a command as the command line does."""
    parent = ROOT.context_class(ROOT, info_name="medseg")
    command = ROOT
    for number, name in enumerate(path, 1):
        command = command.commands[name]
        if number < len(path):
            parent = command.context_class(command, info_name=name, parent=parent)
    if arguments is None:
        return command.context_class(command, info_name=path[-1] if path else "medseg", parent=parent if path else None)
    return command.make_context(path[-1], arguments, parent=parent)


COMMANDS = [path for path in _pages() if path and not hasattr(_context(path).command, "commands")]


@pytest.mark.parametrize("path", list(_pages()), ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_each_page_ends_with_examples(medseg: Any, path: tuple[str, ...], option: str) -> None:
    code, out, err = medseg(*path, option)
    assert (code, err) == (0, "")
    assert "medseg " in out.partition("Examples")[2]
    assert "…" not in out, "something is cut at 80 columns"


def test_the_first_page_groups_the_commands_and_lists_the_exit_codes(medseg: Any) -> None:
    _, out, _ = medseg("--help")
    panels = re.findall(r"─ (\w+) ─", out)
    assert panels[-4:] == ["Use", "Train", "Judge", "Share"]
    assert "Exit codes" in out


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_each_example_is_a_valid_command(path: tuple[str, ...], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for line in _context(path).command.epilog.splitlines() if line.startswith("medseg ")]
    assert 1 <= len(lines) <= 2
    for line in lines:
        words = shlex.split(line.partition(" <")[0])[1:]
        assert tuple(words[: len(path)]) == path
        assert _context(path, words[len(path) :]).command is not None


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_each_option_is_described_with_its_default(path: tuple[str, ...]) -> None:
    context = _context(path)
    options = [param for param in context.command.get_params(context) if param.param_type_name == "option"]
    assert {"quiet", "verbose", "log_format"} <= {option.name for option in options}
    for option in options:
        assert option.help, option.name
        assert option.help[-1] in ".?", option.name
        has_default = isinstance(option.show_default, str) or option.default is not None
        assert option.required or option.is_flag or option.name == "json_target" or has_default, option.name


@pytest.mark.parametrize("place", ["before", "after"])
def test_global_options_count_wherever_they_stand(medseg: Any, place: str, tmp_path: Path) -> None:
    command = ["predict", "no_such_bundle", tmp_path, "-o", tmp_path / "out"]
    given = ["--log-format", "json"]
    code, _, err = medseg(*(given + command if place == "before" else command + given))
    assert code == 2
    assert json.loads(err)["level"] == "error"
    assert "Error" in medseg(*command)[2]


def test_quiet_and_verbose_exclude_each_other(medseg: Any) -> None:
    code, _, err = medseg("--quiet", "bundle", "list", "-v")
    assert code == 2
    assert "mutually exclusive" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict"], "Error: Missing argument 'BUNDLE'"),
        (["train", "x", "--data", "y", "--devices", "many"], "Error: Invalid value for '--devices'"),
        (["bundle", "lists"], "Error: No such command 'lists'"),
        (["predict", "x", "--outputs"], "Error: No such option: --outputs"),
    ],
)
def test_errors_of_the_command_line_begin_with_the_fault(medseg: Any, arguments: list[str], message: str) -> None:
    code, out, err = medseg(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)


@pytest.mark.parametrize(
    "path",
    [
        *((name,) for name in ("predict", "evaluate", "train", "plan", "compare", "doctor", "prune", "export")),
        *(("bundle", name) for name in ("list", "check", "inspect")),
    ],
    ids=" ".join,
)
def test_every_command_with_a_result_writes_json(path: tuple[str, ...]) -> None:
    (option,) = (param for param in _context(path).command.params if "--json" in param.opts)
    assert option.metavar == "[FILE]"


def test_json_without_a_file_is_all_of_standard_output(medseg: Any) -> None:
    code, out, _ = medseg("bundle", "list", "--json")
    assert code == 0
    assert [row["bundle"] for row in json.loads(out)] == [bundle.name for bundle in shipped_bundles()]
    assert json.loads(medseg("bundle", "list", "--json", "--quiet")[1]) == json.loads(out)
    assert "hippocampus_mri_unet" in medseg("bundle", "list")[1]


def test_json_goes_to_a_file_beside_the_table(medseg: Any, tmp_path: Path) -> None:
    code, out, _ = medseg("bundle", "list", "--json", tmp_path / "bundles.json")
    assert code == 0
    assert out == medseg("bundle", "list")[1]
    assert len(json.loads((tmp_path / "bundles.json").read_text())) == len(shipped_bundles())


@pytest.mark.parametrize(
    ("target", "message"),
    [("scan.nii.gz", "must end in .json"), ("missing/a.json", "no folder 'missing'")],
)
def test_json_replaces_no_file_that_is_hardly_meant(
    medseg: Any, target: str, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = medseg("bundle", "list", "--json", target)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_with_options_adds_what_was_given() -> None:
    assert with_options(["a=1"], device_name="cpu", max_memory=None, name="") == ["a=1", 'device_name="cpu"']


def test_names_are_completed() -> None:
    assert completion.bundle_names("hippocampus_mri_unetp") == ["hippocampus_mri_unetplusplus"]
    assert completion.export_formats("o") == ["onnx", "openvino"]
    assert "dicom-seg" in completion.mask_formats("d")
    assert completion.devices("c") == ["cpu", "cuda"]
    assert completion.splits("t") == ["train", "test"]
    assert "unet-port" in completion.weight_sources("unet")


@pytest.mark.parametrize(
    ("command", "name", "absent"),
    [
        ("train", "max_epochs=", "dataset_dir="),
        ("predict", "overlap=", "max_epochs="),
        ("evaluate", "overlap=", "resume="),
    ],
)
def test_the_settings_of_the_bundle_are_completed(command: str, name: str, absent: str) -> None:
    context = _context((command,))
    context.params["bundle"] = "hippocampus_mri_unet"
    offered = completion.setting_names(context, "")
    assert name in offered
    assert absent not in offered
    context.params["bundle"] = "no_such_bundle"
    assert completion.setting_names(context, "") == []


def test_the_shell_completes_without_loading_anything_heavy() -> None:
    code = (
        "import sys, atexit\n"
        "heavy = {'torch', 'monai', 'numpy', 'nibabel', 'SimpleITK', 'PIL'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "sys.argv = ['medseg']\n"
        "from medseg.cli import main\n"
        "main()\n"
    )
    asked = {"_MEDSEG_COMPLETE": "complete_bash", "COMP_WORDS": "medseg predict hippocampus_mri_b", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked}, timeout=60
    )
    assert done.stdout.split() == ["hippocampus_mri_banet"]
    assert "HEAVY []" in done.stderr


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    yield
    console.reset()
