"""Static checks of weight files, without torch: calls in their pickles, and their size when loaded."""

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

# Names in the pickle of a state dict of tensors.
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
# Opcodes that call or look up objects and that a state dict does not need.
_CALLING: Final = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"})


def find_pickled(path: Path, name: str) -> Iterator[Finding]:
    """Yield everything in a weight file besides tensors. Nothing is unpickled.

    Args:
        path: Weight file.
        name: Name of the file in the findings.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [info for info in archive.infolist() if info.filename.endswith(".pkl")]
            if any(info.filename.endswith("/constants.pkl") for info in pickles):
                yield Finding(name, "weights", "TorchScript", False, "contains executable code, not only tensors")
                return
            if problem := weights_problem(archive, path.stat().st_size):
                yield Finding(name, "weights", f"{len(pickles)} pickles", False, problem)
                return
            calls = _calls(archive.read(pickles[0]))
        yield from (Finding(name, "weights", call, False, "not part of a state dict of tensors") for call in calls)
    except Exception as error:  # the parsers raise many types on damaged files
        reason = "not in the zip format of torch.save (since torch 1.6)"
        yield Finding(name, "weights", f"{type(error).__name__}: {error}", False, reason)


def weights_problem(archive: zipfile.ZipFile, size: int) -> str:
    """Return why loading a weight file could exhaust the memory; empty if it has the form that `torch.save` writes.

    Torch also reads compressed records, which may expand to a thousand times their size.

    Args:
        archive: Open weight file.
        size: Size of the file in bytes.
    """
    entries = archive.infolist()
    pickles = [info for info in entries if info.filename.endswith(".pkl")]
    stored = all(info.compress_type == zipfile.ZIP_STORED for info in entries)
    if not stored or sum(info.file_size for info in entries) > size:
        return "compressed, or larger than its file; torch.save stores weights uncompressed"
    return "" if len(pickles) == 1 and pickles[0].file_size <= _MAX_PICKLE_BYTES else "not in the format of torch.save"


def _calls(content: bytes) -> list[str]:
    """Return the first names and calls in a pickle that tensors do not need."""
    found: dict[str, None] = {}
    for code, argument, _ in pickletools.genops(content):
        if code.name in _CALLING:
            found[f"{code.name} {argument or ''}".strip()] = None
        elif code.name == "GLOBAL" and argument not in _TENSOR_NAMES:
            found[str(argument).replace(" ", ".")] = None
        if len(found) == _MAX_CALLS:
            break
    return list(found)
