"""Pseudonyms in logs: file names, image ids and DICOM UIDs, which may identify patients, are replaced."""

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

# Shorter names would match within ordinary words and numbers.
_SHORTEST: Final = 3
_UID: Final = re.compile(r"(?<![\w.])[0-2](?:\.(?:0|[1-9]\d*)){4,}(?![\w])")
_QUERY: Final = re.compile(r"(?<=\?)[^\s\"']+")


def read_key(path: Path) -> bytes:
    """Return the secret key of the pseudonyms; the file is created on first use and readable by its owner only."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(secrets.token_bytes(32))
    return path.read_bytes()


class Pseudonyms:
    """Replaces known names, DICOM UIDs and the query strings of URLs.

    As long as the key stays, a name always has the same pseudonym, so all log lines about one image can be found.
    Without the key, a pseudonym cannot be reversed by trying names.

    Args:
        key: Secret key, as returned by `read_key`.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._names: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def of(self, name: str) -> str:
        """Return the pseudonym of a name: `case-` and ten hexadecimal digits."""
        return "case-" + hmac.new(self._key, name.encode(), hashlib.sha256).hexdigest()[:10]

    def learn(self, names: Iterable[str]) -> None:
        """Hide these names from now on: image ids, paths or file names."""
        new = {
            part for name in names for part in (name, Path(name).name, case_stem(name)) if len(part) >= _SHORTEST
        } - self._names
        if new:
            self._names |= new
            longest_first = sorted(self._names, key=len, reverse=True)
            self._pattern = re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, longest_first))})(?![^\W_])")

    def hide(self, text: str) -> str:
        """Return the text with each name replaced by its pseudonym."""
        if self._pattern is not None:
            text = self._pattern.sub(lambda found: self.of(found.group()), text)
        text = _UID.sub(lambda found: self.of(found.group()), text)
        return _QUERY.sub("...", text)


class HidingFilter(logging.Filter):
    """Filter for handlers that passes every record, with names hidden in its message and traceback.

    Args:
        pseudonyms: Names to hide.
    """

    def __init__(self, pseudonyms: Pseudonyms) -> None:
        super().__init__()
        self.pseudonyms = pseudonyms

    def filter(self, record: logging.LogRecord) -> bool:
        """Hide the names in the record and return True."""
        record.msg, record.args = self.pseudonyms.hide(record.getMessage()), ()
        if record.exc_info:
            # A formatter uses an existing `exc_text` instead of formatting the traceback again.
            record.exc_text = self.pseudonyms.hide(logging.Formatter().formatException(record.exc_info))
        return True
