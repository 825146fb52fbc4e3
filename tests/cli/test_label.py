"""`medseg label`: options become those of the server, and accounts come from standard input."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest

from medseg.cli import label
from medseg.label.accounts import Accounts
from medseg.label.options import LabelOptions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--studies'"),
        (["--studies", "missing"], "no such folder of studies"),
        (["--studies", ".", "--tls-key", "x"], "give both, or neither"),
        (["--studies", ".", "--tls-key", "x", "--tls-certificate", "y"], "no such file 'y'"),
        (["--studies", ".", "--models", "spleen"], "no bundle 'spleen'"),
        (["--studies", ".", "--host", "0.0.0.0"], "no encryption"),
    ],
)
def test_an_invalid_request_names_the_fault(medseg: Any, arguments: list[str], message: str, tmp_path: Path) -> None:
    code, out, err = medseg("label", "serve", *arguments, "--state", tmp_path)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())


def _served(monkeypatch: pytest.MonkeyPatch, *, end: type[BaseException] | None = None) -> list[tuple[Any, ...]]:
    served: list[tuple[Any, ...]] = []

    def serve(options: LabelOptions, *, say: Any, certificate: Path | None, key: Path | None) -> None:
        served.append((options, certificate, key))
        say("serving: x")
        if end is not None:
            raise end

    monkeypatch.setattr(label.label_server, "serve", serve)
    return served


def test_all_options_reach_the_server(medseg: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).touch()
    served = _served(monkeypatch)
    arguments = ["--studies", "scans", "--bundles", "a", "--bundles", "b", "--models", "m", "--state", "s"]
    arguments += ["--host", "pacs", "--port", "8010", "--no-login", "--behind-proxy"]
    arguments += ["--tls-certificate", "cert.pem", "--tls-key", "key.pem"]
    code, out, _ = medseg("label", "serve", *arguments)
    assert (code, out) == (0, "serving: x\n")
    options = LabelOptions(
        str(tmp_path / "scans"), tmp_path / "s", (tmp_path / "a", tmp_path / "b"), ("m",), "pacs", 8010, False, True
    )
    assert served == [(options, Path("cert.pem"), Path("key.pem"))]


def test_a_store_stays_an_address_and_ctrl_c_ends_the_server(
    medseg: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served = _served(monkeypatch, end=KeyboardInterrupt)
    code, _, err = medseg("label", "serve", "--studies", "http://pacs/dicom-web", "--state", tmp_path)
    assert code == 0
    assert "Label server stopped." in err
    assert served[0][0].studies == "http://pacs/dicom-web"
    assert not served[0][0].encrypted


def test_an_account_is_added_from_standard_input(medseg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("correct horse battery\n"))
    code, out, _ = medseg("label", "add-account", "bob", "--state", tmp_path)
    assert (code, out) == (0, "account 'bob' added\n")
    assert Accounts(tmp_path / "accounts.json").check("bob", "correct horse battery")


def test_the_log_is_left_to_the_server(
    medseg: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def serve(*_: Any, **__: Any) -> None:
        logging.getLogger("uvicorn").warning("up")
        logging.getLogger("medseg.label").warning("no images yet")

    monkeypatch.setattr(label.label_server, "serve", serve)
    code, out, err = medseg("label", "serve", "--studies", tmp_path, "--state", tmp_path)
    assert (code, out, err) == (0, "", "")
    assert caplog.messages == ["up", "no images yet"]
