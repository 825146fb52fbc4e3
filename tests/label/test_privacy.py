"""That logs name no patient."""

from __future__ import annotations

import io
import logging
import stat
from pathlib import Path

import pytest

from medseg.label.privacy import HidingFilter, Pseudonyms, read_key

UID = "1.2.826.0.1.3680043.8.498.45787841905473114233124723359129632652"


@pytest.fixture
def pseudonyms() -> Pseudonyms:
    return Pseudonyms(b"secret")


def test_the_same_name_has_the_same_pseudonym_under_one_key_only(pseudonyms: Pseudonyms) -> None:
    assert pseudonyms.of("MUELLER_HANS") == Pseudonyms(b"secret").of("MUELLER_HANS")
    assert pseudonyms.of("MUELLER_HANS") != Pseudonyms(b"other").of("MUELLER_HANS")
    assert pseudonyms.of("MUELLER_HANS") != pseudonyms.of("MUELLER_HANNE")


@pytest.mark.parametrize(
    "text",
    [
        "saved the label of MUELLER_HANS",
        "cannot read '/data/studies/MUELLER_HANS.nii.gz': damaged",
        "MUELLER_HANS.nii.gz, MUELLER_HANS",
        f"series {UID} is not there",
        "GET /datastore/image?image=MUELLER_HANS HTTP/1.1",
        "GET /infer/model?image=somebody_else_unknown HTTP/1.1",
    ],
)
def test_names_paths_uids_and_queries_are_hidden(pseudonyms: Pseudonyms, text: str) -> None:
    pseudonyms.learn(["/data/studies/MUELLER_HANS.nii.gz"])
    hidden = pseudonyms.hide(text)
    assert not any(part in hidden for part in ("MUELLER", "HANS", "1.2.826", "somebody"))


def test_what_names_nobody_stays(pseudonyms: Pseudonyms) -> None:
    pseudonyms.learn(["a", "scan1"])
    text = "epoch 3 of 10, loss 0.123, torch 2.13.0, 127.0.0.1, scan12, a mask"
    assert pseudonyms.hide(text) == text


def test_the_filter_hides_messages_arguments_and_tracebacks(pseudonyms: Pseudonyms) -> None:
    pseudonyms.learn(["MUELLER_HANS"])
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(HidingFilter(pseudonyms))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError("MUELLER_HANS cannot be read")
    except ValueError:
        logger.exception("failed on %s", "MUELLER_HANS")
    assert "MUELLER" not in stream.getvalue()
    assert "Traceback" in stream.getvalue()
    assert pseudonyms.of("MUELLER_HANS") in stream.getvalue()


def test_the_key_is_made_once_and_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "state" / "key"
    key = read_key(path)
    assert len(key) == 32
    assert read_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
