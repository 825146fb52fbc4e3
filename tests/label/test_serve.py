"""Starting the label server: what is refused before anything is loaded, and what is safe by default."""

from __future__ import annotations

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
        ({"studies": "missing"}, "no such folder of studies"),
        pytest.param(
            *({"studies": "/proc"}, "cannot write to '/proc'"),
            marks=pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody may write to"),
        ),
        ({"port": 0}, "port 0"),
        ({"host": "0.0.0.0", "login": False, "encrypted": True}, "no login"),
        ({"host": "0.0.0.0"}, "no encryption"),
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


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that MONAI Label is installed."""
    monkeypatch.setattr(serve, "_check_environment", lambda: None)


def _options(place: Path, port: int) -> LabelOptions:
    return LabelOptions(str(place), place / "state", models=("hippocampus_mri_unet",), port=port)


def test_a_port_that_is_taken_is_an_error_before_anything_is_changed(taken: int, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"port {taken}.*--port"):
        serve.serve(_options(tmp_path, taken), say=print)
    assert not (tmp_path / "state").exists()


def test_a_second_server_does_not_empty_the_folders_of_the_first(installed: None, free: int, tmp_path: Path) -> None:
    options = _options(tmp_path, free)
    options.check_port()
    with options.alone(), pytest.raises(RequestError, match="another label server"):
        serve.serve(options, say=print)
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


def test_the_first_start_makes_an_account_and_shows_its_password_once(
    installed: None, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Server:
        @staticmethod
        def run(options: LabelOptions, **_: object) -> None:
            started.append(options)

    monkeypatch.setattr(serve, "_server", lambda: Server)
    said: list[str] = []
    serve.serve(_options(tmp_path, free), say=said.append)
    assert any("serving: hippocampus_mri_unet" in line for line in said)
    password = said[-1].split("password: ")[1].split()[0]
    assert Accounts(started[0].accounts).check("annotator", password)
    again: list[str] = []
    serve.serve(_options(tmp_path, free), say=again.append)
    assert not any("password" in line for line in again)


def test_without_its_environment_nothing_is_made_and_the_error_says_how_to_make_one(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="no module 'monailabel'") as error:
        serve.serve(_options(tmp_path, free), say=print)
    assert "make label-environment" in str(error.value)
    assert "pip install --no-deps --requirement constraints-label.txt" in str(error.value)
    assert not (tmp_path / "state").exists()


def test_an_incomplete_environment_is_named_too(
    installed: None, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> object:
        raise ModuleNotFoundError("No module named 'jwt'", name="jwt")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(RequestError, match="no module 'jwt'"):
        serve.serve(_options(tmp_path, free), say=lambda line: None)
