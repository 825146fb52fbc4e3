"""Keeping names of patients out of logs: file names, image ids and DICOM UIDs become pseudonyms."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Final

from medseg.io.names import case_stem

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["HidingFilter", "Pseudonyms", "read_key"]

# Shorter names would be found within ordinary words and numbers.
_SHORTEST: Final = 3
_UID: Final = re.compile(r"(?<![\w.])[0-2](?:\.(?:0|[1-9]\d*)){4,}(?![\w])")
_QUERY: Final = re.compile(r"(?<=\?)[^\s\"']+")


def read_key(path: Path) -> bytes:
    """Return the secret that pseudonyms are made with, made on first use and readable by its owner alone."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(secrets.token_bytes(32))
    return path.read_bytes()


class Pseudonyms:
    """Replaces what it was told to hide, and everything that is a DICOM UID or the query of an address.

    The same name gives the same pseudonym as long as the key stays, so the lines on one image can be found. Without the
    key nobody can try names until one fits.

    Args:
        key: secret.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._names: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def of(self, name: str) -> str:
        """Return the pseudonym of a name: `case-` and ten hexadecimal digits."""
        return "case-" + hmac.new(self._key, name.encode(), hashlib.sha256).hexdigest()[:10]

    def learn(self, names: Iterable[str]) -> None:
        """Hide these names from now on: image ids, paths, or names of files."""
        new = {
            part for name in names for part in (name, Path(name).name, case_stem(name)) if len(part) >= _SHORTEST
        } - self._names
        if new:
            self._names |= new
            longest_first = sorted(self._names, key=len, reverse=True)
            self._pattern = re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, longest_first))})(?![^\W_])")

    def hide(self, text: str) -> str:
        """Return the text without the names."""
        if self._pattern is not None:
            text = self._pattern.sub(lambda found: self.of(found.group()), text)
        text = _UID.sub(lambda found: self.of(found.group()), text)
        return _QUERY.sub("...", text)


class HidingFilter(logging.Filter):
    """Lets every record pass, with names hidden in its message and its traceback. For handlers.

    Args:
        pseudonyms: what to hide.
    """

    def __init__(self, pseudonyms: Pseudonyms) -> None:
        super().__init__()
        self.pseudonyms = pseudonyms

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; return True."""
        record.msg, record.args = self.pseudonyms.hide(record.getMessage()), ()
        if record.exc_info:
            # A formatter takes the text that is there instead of making it anew.
            record.exc_text = self.pseudonyms.hide(logging.Formatter().formatException(record.exc_info))
        return True
