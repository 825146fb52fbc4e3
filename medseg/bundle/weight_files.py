"""What a weight file would do when it is read, found out without torch: what it calls, and how large it may become."""

from __future__ import annotations

import pickletools
import zipfile
from typing import TYPE_CHECKING, Final

from medseg.bundle.trust import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["find_pickled", "weights_problem"]

_MAX_PICKLE_BYTES: Final = 16 * 2**20
_MAX_CALLS: Final = 20

# What a state dict of tensors names in its pickle.
_TENSOR_NAMES: Final = frozenset(
    {
        *("collections OrderedDict", "torch.storage UntypedStorage", "torch.storage TypedStorage"),
        *(f"torch._utils _rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
        *(
            f"torch {kind}Storage"
            for kind in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
        ),
        *("torch Size", "torch uint16", "torch uint32", "torch uint64", "torch bfloat16"),
        *(f"torch float{bits}" for bits in (16, 32, 64)),
    }
)
# Opcodes that call or name things in ways that a state dict does not need.
_CALLING: Final = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"})


def find_pickled(path: Path, name: str) -> Iterator[Finding]:
    """Yield what a weight file is besides tensors, as torch would read it. Nothing is unpickled.

    Args:
        path: the file.
        name: how it is called in findings.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [info for info in archive.infolist() if info.filename.endswith(".pkl")]
            if any(info.filename.endswith("/constants.pkl") for info in pickles):
                yield Finding(name, "weights", "TorchScript", False, "a program, not tensors")
                return
            if problem := weights_problem(archive, path.stat().st_size):
                yield Finding(name, "weights", f"{len(pickles)} pickles", False, problem)
                return
            calls = _calls(archive.read(pickles[0]))
        yield from (Finding(name, "weights", call, False, "more than tensors") for call in calls)
    except Exception as error:  # whatever the parsers of the standard library make of it
        reason = "not a file that torch.save writes since version 1.6"
        yield Finding(name, "weights", f"{type(error).__name__}: {error}", False, reason)


def weights_problem(archive: zipfile.ZipFile, size: int) -> str:
    """Say what about a weight file is not as `torch.save` writes it, and could fill the memory; empty if nothing is.

    Torch also reads packed records, which may unpack to a thousand times their size.

    Args:
        archive: the weight file.
        size: its bytes.
    """
    entries = archive.infolist()
    pickles = [info for info in entries if info.filename.endswith(".pkl")]
    stored = all(info.compress_type == zipfile.ZIP_STORED for info in entries)
    if not stored or sum(info.file_size for info in entries) > size:
        return "packed, or larger than its file; torch.save writes weights as they are"
    return "" if len(pickles) == 1 and pickles[0].file_size <= _MAX_PICKLE_BYTES else "not what torch.save writes"


def _calls(content: bytes) -> list[str]:
    """Return the first things that a pickle names, besides what tensors need."""
    found: dict[str, None] = {}
    for code, argument, _ in pickletools.genops(content):
        if code.name in _CALLING:
            found[f"{code.name} {argument or ''}".strip()] = None
        elif code.name == "GLOBAL" and argument not in _TENSOR_NAMES:
            found[str(argument).replace(" ", ".")] = None
        if len(found) == _MAX_CALLS:
            break
    return list(found)
