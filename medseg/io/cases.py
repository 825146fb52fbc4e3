"""What there is to predict: a file, a list of files, a folder or a data set becomes a list of cases.

This runs before arguments are checked, so nothing beyond the standard library is imported and no image is opened.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from medseg.errors import RequestError
from medseg.io.datasets import (
    DATASET_FILE,
    SPLIT_FILE,
    common_folder,
    prediction_entries,
    read_dataset,
    split_stems,
)
from medseg.io.names import IMAGE_SUFFIXES, StrPath, absolute, file_kind, mask_name

__all__ = ["CaseList", "LeftOut", "find_cases", "list_cases"]


@dataclass(frozen=True)
class LeftOut:
    """One file or folder that is not predicted.

    Attributes:
        path: where it is.
        reason: why it was left out, as half a sentence.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class CaseList:
    """The cases of a request.

    Attributes:
        cases: one `{"image": ..., "name": ...}` per case, sorted by name.
        left_out: what was seen and is not predicted.
    """

    cases: list[dict[str, str]]
    left_out: list[LeftOut]


def find_cases(path: StrPath | Sequence[StrPath], *, pattern: str | None = None) -> list[dict[str, str]]:
    """List the images to predict; `list_cases` also says what was left out.

    Args:
        path: an image, a list of images, a folder (searched with its subfolders, without hidden files and without
            following links to folders) or a `dataset.json`, of which the "test" list counts, else "validation". A
            folder that is a data set, with `dataset.json` or `split.json`, is taken as that data set; for all its
            images name the folder `images/` itself.
        pattern: take only files whose name matches, such as `"*_t1.nii.gz"`; with a `/` in it, files whose path below
            the folder matches.

    Returns:
        One `{"image": ..., "name": ...}` per case, sorted by name: an absolute path, and the name of the mask relative
        to the folder that all images share, such as `sub/case1.nii.gz`. Masks of pictures are called `.png`.

    Raises:
        RequestError: nothing was found, something does not exist, or two images would share one mask name.
    """
    return list_cases(path, pattern=pattern).cases


def list_cases(path: StrPath | Sequence[StrPath], *, pattern: str | None = None) -> CaseList:
    """List the images to predict like `find_cases`, together with what was left out and why."""
    if not isinstance(path, str | os.PathLike):
        images = [_existing_file(absolute(item)) for item in path]
        return _listing(images, [], pattern, "the list of files")
    given = absolute(path)
    if given.is_dir():
        images, left_out = _folder_images(given)
        base = None if _is_dataset(given) else given
        return _listing(images, left_out, pattern, str(given), base)
    if given.suffix.lower() == ".json":
        return _listing(prediction_entries(_existing(given)), [], pattern, str(given))
    return _listing([_existing_file(given)], [], pattern, str(given))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise RequestError(f"{path} does not exist: check the path.")
    return path


def _existing_file(path: Path) -> Path:
    if _existing(path).is_dir():
        raise RequestError(f"{path} is a folder: give it alone, not in a list of files.")
    reason = _refusal(path)
    if reason:
        raise RequestError(f"{path} is not predicted: {reason}. Expected a file ending in {_expected()}.")
    return path


def _expected() -> str:
    return ", ".join(IMAGE_SUFFIXES)


def _refusal(path: Path) -> str:
    """Say why a file is no image that medseg reads; empty if it is one."""
    if file_kind(path) is not None:
        return ""
    if path.suffix.lower() in (".hdr", ".img"):
        return "a header and voxels in two files (.hdr, .img) are not read; convert it to .nii.gz"
    return "not an image format that medseg reads"


def _is_dataset(folder: Path) -> bool:
    return (folder / DATASET_FILE).is_file() or (folder / SPLIT_FILE).is_file()


def _folder_images(folder: Path) -> tuple[list[Path], list[LeftOut]]:
    """Return the images of a folder, or of the data set that the folder is, and what was left out."""
    if (folder / DATASET_FILE).is_file():
        images = prediction_entries(folder / DATASET_FILE)
    elif (folder / SPLIT_FILE).is_file():
        dataset = read_dataset(folder)
        images = [dataset.images[stem] for stem in split_stems(dataset)["val"]]
    else:
        found = list(_walk(folder))
        return [p for p, reason in found if not reason], [LeftOut(str(p), reason) for p, reason in found if reason]
    chosen = set(images)
    rest = [(p, reason or "not among the data set's cases to predict") for p, reason in _walk(folder)]
    return images, [LeftOut(str(p), reason) for p, reason in rest if p not in chosen]


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file below a folder in sorted order, with the reason to leave it out or an empty text."""
    for where, subfolders, names in os.walk(folder, onerror=_refuse_unreadable):
        subfolders.sort()
        for name in [name for name in subfolders if name.startswith(".") or name == "__MACOSX"]:
            subfolders.remove(name)
            yield Path(where, name), "hidden folder"
        yield from ((Path(where, name), "link to a folder") for name in subfolders if Path(where, name).is_symlink())
        for name in sorted(names):
            path = Path(where, name)
            yield path, "hidden file" if name.startswith(".") else _refusal(path)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise RequestError(f"{error.filename} cannot be searched: {error.strerror}.") from error


def _listing(
    images: list[Path], left_out: list[LeftOut], pattern: str | None, source: str, base: Path | None = None
) -> CaseList:
    """Name the cases and check that there are any; `base` is the folder that names are relative to."""
    base = base or (common_folder(images) if images else None)
    chosen = [path for path in images if base and _matches(path.relative_to(base), pattern)]
    taken = set(chosen)
    skipped = [LeftOut(str(path), f"does not match {pattern!r}") for path in images if path not in taken]
    if not chosen or base is None:
        looked_for = f"files ending in {_expected()}" + (f" that match {pattern!r}" if pattern else "")
        raise RequestError(f"Nothing to predict in {source}: looked for {looked_for}; {_seen(left_out + skipped)}.")
    cases = sorted(_named(chosen, base).items())
    return CaseList([{"image": str(path), "name": name} for name, path in cases], left_out + skipped)


def _matches(relative: Path, pattern: str | None) -> bool:
    if pattern is None:
        return True
    return fnmatchcase(relative.as_posix() if "/" in pattern else relative.name, pattern)


def _seen(left_out: Sequence[LeftOut]) -> str:
    """Say what was there instead, counted by suffix."""
    if not left_out:
        return "saw no files at all"
    kinds = Counter("".join(Path(item.path).suffixes[-2:]) or Path(item.path).name for item in left_out)
    return "saw " + ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5))


def _named(images: Sequence[Path], base: Path) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in images:
        name = mask_name(path.relative_to(base).as_posix())
        if name in named:
            raise RequestError(f"{named[name]} and {path} would share the mask name {name}: rename or leave out one.")
        named[name] = path
    return named
