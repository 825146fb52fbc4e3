"""The example for MONAI Deploy on real and generated series, and its DICOM SEG against that of `medseg predict`.

Run by `make deploy-check`: the application in its own environment, the rest in medseg's. Objects are compared frame by
frame, read by pydicom alone: which segment, of which source image, where, and every pixel. Exit code 0: all held.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
MEDSEG = ROOT / ".venv" / "bin" / "medseg"
PYTHON = ROOT / ".venv-deploy" / "bin" / "python"
APP = ROOT / "docs" / "monai-deploy" / "app.py"
TRAINED, UNTRAINED = "hippocampus_mri_unet", "phantom_ct_unet"
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
STACK = 32 * 2**20
# Share of voxels that may differ where a network with random weights leaves classes all but equal.
NEARLY = 1e-4


class CheckError(Exception):
    """Something is not as it should be."""


@dataclass(frozen=True)
class Segmentation:
    """A DICOM SEG: its planes that hold something, by segment and source image, and where each lies."""

    labels: dict[int, str]
    planes: dict[tuple[str, str], NDArray[np.bool_]]
    places: dict[tuple[str, str], tuple[float, ...]]
    series: str

    @property
    def voxels(self) -> int:
        return sum(int(plane.sum()) for plane in self.planes.values())


def main(parts: list[str]) -> int:
    """Run the named parts; return the exit code."""
    start = time.perf_counter()
    # What MONAI Deploy asks for
    resource.setrlimit(resource.RLIMIT_STACK, (STACK, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    with tempfile.TemporaryDirectory(prefix="deploy-check-") as place:
        try:
            if "ct" in parts:
                check_ct(Path(place))
            if "mri" in parts or "refusals" in parts:
                model = export(TRAINED, Path(place) / "trained")
                series = mri(Path(place))
                if "mri" in parts:
                    check_mri(Path(place), model, series)
                if "refusals" in parts:
                    check_refusals(Path(place), model, series[0])
        except CheckError as error:
            say(f"FAILED: {error}")
            return 1
    say(f"all held, {time.perf_counter() - start:.0f} s")
    return 0


def say(text: str) -> None:
    """Write one line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def hold(fact: bool, text: str) -> None:
    """Log what was found.

    Raises:
        CheckError: it is not so.
    """
    if not fact:
        raise CheckError(text)
    say(f"     ok: {text}")


def run(*command: str | Path, code: int = 0) -> str:
    """Run a command and return what it printed.

    Raises:
        CheckError: another exit code than expected.
    """
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=600)
    printed = done.stdout + done.stderr
    say(f"{' '.join(Path(str(part)).name for part in command)}: {done.returncode}, {time.perf_counter() - start:.0f} s")
    if done.returncode != code:
        raise CheckError(f"expected exit code {code}: {printed[-4000:]}")
    return printed


def deploy(model: Path, series: Path, results: Path, *, code: int = 0) -> str:
    """Run the application."""
    return run(PYTHON, APP, "--model", model, "--input", series, "--output", results, code=code)


def export(bundle: str | Path, place: Path) -> Path:
    """Export a bundle; return the file."""
    place.mkdir(parents=True, exist_ok=True)
    run(MEDSEG, "export", bundle, "--format", "ts", "-o", place / "model.ts")
    return place / "model.ts"


def check_mri(place: Path, model: Path, series: list[Path]) -> None:
    """Trained weights on MRI: axial, and turned in space."""
    say(f"\n== {TRAINED}, trained, on series of MRI ==")
    for folder in series:
        different, total = compare(TRAINED, model, folder, place / f"results-{folder.name}")
        hold(different == 0, f"all {total:,} voxels of segments are those of `medseg predict`, in the same place")


def mri(place: Path) -> list[Path]:
    """Write two series, the second one turned in space; return their folders."""
    folders = [place / "axial", place / "turned"]
    for folder, image in zip(folders, volumes(place), strict=True):
        loaded = nibabel.load(image)
        affine = turned(loaded.affine) if folder.name == "turned" else loaded.affine
        write_series(np.asarray(loaded.dataobj), affine, folder)
    return folders


def volumes(place: Path) -> list[Path]:
    """Return two volumes: of the hippocampus where the real data are, else generated."""
    root = DATA / "msd_hippocampus"
    if root.is_dir():
        names = json.loads((root / "split.json").read_text())["val"][:2]
        return [root / "imagesTr" / f"{name}.nii.gz" for name in names]
    from medseg.bundle.catalog import find_bundle
    from medseg.tools.samples import write_samples

    say("no hippocampus data here: generated shapes stand in")
    root = write_samples(place / "generated", find_bundle(TRAINED), cases=2)
    return sorted((root / "imagesTr").iterdir())[:2]


