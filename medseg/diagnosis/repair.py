"""Repaired copies of a data set: repairs that follow from the files themselves, without guesses and never in place.

| finding | repair |
|---|---|
| label whose affine equals the image's up to rounding | gets the image's geometry |
| label on another grid that covers the same space | resampled to the image's grid, nearest neighbor |
| label stored as floating point | converted to the smallest integer type |
| NaN and infinite values of an image | replaced by its lowest finite value |
| sform and qform that disagree | the sform is copied to the qform |
| sform and pixdim that disagree, without a qform | the voxel size of the sform is copied to the pixdim |
| singleton dimensions beyond the spatial ones | removed |
| copies of one case with equal labels | one is kept: that of validation or test before that of training |

All other files are copied byte by byte. A repair that would lose a label value is not made, and the file is copied
unchanged.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medseg.checks.dataset_checks import Examined
from medseg.checks.subjects import PARTS, Subject
from medseg.diagnosis.doctor import Change, Findings
from medseg.errors import CaseError, GeometryError, RequestError
from medseg.files import check_folder, replace_text, replacing
from medseg.io import load, read_grid, write_mask
from medseg.io.dicom.detect import DIRECTORY_FILE, image_kind, split_series
from medseg.io.formats import FORMATS
from medseg.io.geometry import GRID_TOLERANCE, Grid, corner_distance
from medseg.io.names import absolute, file_kind, split_suffix
from medseg.io.streams import coding_of, detached_data_file, gzip_writer, opened
from medseg.io.survey import count_values

if TYPE_CHECKING:
    from medseg.types import Progress

__all__ = ["repair", "resample_nearest"]

_KEPT_FIRST = ("test", "val", "", "train")
_DATA_FILE = re.compile(r"^(?:data ?file:|ElementDataFile\s*=)\s*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)
_MAX_HEADER = 1 << 20
_HERE = ("LOCAL", "Local", "local")
_PIECE = 1 << 20
_STRETCHED = 0.01
_LABEL_REPAIRS = ("header", "resample", "integers")


def repair(found: Findings, target: Path, *, report: Progress | None = None) -> list[Change]:
    """Write a repaired copy of a data set.

    Args:
        found: Findings, as from `medseg.diagnosis.doctor.examine`.
        target: New or empty folder for the copy.
        report: Called with the number of cases copied, the number of all cases, and the name of the next case.

    Returns:
        The changes; files without an entry are identical byte by byte.

    Raises:
        RequestError: A folder that is not empty.
        OutputError: A folder without write access.
    """
    target = absolute(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(f"'{target}' exists and is not empty. Choose a new folder for the repaired copy.")
    check_folder(target)
    dropped = _duplicates(found)
    job = _Job(found, target, [])
    for number, case in enumerate(found.cases):
        if report is not None:
            report(number, len(found.cases), case.name)
        if case.name in dropped:
            kept = dropped[case.name]
            job.changes.append(Change(job.name(case.subject.image), "skipped", f"a copy of {kept}", "not in the copy"))
        else:
            job.copy_case(case)
    for listing in found.collection.listings:
        job.copy_listing(listing, [case.subject for case in found.cases if case.name in dropped])
    return job.changes


def resample_nearest(label: NDArray[Any], grid: Grid, onto: Grid) -> NDArray[Any]:
    """Resample a label to another grid by nearest neighbor; voxels outside the label are 0.

    Args:
        label: Label array of shape (x, y, z).
        grid: Shape and affine of the label.
        onto: Shape and affine of the result.
    """
    move = np.linalg.inv(grid.affine) @ onto.affine
    result: NDArray[Any] = np.zeros(onto.shape, dtype=label.dtype)
    x, y = np.meshgrid(np.arange(onto.shape[0]), np.arange(onto.shape[1]), indexing="ij")
    for z in range(onto.shape[2]):
        points = [move[axis, 0] * x + move[axis, 1] * y + move[axis, 2] * z + move[axis, 3] for axis in range(3)]
        # Halves are rounded up; rint rounds them to even numbers, which would shift every other voxel.
        nearest = [np.floor(point + 0.5 + 1e-6).astype(np.int64) for point in points]
        inside = np.logical_and.reduce(
            [(index >= 0) & (index < size) for index, size in zip(nearest, label.shape, strict=True)]
        )
        result[..., z][inside] = label[tuple(index[inside] for index in nearest)]
    return result


def _duplicates(found: Findings) -> dict[str, str]:
    """Return the cases to skip, each with the copy that is kept."""
    parts = {case.name: case.part for case in found.cases}
    files = {case.name: case.subject.image for case in found.cases}
    dropped: dict[str, str] = {}
    for finding in found.findings:
        if finding.repair == "duplicate":
            kept = min(finding.cases, key=lambda name: _KEPT_FIRST.index(parts[name]))
            # A file that is listed twice is kept: which of the entries is wrong is unknown.
            dropped |= {name: kept for name in finding.cases if files[name] != files[kept]}
    return dropped


@dataclass
class _Job:
    """The writing of one repaired copy, with a record of the changes."""

    found: Findings
    target: Path
    changes: list[Change]

    def name(self, path: str) -> str:
        """Return the path of a file relative to the root; a DICOM series is named by its folder."""
        return self.found.collection.relative(str(split_series(path)[0]))

    def copy_case(self, case: Examined) -> None:
        """Copy and repair image and label; a missing file, such as a broken link, is skipped and recorded."""
        repairs = {item.repair for item in self.found.findings if item.repair and case.name in item.cases}
        image, label = case.subject.image, case.subject.label
        with self.noting(image):
            self.copy_image(case, repairs)
        if label is not None:
            with self.noting(label):
                self.copy_label(case.subject, self.target / self.name(image), repairs)

    @contextmanager
    def noting(self, path: str) -> Iterator[None]:
        """Record a file that fails to be copied."""
        try:
            yield
        except CaseError as error:
            self.note(path, "not copied", str(error), "not in the copy")

    def copy_image(self, case: Examined, repairs: set[str]) -> None:
        """Copy and repair an image."""
        source = case.subject.image
        file = split_series(source)[0]
        target = self.target / self.name(source)
        if file.is_dir() or file.name.upper() == DIRECTORY_FILE:
            self.copy_series(source)
            return
        _copy(file, target)
        if "nan" in repairs and case.image is not None and case.image.nonfinite:
            self.note(source, "non-finite values replaced", *_fill_nonfinite(target, case.image.minimum))
        self.fix_header(source, target)

    def copy_series(self, source: str) -> None:
        """Copy the files of a DICOM series, or all files of its folder if the series is damaged."""
        from medseg.io.dicom import open_series

        folder, root = split_series(source)[0], self.found.collection.root
        around = folder if folder.is_dir() else folder.parent
        try:
            files: Iterable[Path] = open_series(source).files
        except CaseError:
            files = sorted(path for path in around.rglob("*") if path.is_file())
        if folder.is_file():
            _copy(folder, self.target / folder.relative_to(root))
        for file in files:
            _copy(file, self.target / file.relative_to(root))

    def copy_label(self, subject: Subject, image: Path, repairs: set[str]) -> None:
        """Copy a label; write it again if its voxels or its geometry change."""
        source = Path(str(subject.label))
        target = self.target / self.name(str(source))
        if source.is_dir():
            for file in sorted(path for path in source.rglob("*") if path.is_file()):
                _copy(file, target / file.relative_to(source))
            return
        wanted = [name for name in _LABEL_REPAIRS if name in repairs]
        try:
            changes = _rewrite_label(source, target, image, wanted) if wanted else []
        except (CaseError, GeometryError) as error:
            changes = []
            self.note(str(source), "not repaired", self.found.collection.shortened(str(error)), "copied unchanged")
        if not changes:
            _copy(source, target)
        for what, before, after in changes:
            self.note(str(source), what, before, after)
        self.fix_header(str(source), target)

    def fix_header(self, source: str, target: Path) -> None:
        """Repair the header of a copied NIfTI file."""
        if image_kind(target) == "nifti":
            for what, before, after in _fix_nifti(target):
                self.note(source, what, before, after)

    def note(self, source: str, what: str, before: str, after: str) -> None:
        """Record a change."""
        self.changes.append(Change(self.name(source), what, before, after))

    def copy_listing(self, listing: Path, dropped: Sequence[Subject]) -> None:
        """Copy a `dataset.json` or split file without the skipped cases."""
        target = self.target / listing.name
        if not dropped:
            _copy(listing, target)
            return
        content, root = json.loads(listing.read_text(encoding="utf-8")), self.found.collection.root
        folds = content if isinstance(content, list) else [content]  # nnU-Net lists several splits
        before = _lengths(folds[0])
        images = {absolute(subject.image) for subject in dropped}
        for fold in folds:
            for key in (*PARTS, *PARTS.values()):
                if isinstance(fold, dict) and isinstance(fold.get(key), list):
                    fold[key] = [entry for entry in fold[key] if not _names_one(entry, root, images)]
        if "numTraining" in folds[0] and isinstance(folds[0].get("training"), list):
            folds[0]["numTraining"] = len(folds[0]["training"])
        replace_text(target, json.dumps(content, indent=1) + "\n")
        self.changes.append(Change(listing.name, "cases removed", before, _lengths(folds[0])))


def _names_one(entry: Any, root: Path, images: set[Path]) -> bool:
    """Return whether an entry of a listing, a path or a stem, names one of the images."""
    text = entry.get("image") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        return False
    stems = {
        split_suffix(path.relative_to(root / folder).as_posix())[0]
        for path in images
        for folder in ("images", "imagesTr")
        if path.is_relative_to(root / folder)
    }
    return absolute(root / text) in images or text in stems or f"{text}_0000" in stems


def _lengths(content: dict[str, Any]) -> str:
    keys = [key for key in dict.fromkeys((*PARTS, *PARTS.values())) if isinstance(content.get(key), list)]
    return ", ".join(f"{len(content[key])} {key}" for key in keys)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, together with the data file of a detached header (`.nhdr`, `.mhd`)."""
    _copy_one(source, target)
    if source.suffix.lower() in (".nhdr", ".mhd"):
        with source.open("rb") as file:
            match = _DATA_FILE.search(file.read(_MAX_HEADER).decode("utf-8", "replace"))
        with suppress(CaseError):  # a missing data file is a finding already
            if match and match[1] not in _HERE:
                _copy_one(detached_data_file(source, match[1]), target.parent / match[1])


