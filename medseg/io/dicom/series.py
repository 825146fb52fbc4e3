"""DICOM series: grouping the images of a folder, archive or DICOMDIR, and opening one series."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from pydicom import dcmread
from pydicom.dataset import FileDataset

from medseg.errors import CaseError, RequestError
from medseg.io.dicom.detect import SERIES_MARK, split_series
from medseg.io.dicom.headers import Header, read_headers
from medseg.io.dicom.sources import Source, find_sources, quiet, streams
from medseg.io.dicom.stacks import Slice, find_stacks, order_slices, slice_key
from medseg.io.geometry import MAX_VOXELS, Grid
from medseg.io.names import StrPath

__all__ = ["Group", "Series", "find_groups", "group_files", "open_series"]

# `series#index` selects one of several volumes.
_SELECTION: Final = re.compile(r"(?P<series>[^#]*)(?:#(?P<index>\d{1,6}))?")
_ENDING: Final = 8
_SHORTEST_ENDING: Final = 4
_SHOWN: Final = 20


@dataclass(frozen=True)
class Series:
    """One volume of a series, or one 2D image; no pixels are read.

    Attributes:
        files: Files in the order of the last array axis; one file for an enhanced multi-frame object. Members of an
            archive are below its path.
        uid: SeriesInstanceUID; empty if missing, as after some de-identification.
        study_uid: StudyInstanceUID.
        frame_of_reference: FrameOfReferenceUID.
        modality: Modality, such as "CT".
        number: SeriesNumber.
        description: SeriesDescription, which may identify a person and must not appear in messages.
        grid: Grid of columns, rows and slices, RAS+. A 2D image without geometry has two axes and the identity.
        sop_uids: SOPInstanceUID of each of `files`.
        frames: Frame number of each slice in its file, from 1.
        has_geometry: Whether the files have a position and orientation.
        slices: Slices to read, in the order of the last array axis.
    """

    files: tuple[Path, ...]
    uid: str
    study_uid: str
    frame_of_reference: str | None
    modality: str
    number: str
    description: str
    grid: Grid
    sop_uids: tuple[str, ...]
    frames: tuple[int, ...]
    has_geometry: bool
    slices: tuple[Slice, ...] = field(repr=False)

    def headers(self) -> Iterator[FileDataset]:
        """Yield the dataset of each of `files` without pixel data, also from an archive."""
        sources = dict.fromkeys(item.header.source for item in self.slices)
        for _, stream in streams(sources):
            with quiet():
                header = dcmread(stream, stop_before_pixels=True, force=True)
            yield header


@dataclass(frozen=True)
class Group:
    """The images of one series.

    Attributes:
        name: SeriesNumber and the end of SeriesInstanceUID, by which it can be selected: `3_12345678`.
        uid: SeriesInstanceUID.
        number: SeriesNumber.
        headers: Headers of all files, including damaged ones, in no particular order.
    """

    name: str
    uid: str
    number: str
    headers: tuple[Header, ...]

    @property
    def folders(self) -> set[Path]:
        """Folders of the files."""
        return {header.source.folder for header in self.headers}

    @property
    def has_geometry(self) -> bool:
        """Whether any image has a geometry; damaged files are assumed to have one."""
        return any(not header.planes or Slice(header, header.planes[0]).has_geometry for header in self.headers)

    @property
    def localizer(self) -> bool:
        """Whether all images are localizers (scouts)."""
        return all(header.localizer for header in self.headers)


def open_series(
    path: StrPath, *, series: str | None = None, index: int | None = None, max_voxels: int = MAX_VOXELS
) -> Series:
    """Find, check and sort the files of one series.

    Args:
        path: Folder (searched recursively), DICOM file, DICOMDIR or zip archive, optionally followed by `::series`.
        series: Series to select: a SeriesInstanceUID or its end of at least four characters, a SeriesNumber, or both as
            listed in the error message; optionally followed by `#` and an index.
        index: Index from 0 of the volume to read, if the series has several at the same position (time points, echoes)
            or with different orientations.
        max_voxels: Largest number of voxels that headers may claim.

    Raises:
        CaseError: There is no DICOM image, there are several series or volumes and none is selected, or a file of the
            series is damaged.
        GeometryError: Slices are missing or unevenly spaced, the stack is sheared, or the geometry is invalid.
        RequestError: The selection is malformed.
    """
    source, named = split_series(path)
    wanted, chosen = _parse(named if series is None else series, index)
    groups, others = find_groups(source)
    group = _select(groups, others, wanted, source)
    _refuse_damage(group, source)
    stacks = find_stacks(group.headers, source)
    slices = _select_stack(stacks, chosen, group, source)
    if slices[0].has_geometry:
        ordered, grid = order_slices(slices, source)
    else:
        ordered, grid = slices, Grid((slices[0].header.columns, slices[0].header.rows), np.eye(4))
    return _series(group, ordered, grid.check(source, max_voxels=max_voxels))


def find_groups(path: Path) -> tuple[list[Group], list[Header]]:
    """Return the image series at a path, sorted by number, and the files that are not images.

    A series may be spread over several folders; but if these have images at the same positions, each folder is treated
    as a series, because it is a copy or a separate volume.
    """
    return group_files(find_sources(path))


def group_files(sources: Iterable[Source]) -> tuple[list[Group], list[Header]]:
    """Group files into series as in `find_groups`."""
    headers = read_headers(sources)
    others = [header for header in headers if header.other]
    by_series: dict[tuple[str, str], list[Header]] = {}
    for header in headers:
        if not header.other:
            by_series.setdefault((header.series_uid, header.number), []).append(header)
    parts = [(key, part) for key, found in by_series.items() for part in _by_folder(found)]
    endings = _endings(sorted({uid for (uid, _), _ in parts}))
    groups = [
        Group(f"{number or 'none'}_{endings[uid] or 'none'}", uid, number, tuple(part)) for (uid, number), part in parts
    ]
    return sorted(groups, key=lambda group: (_numeric(group.number), group.name, str(group.headers[0].source))), others


def _by_folder(headers: Sequence[Header]) -> list[list[Header]]:
    """Split the files of a series by folder, if folders duplicate each other or the files have no series UID."""
    folders: dict[Path, list[Header]] = {}
    for header in headers:
        folders.setdefault(header.source.folder, []).append(header)
    if len(folders) == 1:
        return [list(headers)]
    seen = [{slice_key(Slice(h, plane)) for h in part for plane in h.planes} for part in folders.values()]
    if headers[0].series_uid and len(set().union(*seen)) == sum(len(places) for places in seen):
        return [list(headers)]
    return list(folders.values())


def _endings(uids: Sequence[str]) -> dict[str, str]:
    """Return the shortest unique ends of UIDs, of at least eight characters."""
    length = _ENDING
    longest = max((len(uid) for uid in uids), default=0)
    while length < longest and len({uid[-length:] for uid in uids}) < len(uids):
        length += 1
    # Used in names of masks, so an invalid UID must not lead to another folder.
    return {uid: re.sub(r"[^\w.-]", "_", uid[-length:]).strip(".") for uid in uids}


def _numeric(number: str) -> tuple[int, str]:
    return (int(number), "") if re.fullmatch(r"-?\d{1,15}", number) else (10**15, number)


def _parse(text: str, index: int | None) -> tuple[str, int | None]:
    match = _SELECTION.fullmatch(text)
    if match is None:
        raise RequestError(
            f"Invalid series {text!r}: expected a SeriesInstanceUID or its end, or a SeriesNumber, optionally followed "
            "by '#' and the index of a volume."
        )
    selected = int(match["index"]) if match["index"] else None
    return match["series"].strip(), index if selected is None else selected


def _select(groups: Sequence[Group], others: Sequence[Header], wanted: str, source: Path) -> Group:
    if not groups:
        seen = f"; {_list_others(others)}" if others else ""
        kind = "is a folder that " if source.is_dir() else ""
        raise CaseError(f"{source} {kind}has no DICOM image{seen}.")
    found = [group for group in groups if not wanted or wanted in (group.uid, group.number, group.name)]
    if not found:
        found = [group for group in groups if _matches(group, wanted)]
    if len(found) == 1:
        return found[0]
    what = f"has {len(found)} series{f' named {wanted}' if wanted else ''}" if found else f"has no series {wanted!r}"
    raise CaseError(f"{source} {what}: select one as {source.name}{SERIES_MARK}NAME.\n{_list_groups(found or groups)}")


def _matches(group: Group, wanted: str) -> bool:
    """Return whether a text is the end of a group's UID, with or without its number before it."""
    number, _, ending = wanted.rpartition("_")
    long_enough = len(ending) >= _SHORTEST_ENDING  # otherwise a wrong number could match the end of a UID
    return group.uid.endswith(ending) and long_enough and number in ("", group.number or "none")


