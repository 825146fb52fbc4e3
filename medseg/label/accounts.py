"""Accounts of a label server: names and hashed passwords in one file that only its owner can read."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import RequestError
from medseg.files import replace_text

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Accounts"]

MIN_LENGTH: Final = 12
# One login costs 16 MiB of memory and well under a second, and so does each guess of an attacker.
_SCRYPT: Final = {"n": 2**14, "r": 8, "p": 1}


class Accounts:
    """The accounts in a file.

    Args:
        path: JSON file, created with the first account.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def names(self) -> list[str]:
        """Names of all accounts, sorted."""
        return sorted(self._read())

    def add(self, name: str, password: str | None = None) -> str:
        """Add an account, or change the password of an existing one, and return the password.

        Args:
            name: Name of letters, digits, `.`, `_`, `-` and `@`.
            password: Password of at least `MIN_LENGTH` characters; generated randomly by default.

        Raises:
            RequestError: Invalid name, or password too short.
        """
        if not name or not all(letter.isalnum() or letter in "._-@" for letter in name):
            raise RequestError(f"invalid account name '{name}': use letters, digits and . _ - @")
        chosen = secrets.token_urlsafe(12) if password is None else password
        if len(chosen) < MIN_LENGTH:
            raise RequestError(f"password too short: {len(chosen)} characters, expected {MIN_LENGTH} or more")
        salt = secrets.token_bytes(16)
        accounts = self._read() | {name: {"salt": _text(salt), "hash": _text(_hashed(chosen, salt))}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch(mode=0o600)
        replace_text(self.path, json.dumps(accounts, indent=2) + "\n")
        self.path.chmod(0o600)
        return chosen

    def check(self, name: str, password: str) -> bool:
        """Return whether the name and the password match an account, in the same time for an unknown name."""
        account = self._read().get(name)
        salt = base64.b64decode(account["salt"]) if account else bytes(16)
        expected = base64.b64decode(account["hash"]) if account else bytes(64)
        return hmac.compare_digest(_hashed(password, salt), expected) and account is not None

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(
                f"'{self.path}': cannot read the accounts ({error}): restore the file, or remove it"
            ) from error
        if not isinstance(content, dict):
            raise RequestError(f"'{self.path}': expected a JSON object of accounts: restore the file, or remove it")
        return content


def _hashed(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, dklen=64, **_SCRYPT)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
