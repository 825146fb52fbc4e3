"""Listing the cases to predict in a file, a list of files, a folder or a data set.

This runs before arguments are checked, so only the standard library is imported and no image is opened. Only the
headers of files that are DICOM by their first bytes are read, to group them into series.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from medseg.errors import CaseError, RequestError
from medseg.io.datasets import (
    DATASET_FILE,
    SPLIT_FILE,
    common_folder,
    prediction_entries,
    read_dataset,
    read_json,
    split_stems,
)
from medseg.io.dicom.detect import DIRECTORY_FILE, is_dicom, named_file, split_series
from medseg.io.names import IMAGE_SUFFIXES, StrPath, absolute, case_kind, file_kind, mask_name, split_suffix
from medseg.types import Case, CaseKind, Skipped

if TYPE_CHECKING:
    from medseg.io.dicom.headers import Header
    from medseg.io.dicom.series import Group

__all__ = ["CaseList", "find_cases", "list_cases"]

_TIFF: Final = (".tif", ".tiff")


@dataclass(frozen=True)
class CaseList:
    """The cases of a request.

    Attributes:
        cases: Cases to predict, sorted by name.
        skipped: Files and folders that are not predicted.
    """

    cases: tuple[Case, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Image:
    """One image to predict.

    Attributes:
        image: Path of a file, folder or archive, optionally with `::series`.
        label: Path that the case is named after, as if it were one file, below the folder that names are relative to.
        slide: Whether it is a whole-slide image, whose result is polygons.
    """

    image: str
    label: Path
    slide: bool = False


def find_cases(
    path: StrPath | Sequence[StrPath], *, pattern: str | None = None, output_format: str = ""
) -> list[dict[str, Any]]:
    """List the images to predict as data dictionaries of MONAI; see `list_cases`.

    Returns:
        One `{"image": ..., "name": ...}` per case, sorted by name.
    """
    return [
        {**case.entry(), "name": case.output}
        for case in list_cases(path, pattern=pattern, output_format=output_format).cases
    ]


def list_cases(
    path: StrPath | Sequence[StrPath],
    *,
    pattern: str | None = None,
    output_format: str = "",
    tiff_slides: bool = False,
) -> CaseList:
    """List the images to predict, and the files that are skipped.

    Args:
        path: Image, list of images, folder (searched recursively, without hidden files and links to folders) or
            `dataset.json`, of which the "test" list is predicted, else "validation". A folder with `dataset.json` or
            `split.json` is read as that data set; to predict all its images, give its folder `images/`. DICOM files are
            recognized by their content: each series in a folder, DICOMDIR or zip archive is one case, and
            `folder::series` selects one (see `open_series`). The files of a DICOM slide in a folder are one case,
            without its label, overview and thumbnail images.
        pattern: Glob pattern of file names, such as `"*_t1.nii.gz"`; a pattern with `/` matches paths relative to the
            folder.
        output_format: Format of all masks, a key of `medseg.io.names.OUTPUT_FORMATS`; by default that of each image, if
            it can store masks. Results of slides are always polygons.
        tiff_slides: Whether TIFF files are whole-slide images.

    Returns:
        The cases. The mask of a 2D image is a PNG. The mask of a DICOM series is named after its folder, or, if that
        holds several series, after the series number and the end of its UID, such as `sub/3_12345678.nii.gz`. The path
        of a DICOM slide is that of one of its files, and its result is named after the folder, or, if that holds
        several slides, after the file.

    Raises:
        RequestError: Nothing was found, a path does not exist, two images have the same mask name, or the format is
            unknown.
    """
    listing = _list_cases(path, pattern, tiff_slides)
    cases = [replace(case, output=_output(case, output_format)) for case in listing.cases]
    _refuse_shared((case.output, case.image) for case in cases)
    return CaseList(tuple(cases), listing.skipped)


def _output(case: Case, output_format: str) -> str:
    name = mask_name(case.name, output_format)
    return case.name if case.kind == "slide" else name


def _list_cases(path: StrPath | Sequence[StrPath], pattern: str | None, tiff_slides: bool) -> CaseList:
    images, skipped, source, base = _found(path)
    if tiff_slides:
        images = [replace(image, slide=image.slide or image.image.lower().endswith(_TIFF)) for image in images]
    return _listing(images, skipped, pattern, source, base)


def _found(path: StrPath | Sequence[StrPath]) -> tuple[list[_Image], list[Skipped], str, Path | None]:
    """Return images, skipped files, the name of the input for messages, and the folder that names are relative to."""
    if not isinstance(path, str | os.PathLike):
        files = [_existing_file(absolute(item)) for item in path]
        _refuse_slices(files)
        return [_file_image(file) for file in files], [], "the list of files", None
    given, series = split_series(path)
    if series:
        _existing(given)
        return [_file_image(absolute(path))], [], str(path), None
    if given.is_dir():
        images, skipped = _folder_images(given)
        return images, skipped, str(given), None if _is_dataset(given) else given
    if given.suffix.lower() == ".json":
        return [_file_image(file) for file in prediction_entries(_existing(given))], [], str(given), None
    if given.is_file() and (given.suffix.lower() == ".zip" or given.name.upper() == DIRECTORY_FILE):
        images, skipped = _packed_images(given)
        return images, skipped, str(given), given.parent
    return [_file_image(_existing_file(given))], [], str(given), None


def _existing(path: Path) -> Path:
    if not path.exists():
        raise RequestError(f"{path} does not exist: check the path.")
    return path


def _existing_file(path: Path) -> Path:
    if split_series(path)[1]:
        return path
    if _existing(path).is_dir():
        raise RequestError(f"{path} is a folder: give it on its own, not in a list of files.")
    reason = _refusal(path)
    if reason:
        raise RequestError(f"{path} is not predicted: {reason}. Expected a file ending in {_expected()}, or DICOM.")
    return path


def _file_image(path: Path) -> _Image:
    """Name a case after its file; DICOM, whose suffix is arbitrary, as if it ended in `.dcm`."""
    part = _slide_part(path)
    if part:
        raise RequestError(f"{path} is {part}: give a file of the slide itself, or its folder.")
    return _Image(str(path), named_file(path), slide=part == "")


def _slide_part(path: Path) -> str | None:
    """Return the content of a file of a DICOM slide (see `slide_part`); None for any other file."""
    if file_kind(path) not in (None, "dicom") or not is_dicom(path):
        return None
    from medseg.io.dicom.headers import read_headers
    from medseg.io.dicom.sources import file_source
    from medseg.io.slides.dicom import slide_part

    return slide_part(read_headers([file_source(path)])[0])


def _refuse_slices(files: Sequence[Path]) -> None:
    """Refuse a list with several slices of one volume or several files of one slide: each would become a case."""
    slices = [path for path in files if file_kind(path) in (None, "dicom") and is_dicom(path)]
    if len(slices) < 2:
        return
    from medseg.io.dicom.series import group_files
    from medseg.io.dicom.sources import file_source

    groups, others = group_files([file_source(path) for path in slices])
    for parts in _slides(others).values():
        if len(parts) > 1:
            raise RequestError(
                f"{len(parts)} of the files, such as {parts[0].source}, are levels of one slide: give one of them, or "
                "their folder instead."
            )
    for group in groups:
        if group.has_geometry and len(group.headers) > 1:
            first = min(str(header.source) for header in group.headers)
            raise RequestError(
                f"{len(group.headers)} of the files, such as {first}, are slices of the DICOM series {group.name}: "
                "give their folder instead, to read them as one volume."
            )


def _expected() -> str:
    return ", ".join(IMAGE_SUFFIXES)


def _refusal(path: Path) -> str:
    """Return the reason why a file is not a readable image; empty if it is one."""
    if path.exists() and not path.is_file():
        return "a pipe or device, not a regular file"
    kind = file_kind(path)
    if kind not in (None, "dicom"):
        return ""
    try:
        if is_dicom(path):
            return ""
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if kind is not None:
        return "named .dcm, but has neither the prefix 'DICM' nor a SOP class"
    if path.suffix.lower() in (".hdr", ".img"):
        return "a two-file format (.hdr, .img), which is not supported; convert it to .nii.gz"
    if path.suffix.lower() == ".zip":
        return "an archive; give it on its own if it holds DICOM files"
    return "not a supported image format"


def _is_dataset(folder: Path) -> bool:
    return (folder / DATASET_FILE).is_file() or (folder / SPLIT_FILE).is_file()


def _folder_images(folder: Path) -> tuple[list[_Image], list[Skipped]]:
    """Return the images of a folder or data set, and the files that are skipped."""
    if not _is_dataset(folder):
        found = list(_walk(folder))
        skipped = [Skipped(str(path), reason) for path, reason in found if reason]
        kept = [path for path, reason in found if not reason]
        series, others = _series_images([path for path in kept if file_kind(path) in (None, "dicom")], folder)
        plain = [_file_image(path) for path in kept if file_kind(path) not in (None, "dicom")]
        return plain + series, skipped + others
    images = _dataset_images(folder)
    # An image may be a folder, or a series in one.
    chosen = {split_series(path)[0] for path in images}
    rest = [(path, reason) for path, reason in _walk(folder) if chosen.isdisjoint((path, *path.parents))]
    skipped = [Skipped(str(path), reason or "not among the data set's cases to predict") for path, reason in rest]
    return [_file_image(path) for path in images], skipped


def _dataset_images(folder: Path) -> list[Path]:
    """Return the images of a data set to predict; its `dataset.json` may list no cases, only label names."""
    listing, split = folder / DATASET_FILE, folder / SPLIT_FILE
    sections = ("training", "validation", "test")
    if listing.is_file() and (not split.is_file() or any(name in read_json(listing) for name in sections)):
        return prediction_entries(listing)
    dataset = read_dataset(folder)
    return [dataset.images[stem] for stem in split_stems(dataset)["val"]]


def _series_images(files: Sequence[Path], base: Path) -> tuple[list[_Image], list[Skipped]]:
    """Group DICOM files below a folder into series; return their images, and the files that are skipped."""
    if not files:
        return [], []
    from medseg.io.dicom.series import group_files
    from medseg.io.dicom.sources import file_source

    groups, others = group_files([file_source(path) for path in files])
    skipped = [_skipped_file(header) for header in others if not _is_slide(header)]
    images = _slide_images(others, base)
    for group in groups:
        paths = [header.source.path for header in group.headers]
        if group.localizer:
            skipped += [Skipped(str(path), f"a localizer (series {group.name})") for path in paths]
        elif group.has_geometry:
            images.append(_folder_image(group, groups, base))
        else:
            images += [_file_image(path) for path in paths]
    return images, skipped


def _skipped_file(header: Header) -> Skipped:
    from medseg.io.slides.dicom import slide_part

    part = "part of a slide, which is read from its folder only" if _is_slide(header) else slide_part(header)
    return Skipped(str(header.source), part or header.other)


def _is_slide(header: Header) -> bool:
    from medseg.io.slides.dicom import slide_part

    return slide_part(header) == ""


def _slides(headers: Sequence[Header]) -> dict[tuple[Path, str], list[Header]]:
    """Return the files of each DICOM slide, by folder and series: a slide is stored in a single folder."""
    slides: dict[tuple[Path, str], list[Header]] = {}
    for header in headers:
        if _is_slide(header):
            slides.setdefault((header.source.folder, header.series_uid), []).append(header)
    return slides


def _slide_images(headers: Sequence[Header], base: Path) -> list[_Image]:
    """Name slides after their folder, or after a file if the folder holds several."""
    slides = _slides(headers)
    counts = Counter(folder for folder, _ in slides)
    images = []
    for (folder, _), parts in slides.items():
        path = min(part.source.path for part in parts)
        where = base if folder == base else folder.parent
        label = where / f"{folder.name}.dcm" if counts[folder] == 1 else named_file(path)
        images.append(_Image(str(path), label, slide=True))
    return images


def _folder_image(group: Group, groups: Sequence[Group], base: Path) -> _Image:
    """Name a series after its folder, or after the series if the folder holds several."""
    folder = common_folder([header.source.path for header in group.headers])
    if any(other is not group and any(where.is_relative_to(folder) for where in other.folders) for other in groups):
        return _Image(f"{folder}::{group.name}", folder / f"{group.name}.dcm")
    return _Image(str(folder), (base if folder == base else folder.parent) / f"{folder.name}.dcm")


def _packed_images(path: Path) -> tuple[list[_Image], list[Skipped]]:
    """Return the series of an archive or DICOMDIR, and its files that are skipped."""
    from medseg.io.dicom.series import find_groups

    try:
        groups, others = find_groups(path)
    except CaseError as error:
        raise RequestError(str(error)) from error
    stem = path.parent.name if path.name.upper() == DIRECTORY_FILE else path.stem
    skipped = [_skipped_file(header) for header in others]
    if len(groups) == 1:
        return [_Image(str(path), path.with_name(f"{stem}.dcm"))], skipped
    return [_Image(f"{path}::{group.name}", path.parent / stem / f"{group.name}.dcm") for group in groups], skipped


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file below a folder in sorted order, with the reason for skipping it or an empty text."""
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
    images: list[_Image], skipped: list[Skipped], pattern: str | None, source: str, base: Path | None = None
) -> CaseList:
    """Name the cases, relative to the folder `base`, and check that there are any."""
    base = base or (common_folder([image.label for image in images]) if images else None)
    chosen = [image for image in images if base and _matches(image.label.relative_to(base), pattern)]
    taken = set(chosen)
    unmatched = [Skipped(image.image, f"does not match {pattern!r}") for image in images if image not in taken]
    if not chosen or base is None:
        looked_for = f"files ending in {_expected()}, or DICOM," + (f" that match {pattern!r}" if pattern else "")
        raise RequestError(f"Nothing to predict in {source}: expected {looked_for}; {_seen(skipped + unmatched)}.")
    cases = sorted((_case(image, base) for image in chosen), key=lambda case: case.name)
    return CaseList(tuple(cases), (*skipped, *unmatched))


def _matches(relative: Path, pattern: str | None) -> bool:
    if pattern is None:
        return True
    return fnmatchcase(relative.as_posix() if "/" in pattern else relative.name, pattern)


def _seen(skipped: Sequence[Skipped]) -> str:
    """Describe the files found instead, counted by suffix."""
    if not skipped:
        return "found no files at all"
    kinds = Counter("".join(Path(item.path).suffixes[-2:]) or Path(item.path).name for item in skipped)
    return "found " + ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5))


def _case(image: _Image, base: Path) -> Case:
    name = image.label.relative_to(base).as_posix()
    kind: CaseKind = "slide" if image.slide else case_kind(image.image)
    named = f"{split_suffix(name)[0]}.geojson" if kind == "slide" else mask_name(name)
    return Case(named, (image.image,), kind=kind, output=named, series=split_series(image.image)[1])


def _refuse_shared(outputs: Iterable[tuple[str, str]]) -> None:
    taken: dict[str, str] = {}
    for output, image in outputs:
        if output in taken:
            raise RequestError(f"{taken[output]} and {image} have the same mask name {output}: rename one of them.")
        taken[output] = image