def _copy_one(source: Path, target: Path) -> None:
    if not source.is_file():
        raise CaseError(f"{source.name} is missing or not a regular file. Check for a broken link.")
    if not target.exists():
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)


def _rewrite_label(source: Path, target: Path, image: Path, repairs: list[str]) -> list[tuple[str, str, str]]:
    """Write a repaired label; return the changes, each with the states before and after."""
    kind = file_kind(target)
    if kind is None or not target.name.lower().endswith(FORMATS[kind].written):
        raise CaseError(f"{source.name} needs a repair, but medseg does not write its format.")
    loaded = load(source, label=True)
    array: NDArray[Any] = loaded.as_tensor().numpy()[0]
    grid = Grid(array.shape, loaded.affine.numpy())
    like, changes = source, []
    if "resample" in repairs or "header" in repairs:
        like, onto = image, read_grid(image)
        if "resample" in repairs:
            resampled = resample_nearest(array, grid, onto)
            lost = sorted(set(count_values(array)) - set(count_values(resampled)) - {0})
            if lost:
                raise GeometryError(
                    f"{source.name}: resampled to the image's grid, the label {lost[0]} would have no voxel."
                )
            array = resampled
        what = "resampled to the image's grid" if "resample" in repairs else "given the image's geometry"
        changes.append((what, _geometry(grid), _geometry(onto)))
    write_mask(array, target, like=like)
    if "integers" in repairs:
        dtypes = [str(cast("Any", nib.load(path)).get_data_dtype()) for path in (source, target)]
        changes.append(("converted to integers", dtypes[0], dtypes[1]))
    return changes


