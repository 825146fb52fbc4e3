"""Damaged files against every reader, to be run as a script for as long as one likes.

    python tests/io/fuzz.py --count 20000 --seed 0

Mutant k of seed s is always the same file. Each is read in a process with a limit on its memory and an alarm; what is
raised must be one of medseg's own errors. A crash ends only its process and is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SECONDS_PER_FILE = 20
EXTRA_MEMORY = 1 << 30
EXTREMES = [
    b"\xff\xff\xff\x7f",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b"\x00\x00\xc0\x7f",
    b"\x00" * 4,
    b"\x01\x00\x00\x00",
]
TEXTS = [b"-1", b"0", b"nan", b"1e400", b"99999999999", b"2147483648", b"../../x", b"\x00", b";" * 40, b"\xff\xfe"]


@dataclass(frozen=True)
class Sample:
    """A sound file, how it is read, and the folder it is alone in; `packed` if gzip lies around it."""

    name: str
    folder: Path
    file: Path
    read: Callable[[Path, Path], Any]
    packed: bool = False


class TooSlow(BaseException):
    """The alarm; no `except Exception` catches it."""


def samples(root: Path) -> list[Sample]:
    """Write one small file of each kind."""
    import nibabel
    import SimpleITK as sitk
    from PIL import Image

    rng = np.random.default_rng(0)
    voxels = rng.integers(-50, 900, (9, 8, 7)).astype(np.int16)
    affine = np.array([[-0.8, 0.1, 0, 3], [0.1, 0.8, 0, 4], [0, 0, 1.5, 5], [0, 0, 0, 1.0]])
    affine[:3, :3] = np.diag([-0.8, 0.9, 1.5])
    found: list[Sample] = []

    def place(name: str, file: str, write: Callable[[Path], Any], read: Any = _load, packed: bool = False) -> None:
        folder = root / name
        folder.mkdir()
        write(folder / file)
        found.append(Sample(name, folder, folder / file, read, packed))

    for name, kind, file in (("nifti1", nibabel.Nifti1Image, "a.nii"), ("nifti2", nibabel.Nifti2Image, "a.nii")):
        place(name, file, lambda path, kind=kind: nibabel.save(kind(voxels, affine), path))
    place("nifti_gz", "a.nii.gz", lambda path: nibabel.save(nibabel.Nifti1Image(voxels, affine), path), packed=True)
    place("mgh", "a.mgz", lambda path: nibabel.save(nibabel.MGHImage(voxels, affine), path), packed=True)
    itk = sitk.GetImageFromArray(voxels)
    for file in ("a.nrrd", "a.mha", "a.mhd", "a.nhdr"):
        place(file[2:], file, lambda path: sitk.WriteImage(itk, str(path)))
    place("nrrd_gz", "a.nrrd", lambda path: sitk.WriteImage(itk, str(path), True))
    place("mha_gz", "a.mha", lambda path: sitk.WriteImage(itk, str(path), True))
    place("nifti_label", "a.nii", lambda path: nibabel.save(nibabel.Nifti1Image(voxels, affine), path), _load_label)
    picture = rng.integers(0, 255, (20, 24, 3)).astype(np.uint8)
    for name, file, array in (
        ("png", "a.png", picture),
        ("png16", "a.png", picture[..., 0].astype(np.uint16) * 200),
        ("jpeg", "a.jpg", picture),
        ("tiff", "a.tif", picture),
        ("bmp", "a.bmp", picture),
    ):
        place(name, file, lambda path, array=array: Image.fromarray(array).save(path))
    _dicom_samples(root, found)
    _slide_samples(place, rng)
    return found


def _dicom_samples(root: Path, found: list[Sample]) -> None:
    from medseg.io.dicom.rtstruct import write_rtstruct
    from medseg.io.dicom.seg import write_seg

    series = _helpers("series", "dicom/conftest.py")
    written = series.make_series(root / "series")
    found.append(Sample("dicom", written.folder, written.files[1], _load_folder))
    (root / "enhanced").mkdir()
    series.make_enhanced(root / "enhanced" / "a.dcm")
    found.append(Sample("dicom_enhanced", root / "enhanced", root / "enhanced" / "a.dcm", _load_folder))
    archive = Path(shutil.make_archive(str(root / "zipped" / "series"), "zip", written.folder))
    found.append(Sample("dicom_zip", archive.parent, archive, _load))
    mask = np.zeros(written.values.shape, np.uint8)
    mask[2:-2, 2:-2, :2], mask[3:5, 3:5, 1:] = 1, 2
    terms = {1: "liver", 2: "lesion"}
    for name, write in (("seg", write_seg), ("rtstruct", write_rtstruct)):
        folder = root / name
        shutil.copytree(written.folder, folder / "series")
        write(mask, folder / "a.dcm", written.folder, labels=terms)
        found.append(Sample(name, folder, folder / "a.dcm", _load_object))


def _helpers(name: str, file: str) -> Any:
    """Import the helpers of tests from a file beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _slide_samples(place: Any, rng: np.random.Generator) -> None:
    if importlib.util.find_spec("tifffile") is None or importlib.util.find_spec("openslide") is None:
        return
    import tifffile

    pixels = rng.integers(0, 255, (512, 384, 3)).astype(np.uint8)

    def write(path: Path) -> None:
        tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", compression="zlib")

    place("slide", "a.tif", write, _read_slide)
    write_dicom = _helpers("volumes", "conftest.py").write_dicom_slide
    for name, jpeg in (("slide_dicom", False), ("slide_dicom_jpeg", True)):
        place(name, "a.dcm", lambda path, jpeg=jpeg: write_dicom(path, pixels[:256, :192], jpeg=jpeg), _read_slide)