def _list_groups(groups: Sequence[Group]) -> str:
    """Return a line for each series, without anything that could identify a patient."""
    lines = [f"  {group.name}: {_summary(group)}" for group in groups[:_SHOWN]]
    more = [f"  and {len(groups) - _SHOWN} more"] if len(groups) > _SHOWN else []
    return "\n".join([*lines, *more])


def _summary(group: Group) -> str:
    header = group.headers[0]
    folder = f" in {header.source.folder}" if len(group.folders) == 1 else ""
    planes = sum(len(header.planes) for header in group.headers)
    damaged = sum(bool(header.damage) for header in group.headers)
    size = f"{planes} x {header.columns} x {header.rows}" + (f", {damaged} files damaged" if damaged else "")
    return f"{header.modality or 'unknown modality'}, {size}{folder}"


def _list_others(others: Sequence[Header]) -> str:
    listed = [f"{header.source.full_path.name} is {header.other}" for header in others[:_SHOWN]]
    return ", ".join(listed) + (f", and {len(others) - _SHOWN} more" if len(others) > _SHOWN else "")


def _refuse_damage(group: Group, source: Path) -> None:
    damaged = [header for header in group.headers if header.damage]
    if damaged:
        first = damaged[0]
        more = f" {len(damaged) - 1} more files of the series are damaged." if len(damaged) > 1 else ""
        raise CaseError(f"{first.source} is damaged: {first.damage}.{more} Copy or export the series again.")