def _geometry(grid: Grid) -> str:
    rows = "; ".join(" ".join(f"{value:.9g}" for value in row) for row in grid.affine[:3])
    return f"{grid.describe()}, affine [{rows}]"


def _fill_nonfinite(path: Path, value: float) -> tuple[str, str]:
    """Replace the non-finite values of a copied NIfTI file."""
    image = cast("Any", nib.load(path))
    array = np.array(np.asanyarray(image.dataobj))
    with np.errstate(over="ignore"):
        wrong = ~np.isfinite(array.astype(np.float32))  # as images are read
    array[wrong] = value
    header = image.header.copy()
    header.set_data_dtype(array.dtype)
    with replacing(path) as temporary:
        nib.save(type(image)(array, None, header), temporary)
    return f"{int(wrong.sum()):,} of {array.size:,}", f"{value:g}, the lowest finite value"


def _fix_nifti(path: Path) -> list[tuple[str, str, str]]:
    """Repair the header of a NIfTI file and keep every byte after it."""
    try:
        with opened(path) as stream:
            start = stream.read(4)
            kind = nib.Nifti2Header if start in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Header
            header = kind(start + stream.read(kind.sizeof_hdr - 4), check=False)
            changes = [change for fix in (_squeeze, _copy_sform, _copy_zooms) for change in fix(header)]
            while changes and stream.read(_PIECE):  # check that the whole file can be decompressed
                pass
    except Exception:  # a damaged file raises many types; it stays unchanged, with its finding
        return []
    if changes:
        with replacing(path) as temporary, opened(path) as stream, temporary.open("wb") as file:
            stream.seek(header.sizeof_hdr)
            with gzip_writer(cast("BinaryIO", file)) if coding_of(path) == "gzip" else nullcontext(file) as out:
                out.write(header.binaryblock)
                shutil.copyfileobj(stream, out, _PIECE)
    return changes


