"""Caches of preprocessed cases: in memory up to a limit, and on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from monai.data import MetaTensor
from monai.data.utils import pickle_hashing

from medseg.errors import OutputError
from medseg.files import replacing
from medseg.machine import available_bytes, parse_memory
from medseg.notices import CaseWarning, forward, warn
from medseg.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["DiskCache", "memory_bound", "size_of", "strip_metadata"]

logger = logging.getLogger(__name__)

Case = dict[str, Any]

_WARNINGS = "warnings"


def strip_metadata(case: Mapping[str, Any]) -> Case:
    """Return a preprocessed case reduced to what training needs: contiguous tensors with their affines.

    The applied operations and the header of a `MetaTensor` would be copied with every sample and would keep large
    arrays in memory.
    """
    return {key: _bare_value(value) for key, value in case.items()}


def _bare_value(value: Any) -> Any:
    if isinstance(value, MetaTensor):
        return MetaTensor(value.as_tensor().contiguous(), affine=value.affine.clone())
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def size_of(value: Any) -> int:
    """Return the memory of all tensors in a case, in bytes."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(size_of(each) for each in value.values())
    return sum(size_of(each) for each in value) if isinstance(value, list) else 0


def memory_bound(text: str) -> int:
    """Return the memory limit of the cache in this process, in bytes.

    Args:
        text: "auto" for half of the free memory, divided among the training processes of this machine; an amount such
            as "4G"; or "0" to disable the cache.

    Raises:
        RequestError: Invalid amount.
    """
    if text == "auto":
        return available_bytes() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if text.strip() == "0" else parse_memory(text)


class DiskCache:
    """Cache preprocessed cases on disk, one file per case, named by a hash of its inputs.

    The hash covers the input files, the preprocessing and the version of medseg, so a stale file is never read. An
    unreadable file is discarded and the case is preprocessed again.

    Args:
        folder: Folder of the cache, created with the first file.
        steps: Deterministic transforms that preprocess the cases.
    """

    def __init__(self, folder: Path, steps: Sequence[Any]) -> None:
        self.folder = folder
        self.recipe = _digest_of(steps)

    def load(self, case: Mapping[str, Any]) -> Case | None:
        """Return the preprocessed case, or None if it is not in the cache."""
        path = self._path(case)
        if not path.is_file():
            return None
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            said = [CaseWarning(*entry) for entry in stored.pop(_WARNINGS, [])]
            found = {key: _from_stored(value) for key, value in stored.items()}
        except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as error:
            text = f"damaged cache file ({type(error).__name__}); the case is preprocessed again"
            warn(logger, "cache-damaged", text, path, run=True)
            return None
        forward(said)
        return found

    def save(self, case: Mapping[str, Any], prepared: Case, warnings: Sequence[CaseWarning] = ()) -> None:
        """Write a preprocessed case; if the disk is full, warn and continue without the cache.

        Args:
            case: Input paths by key.
            prepared: Preprocessed case from `strip_metadata`.
            warnings: Warnings raised during preprocessing, repeated whenever the case is loaded.
        """
        path = self._path(case)
        content = {key: _to_stored(value) for key, value in prepared.items()}
        if warnings:
            content[_WARNINGS] = [[each.code, each.text, each.file] for each in warnings]
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                torch.save(content, file)
        except (OutputError, RuntimeError) as error:
            warn(logger, "cache-not-written", f"cannot write a preprocessed case to the cache: {error}", run=True)

    def _path(self, case: Mapping[str, Any]) -> Path:
        content = [self.recipe, sorted((key, str(value), _mark(value)) for key, value in case.items())]
        return self.folder / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()}.pt"


def _digest_of(steps: Sequence[Any]) -> str:
    try:
        return f"{__version__}-{pickle_hashing(list(steps)).decode()}"
    except (pickle.PicklingError, TypeError, AttributeError):
        # Transforms that cannot be pickled cannot be hashed, so their cache is not shared between runs.
        return f"{__version__}-{os.getpid()}-{os.urandom(8).hex()}"


def _mark(value: Any) -> str:
    """Return a hash of the names, sizes and modification times of the files of one input."""
    path = Path(str(value).split("::")[0])
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        marks = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError:
        return ""
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()


def _to_stored(value: Any) -> Any:
    if isinstance(value, MetaTensor):
        return {"tensor": value.as_tensor(), "affine": value.affine}
    return value


def _from_stored(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"tensor", "affine"}:
        return MetaTensor(value["tensor"], affine=value["affine"])
    return value