def check_ct(place: Path) -> None:
    """A clinical CT in JPEG 2000, and a network with random weights, whose classes are all but equal."""
    say(f"\n== {UNTRAINED}, random weights, on a clinical CT ==")
    source = DATA / "ct_abdomen_totalseg" / "dicom" / "ct_jpeg2000"
    if not source.is_dir():
        say(f"SKIPPED: {source} is not here")
        return
    series = with_identity(source, place / "ct")
    bundle = with_random_weights(place)
    different, total = compare(bundle, export(bundle, place / "random"), series, place / "results-ct")
    hold(different <= NEARLY * total, f"{different:,} of {total:,} voxels of segments differ from `medseg predict`")


def with_identity(source: Path, target: Path) -> Path:
    """Write a copy of a series whose UIDs and number were blanked, with such."""
    target.mkdir()
    study, series = generate_uid(), generate_uid()
    for path in source.iterdir():
        image = pydicom.dcmread(path)
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID
        image.StudyInstanceUID, image.SeriesInstanceUID, image.SeriesNumber = study, series, 1
        image.save_as(target / path.name)
    return target


def with_random_weights(place: Path) -> Path:
    """Return a copy of a bundle that has fresh weights."""
    import torch
    from monai.bundle import ConfigParser

    bundle = Path(shutil.copytree(ROOT / "bundles" / UNTRAINED, place / UNTRAINED))
    torch.manual_seed(0)
    config = json.loads((bundle / "configs" / "inference.json").read_text())
    network = ConfigParser(config).get_parsed_content("network_def")
    (bundle / "models").mkdir(exist_ok=True)
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    return bundle


def compare(bundle: str | Path, model: Path, series: Path, place: Path) -> tuple[int, int]:
    """Segment a series by the application and by `medseg predict`; return how many voxels differ, of how many."""
    results = place / "deploy"
    printed = deploy(model, series, results)
    (written,) = results.iterdir()
    hold(str(written) in printed, f"wrote one object of {written.stat().st_size:,} bytes, and says where")
    run(MEDSEG, "predict", bundle, series, "-o", place / "medseg", "--format", "dicom-seg", "--device", "cpu")
    (wanted,) = (place / "medseg").glob("*.dcm")
    names = json.loads(notes(model)["medseg.json"])["labels"]
    a, b = segmentation(written), segmentation(wanted)
    hold(b.voxels > 0, f"`medseg predict` found {b.voxels:,} voxels")
    hold(list(a.labels.values()) == [names[n] for n in sorted(names, key=int) if n != "0"], f"segments: {a.labels}")
    hold(a.labels == b.labels, "those of `medseg predict` bear the same names")
    hold(a.series == b.series, "both refer to the same series")
    shared = a.places.keys() & b.places.keys()
    apart = max(float(np.abs(np.subtract(a.places[key], b.places[key])).max()) for key in shared)
    hold(apart < 1e-4, f"{len(shared)} frames of the same source images lie at the same place, within {apart:.1g}")
    empty = np.zeros_like(next(iter(b.planes.values())))
    different = sum(
        int((a.planes.get(key, empty) != b.planes.get(key, empty)).sum()) for key in a.planes.keys() | b.planes.keys()
    )
    return different, b.voxels


def segmentation(path: Path) -> Segmentation:
    """Read a DICOM SEG frame by frame."""
    header = pydicom.dcmread(path)
    labels = {int(item.SegmentNumber): str(item.SegmentLabel) for item in header.SegmentSequence}
    bits = np.unpackbits(np.frombuffer(header.PixelData, np.uint8), bitorder="little")
    planes: dict[tuple[str, str], NDArray[np.bool_]] = {}
    places: dict[tuple[str, str], tuple[float, ...]] = {}
    size = header.Rows * header.Columns
    for number, frame in enumerate(header.PerFrameFunctionalGroupsSequence):
        plane = bits[number * size : (number + 1) * size].reshape(header.Rows, header.Columns).astype(bool)
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        key = (labels[int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)], str(source))
        if plane.any():
            planes[key] = plane
            places[key] = place_of(header, frame)
    return Segmentation(labels, planes, places, str(header.ReferencedSeriesSequence[0].SeriesInstanceUID))