def _squeeze(header: Any) -> list[tuple[str, str, str]]:
    shape = tuple(int(size) for size in header["dim"][1 : int(header["dim"][0]) + 1])
    if len(shape) <= 3 or math.prod(shape[3:]) != 1:
        return []
    header["dim"][0] = 3
    return [("singleton dimensions removed", str(shape), str(shape[:3]))]


def _copy_sform(header: Any) -> list[tuple[str, str, str]]:
    if not (header["sform_code"] and header["qform_code"]):
        return []
    shape = (*(int(size) for size in header["dim"][1:4]),)
    sform, qform = Grid(shape, header.get_sform()), Grid(shape, header.get_qform())
    apart, step = corner_distance(sform, qform), min(sform.spacing)
    if apart <= GRID_TOLERANCE * step:
        return []
    fixed = header.copy()
    fixed.set_qform(sform.affine, int(header["sform_code"]), strip_shears=True)
    if corner_distance(sform, Grid(shape, fixed.get_qform())) > GRID_TOLERANCE * step:
        return []
    for field in ("pixdim", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
        header[field] = fixed[field]
    return [("sform copied to qform", f"{apart:.4g} mm apart", "equal")]


def _copy_zooms(header: Any) -> list[tuple[str, str, str]]:
    if header["qform_code"] or not header["sform_code"]:
        return []
    count = min(3, int(header["dim"][0]))
    before = np.array(header["pixdim"][1 : count + 1], dtype=np.float64)
    after = np.linalg.norm(header.get_sform()[:3, :count], axis=0)
    if np.abs(before / after - 1).max() <= _STRETCHED:
        return []
    header["pixdim"][1 : count + 1] = after
    shown = [" x ".join(f"{value:.6g}" for value in values) for values in (before, after)]
    return [("voxel size of the sform copied to pixdim", shown[0], shown[1])]
