"""Starting the label server: what is refused before anything is loaded, and what is safe by default."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from medseg.errors import RequestError
from medseg.io.formats import FORMATS
from medseg.io.names import file_kind
from medseg.label import serve
from medseg.label.accounts import Accounts
from medseg.label.options import ENDINGS, LabelOptions, default_state, is_loopback


def test_all_files_that_are_read_whole_count_as_images_however_they_are_written() -> None:
    kinds = ("nifti", "nrrd", "meta", "mgh", "picture")
    assert {file_kind(f"a{ending}") for ending in ENDINGS} == set(kinds)
    assert set(FORMATS["picture"].images) <= set(ENDINGS)
    assert {".JPG", ".TIF", ".jpeg", ".tiff"} <= set(ENDINGS)


def test_it_listens_on_this_machine_and_asks_for_a_login_by_default(tmp_path: Path) -> None:
    options = LabelOptions(str(tmp_path), tmp_path)
    options.check()
    assert is_loopback(options.host)
    assert options.login


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False), ("pacs", False)],
)
def test_addresses_of_this_machine_are_told_from_others(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"studies": "missing"}, "no folder of studies"),
        pytest.param(
            *({"studies": "/proc"}, "cannot write to '/proc'"),
            marks=pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody may write to"),
        ),
        ({"port": 0}, "port 0"),
        ({"host": "0.0.0.0", "login": False, "encrypted": True}, "without login"),
        ({"host": "0.0.0.0"}, "in the clear"),
    ],
)
def test_what_is_not_safe_or_cannot_be_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        LabelOptions(**({"studies": str(tmp_path), "state": tmp_path} | changes)).check()  # type: ignore[arg-type]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.fixture
def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_a_port_that_is_taken_is_an_error_before_anything_is_changed(taken: int, tmp_path: Path, capsys) -> None:
    studies = tmp_path / "studies"
    studies.mkdir()
    command = ["--studies", str(studies), "--models", "hippocampus_mri_unet", "--state", str(tmp_path / "state")]
    assert serve.main([*command, "--port", str(taken)]) == 2
    said = capsys.readouterr().err
    assert f"port {taken}" in said
    assert "--port" in said
    assert not (tmp_path / "state").exists()


def test_a_second_server_does_not_empty_the_folders_of_the_first(free: int, tmp_path: Path, capsys) -> None:
    options = LabelOptions(str(tmp_path), tmp_path / "state", port=free)
    options.check_port()
    with options.alone():
        command = ["--studies", str(tmp_path), "--models", "hippocampus_mri_unet", "--state", str(tmp_path / "state")]
        assert serve.main([*command, "--port", str(free)]) == 2
        assert "another label server" in capsys.readouterr().err
    with options.alone():
        pass


@pytest.mark.parametrize(
    ("changes", "origin"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "::1", "port": 8010}, "http://[::1]:8010"),
        ({"host": "pacs", "encrypted": True}, "https://pacs:8000"),
    ],
)
def test_the_address_of_its_pages_is_a_valid_one(changes: dict[str, object], origin: str, tmp_path: Path) -> None:
    assert LabelOptions(str(tmp_path), tmp_path, **changes).origin == origin  # type: ignore[arg-type]


def test_options_reach_another_process_through_its_environment(tmp_path: Path) -> None:
    options = LabelOptions("http://pacs/dicom-web", tmp_path, (tmp_path / "a", tmp_path / "b"), ("x_y_z",))
    assert LabelOptions.from_environment(options.studies, options.environment()) == options
    assert LabelOptions.from_environment("s", {}).state == default_state()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--studies is needed"),
        (["--studies", "missing"], "no folder of studies"),
        (["--studies", ".", "--tls-key", "x"], "belong together"),
        (["--studies", ".", "--models", "spleen"], "no bundle 'spleen'"),
        (["--studies", ".", "--host", "0.0.0.0"], "in the clear"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert serve.main([*arguments, "--state", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_first_start_makes_an_account_and_shows_its_password_once(
    free: int, tmp_path: Path, capsys, monkeypatch
) -> None:
    started = []

    class Server:
        @staticmethod
        def run(options: LabelOptions, **_: object) -> None:
            started.append(options)

    monkeypatch.setattr(serve, "_server", lambda: Server)
    command = ["--studies", str(tmp_path), "--state", str(tmp_path / "state"), "--models", "hippocampus_mri_unet"]
    command += ["--port", str(free)]
    assert serve.main(command) == 0
    said = capsys.readouterr().err
    password = said.split("password: ")[1].split()[0]
    assert Accounts(started[0].accounts).check("annotator", password)
    assert "offered: hippocampus_mri_unet" in said
    assert serve.main(command) == 0
    assert "password" not in capsys.readouterr().err


def test_an_account_is_added_from_standard_input(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("correct horse battery\n"))
    assert serve.main(["--state", str(tmp_path), "--add-account", "bob"]) == 0
    assert Accounts(tmp_path / "accounts.json").check("bob", "correct horse battery")


def test_without_its_environment_the_error_names_the_command_that_makes_one(
    free: int, tmp_path: Path, capsys, monkeypatch
) -> None:
    def absent(name: str) -> object:
        raise ModuleNotFoundError("No module named 'monailabel'", name="monailabel")

    monkeypatch.setattr("importlib.import_module", absent)
    command = ["--studies", str(tmp_path), "--state", str(tmp_path / "state"), "--port", str(free)]
    assert serve.main(command) == 2
    assert "make label-server" in capsys.readouterr().err