def _select_stack(stacks: Sequence[list[Slice]], index: int | None, group: Group, source: Path) -> list[Slice]:
    if index is not None and not 0 <= index < len(stacks):
        raise CaseError(f"{source}: the series {group.name} has no volume {index}: the last is {len(stacks) - 1}.")
    if index is not None or len(stacks) == 1:
        return stacks[index or 0]
    if not any(item.has_geometry for stack in stacks for item in stack):
        raise CaseError(f"{source}: the series {group.name} has {len(stacks)} images without geometry: give one file.")
    lines = [f"  {number}: {_describe(stack)}" for number, stack in enumerate(stacks[:_SHOWN])]
    raise CaseError(
        f"{source}: the series {group.name} has {len(stacks)} volumes, which differ in orientation, size, time, echo "
        f"or similar: select one with index=NUMBER, or as {source.name}{SERIES_MARK}{group.name}#NUMBER.\n"
        + "\n".join(lines)
    )


def _describe(stack: Sequence[Slice]) -> str:
    first = stack[0]
    numbers = sorted(item.header.instance for item in stack if item.header.instance is not None)
    span = f", images {numbers[0]} to {numbers[-1]}" if numbers else ""
    orientation = ", ".join(f"{value:.3g}" for value in first.plane.orientation or ())
    return f"{len(stack)} x {first.header.columns} x {first.header.rows}{span}, orientation [{orientation}]"


def _series(group: Group, ordered: Sequence[Slice], grid: Grid) -> Series:
    first = ordered[0].header
    files = {item.header.source: item.header.sop_uid for item in ordered}
    return Series(
        files=tuple(source.full_path for source in files),
        uid=group.uid,
        study_uid=first.study_uid,
        frame_of_reference=first.frame_of_reference or None,
        modality=first.modality,
        number=group.number,
        description=first.description,
        grid=grid,
        sop_uids=tuple(files.values()),
        frames=tuple(item.plane.frame + 1 for item in ordered),
        has_geometry=ordered[0].has_geometry,
        slices=tuple(ordered),
    )
