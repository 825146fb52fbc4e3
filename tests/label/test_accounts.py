"""Accounts of the label server."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from medseg.errors import RequestError
from medseg.label.accounts import Accounts


def test_the_right_password_only(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path / "state" / "accounts.json")
    password = accounts.add("ann")
    accounts.add("bob", "correct horse battery")
    assert accounts.names == ["ann", "bob"]
    assert accounts.check("ann", password)
    assert accounts.check("bob", "correct horse battery")
    assert not accounts.check("ann", "correct horse battery")
    assert not accounts.check("eve", password)
    assert not accounts.check("ann", "")


def test_the_file_is_its_owners_and_holds_no_password(tmp_path: Path) -> None:
    path = tmp_path / "accounts.json"
    Accounts(path).add("bob", "correct horse battery")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "correct" not in path.read_text()


def test_random_passwords_differ_and_another_one_replaces_the_first(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path / "accounts.json")
    first, second = accounts.add("ann"), accounts.add("ann")
    assert first != second
    assert not accounts.check("ann", first)
    assert accounts.check("ann", second)


@pytest.mark.parametrize(
    ("name", "password"), [("", "long enough it is"), ("a b", "long enough it is"), ("ann", "short")]
)
def test_names_and_passwords_that_will_not_do_are_refused(name: str, password: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        Accounts(tmp_path / "accounts.json").add(name, password)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_lets_nobody_in(content: str, tmp_path: Path) -> None:
    (tmp_path / "accounts.json").write_text(content)
    with pytest.raises(RequestError, match=r"accounts\.json"):
        Accounts(tmp_path / "accounts.json").check("ann", "whatever it was")