def place_of(header: Any, frame: Any) -> tuple[float, ...]:
    """Return position, directions and spacing of a frame."""
    shared = header.SharedFunctionalGroupsSequence[0]
    return tuple(
        float(value)
        for values in (
            frame.PlanePositionSequence[0].ImagePositionPatient,
            shared.PlaneOrientationSequence[0].ImageOrientationPatient,
            shared.PixelMeasuresSequence[0].PixelSpacing,
        )
        for value in values
    )


def notes(model: Path) -> dict[str, bytes]:
    """Return what lies in an exported file beside the network."""
    with zipfile.ZipFile(model) as archive:
        return {Path(name).name: archive.read(name) for name in archive.namelist() if "/extra/" in name}


def check_refusals(place: Path, model: Path, series: Path) -> None:
    """What would go wrong in silence ends with a reason, exit code 1 or 2, and no object."""
    say("\n== refused ==")
    results = place / "results-refused"
    flat = place / "flat"
    write_series(np.arange(16 * 12 * 6).reshape(16, 12, 6), np.diag([1.0, 2.0, 3.0, 1.0]), flat)
    hold("1 x 2 mm" in deploy(model, flat, results, code=1), "pixels that are not square")
    both = place / "both"
    for folder in (series, flat):
        shutil.copytree(folder, both / folder.name)
    hold("holds 2 images" in deploy(model, both, results, code=1), "two series in a folder")
    for path in sorted(flat.iterdir()):
        image = pydicom.dcmread(path)
        image.PixelSpacing, image.SeriesNumber = ["1", "1"], None
        image.save_as(path)
    hold("loaded 0 of the 6 images" in deploy(model, flat, results, code=1), "a series that the SDK passes over")
    renamed = Path(shutil.copy(model, place / "renamed.ts"))
    hold("was renamed" in deploy(renamed, series, results, code=2), "a file that was renamed")
    evil = place / "evil" / "model.ts"
    with_program(model, evil, place / "owned")
    hold("not trusted" in deploy(evil, series, results, code=2), "a config in the file that would run a program")
    hold(not (place / "owned").exists() and not list(results.iterdir()), "it did not run, and nothing was written")


def with_program(model: Path, target: Path, trace: Path) -> None:
    """Write a copy of an exported network whose config would make a file."""
    target.parent.mkdir()
    with zipfile.ZipFile(model) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("/extra/inference.json"):
                config = json.loads(content) | {"inferer": f"$__import__('pathlib').Path({str(trace)!r}).touch()"}
                content = json.dumps(config).encode()
            copy.writestr(name, content)


def turned(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return an affine whose axes lie askew in space."""
    a, b = np.radians(20.0), np.radians(-35.0)
    around_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    around_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    result = affine.copy()
    result[:3, :3] = around_z @ around_x @ affine[:3, :3]
    return result


def write_series(array: NDArray[Any], affine: NDArray[np.float64], folder: Path) -> None:
    """Write a volume `(x, y, z)` with its affine to RAS+ mm as a series of MRI."""
    folder.mkdir(parents=True)
    values = np.round(array * (4000.0 / max(float(array.max()), 1.0))).astype(np.uint16)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.sqrt((lps[:3, :3] ** 2).sum(0))
    directions = lps[:3, :3] / spacing
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for number in range(values.shape[2]):
        image = mri_slice(study, series, frame, number)
        image.ImagePositionPatient = [f"{value:.6f}" for value in lps[:3, 3] + lps[:3, 2] * number]
        image.ImageOrientationPatient = [f"{value:.9f}" for value in (*directions[:, 0], *directions[:, 1])]
        image.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]
        image.SliceThickness = image.SpacingBetweenSlices = f"{spacing[2]:.6f}"
        image.Columns, image.Rows = values.shape[:2]
        image.PixelData = np.ascontiguousarray(values[:, :, number].T).tobytes()
        # Not in the order of the slices
        image.save_as(folder / f"{(7 * number) % 1009:04d}.dcm", enforce_file_format=True)


def mri_slice(study: str, series: str, frame: str, number: int) -> FileDataset:
    """Return the header of a slice."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MR_IMAGE, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    image.SOPClassUID, image.SOPInstanceUID = MR_IMAGE, meta.MediaStorageSOPInstanceUID
    image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
    image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = "DOE^CHECK", "check", "", ""
    image.StudyDate, image.StudyTime, image.StudyID, image.AccessionNumber = "20200101", "120000", "1", ""
    image.ReferringPhysicianName, image.Manufacturer = "", ""
    image.Modality, image.SeriesNumber, image.InstanceNumber = "MR", "1", str(number + 1)
    image.ImageType = ["ORIGINAL", "PRIMARY"]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
    return image


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["mri", "ct", "refusals"]))