def _load(file: Path, folder: Path) -> None:
    from medseg.io import load

    load(file)


def _load_label(file: Path, folder: Path) -> None:
    from medseg.io import load

    load(file, label=True)


def _load_folder(file: Path, folder: Path) -> None:
    from medseg.io import load

    load(folder)


def _load_object(file: Path, folder: Path) -> None:
    from medseg.io import load_label

    load_label(file, like=folder / "series")


def _read_slide(file: Path, folder: Path) -> None:
    from medseg.io.slides.slide import open_slide

    with open_slide(file, microns_per_pixel=1.0, default_mpp=0.5) as slide:
        slide.read(0, min(64, slide.shape[1]), 0, min(64, slide.shape[2]))


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Return the content with one to six things wrong, most of them near its start, where headers are."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 7))):
        if not data:
            break
        reach = len(data) if rng.random() < 0.4 else min(len(data), 700)
        at = int(rng.integers(0, reach))
        kind = int(rng.integers(0, 8))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            data[at] = int(rng.integers(0, 256))
        elif kind == 2:
            data[at : at + 4] = EXTREMES[int(rng.integers(0, len(EXTREMES)))]
        elif kind == 3:
            data[at : at + 2] = TEXTS[int(rng.integers(0, len(TEXTS)))]
        elif kind == 4:
            del data[at : at + int(rng.integers(1, 40))]
        elif kind == 5:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        elif kind == 6:
            data[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 20))).astype(np.uint8))
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def mutant(sample: Sample, rng: np.random.Generator) -> bytes:
    """Return a damaged copy of a sample; of gzip files often what is inside."""
    content = sample.file.read_bytes()
    if sample.packed and rng.random() < 0.7:
        return gzip.compress(mutated(gzip.decompress(content), rng), 1)
    return mutated(content, rng)


def run(root: Path, seed: int, first: int, last: int, report: Callable[[int, str, str], None]) -> None:
    """Read mutants in this process; tell of each the sample and what came of it."""
    from medseg.errors import MedsegError

    logging.disable()
    warnings.simplefilter("ignore")
    kept = {sample.name: sample for sample in samples(root)}
    names = sorted(kept)
    for sample in kept.values():
        sample.read(sample.file, sample.folder)  # the sound file is read, and what is loaded on first use with it
    _limit_memory()
    for number in range(first, last):
        sample = kept[names[number % len(names)]]
        sound = sample.file.read_bytes()
        sample.file.write_bytes(mutant(sample, np.random.default_rng([seed, number])))
        report(number, sample.name, "started")
        try:
            with _alarm():
                sample.read(sample.file, sample.folder)
            outcome = "read"
        except MedsegError:
            outcome = "refused"
        except TooSlow:
            outcome = f"took more than {SECONDS_PER_FILE} s"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
        report(number, sample.name, outcome)
        sample.file.write_bytes(sound)


def _limit_memory() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + EXTRA_MEMORY, mapped + EXTRA_MEMORY))


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS_PER_FILE)
    try:
        yield
    finally:
        signal.alarm(0)


def supervise(seed: int, first: int, last: int) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Run mutants in processes of their own; return how many came to what, and those that came to anything else."""
    counts: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    while first < last:
        command = [sys.executable, __file__, "--worker", str(seed), str(first), str(last)]
        with (
            tempfile.TemporaryDirectory() as folder,
            subprocess.Popen(
                [*command, folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as worker,
        ):
            assert worker.stdout is not None
            open_case: tuple[int, str] | None = None
            for line in worker.stdout:
                number, name, outcome = json.loads(line)
                open_case = (number, name) if outcome == "started" else None
                if outcome == "started":
                    continue
                first = number + 1
                known = outcome if outcome in ("read", "refused") else "fault"
                counts[known] += 1
                counts[f"{name}: {known}"] += 1
                if known == "fault":
                    faults.append({"seed": seed, "number": number, "sample": name, "outcome": outcome})
            code = worker.wait()
        if open_case is not None:
            counts["fault"] += 1
            faults.append({"seed": seed, "number": open_case[0], "sample": open_case[1], "outcome": f"crash {code}"})
            first = open_case[0] + 1
        elif first < last:
            raise SystemExit(f"the worker ended with {code} before mutant {first}")
    return counts, faults


def main() -> None:
    """Run as asked on the command line."""
    if sys.argv[1:2] == ["--worker"]:
        seed, first, last = map(int, sys.argv[2:5])

        def tell(*what: object) -> None:
            sys.stdout.write(json.dumps(what) + "\n")
            sys.stdout.flush()

        run(Path(sys.argv[5]), seed, first, last, tell)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    counts, faults = supervise(options.seed, options.first, options.first + options.count)
    sys.stdout.write(json.dumps({"seconds": round(time.monotonic() - started), **counts}, indent=1) + "\n")
    for fault in faults:
        sys.stdout.write(json.dumps(fault) + "\n")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
