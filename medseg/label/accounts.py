"""Who may use a label server: names and hashed passwords in one file that only its owner can read."""

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
# Memory 16 MiB, well under a second: what a guess costs, too.
_SCRYPT: Final = {"n": 2**14, "r": 8, "p": 1}


class Accounts:
    """The accounts in a file.

    Args:
        path: JSON file, made with the first account.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def names(self) -> list[str]:
        """Names of all accounts, sorted."""
        return sorted(self._read())

    def add(self, name: str, password: str | None = None) -> str:
        """Add an account, or give one another password; return the password.

        Args:
            name: letters, digits, and `.`, `_`, `-`, `@` within.
            password: at least `MIN_LENGTH` characters; a random one if not given.

        Raises:
            RequestError: the name or the password will not do.
        """
        if not name or not all(letter.isalnum() or letter in "._-@" for letter in name):
            raise RequestError(f"'{name}' is no name for an account: use letters, digits and . _ - @")
        chosen = secrets.token_urlsafe(12) if password is None else password
        if len(chosen) < MIN_LENGTH:
            raise RequestError(f"the password has {len(chosen)} characters: use {MIN_LENGTH} or more")
        salt = secrets.token_bytes(16)
        accounts = self._read() | {name: {"salt": _text(salt), "hash": _text(_hashed(chosen, salt))}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch(mode=0o600)
        replace_text(self.path, json.dumps(accounts, indent=2) + "\n")
        self.path.chmod(0o600)
        return chosen

    def check(self, name: str, password: str) -> bool:
        """Whether there is an account of that name and password. Takes as long for an unknown name."""
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
            raise RequestError(f"the accounts in '{self.path}' cannot be read ({error}): remove the file") from error
        if not isinstance(content, dict):
            raise RequestError(f"'{self.path}' holds no accounts: remove the file, or restore it")
        return content


def _hashed(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, dklen=64, **_SCRYPT)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
