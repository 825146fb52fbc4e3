"""End-to-end check of the label server with a DICOMweb store. Part of `server_check.py`.

The store is Orthanc with its DICOMweb plug-in: Debian's packages `orthanc` and `orthanc-dicomweb`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np
import pydicom
import requests
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from viewer import CheckError, Checks, free_port, running, server

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["check_dicomweb"]

MODEL = "hippocampus_mri_unet"
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
PLUGINS = ("/usr/share/orthanc/plugins", "/usr/lib/orthanc", "/usr/local/share/orthanc/plugins")


def check_dicomweb(
    checks: Checks, place: Path, cases: list[Any], bundles: Path, predict: Callable[..., dict[str, Path]]
) -> None:
    """Predict series of a store, store corrected labels as DICOM SEG, fine-tune on them."""
    checks.say("\n== DICOM in a DICOMweb store ==")
    orthanc = shutil.which("Orthanc")
    plugin = next((path for folder in PLUGINS for path in Path(folder).glob("libOrthancDicomWeb.so*")), None)
    if orthanc is None or plugin is None:
        checks.say("SKIPPED: Orthanc not found; on Debian: apt-get install orthanc orthanc-dicomweb")
        return
    place.mkdir(parents=True)
    port = free_port()
    config = place / "orthanc.json"
    config.write_text(json.dumps(_store(place / "store", plugin, port)))
    with running([orthanc, str(config)], place / "orthanc.printed"):
        address = f"http://127.0.0.1:{port}"
        _wait_for(address + "/system", place / "orthanc.printed")
        series = {_upload(case, place / "series" / case.name, address): case for case in cases[:3]}
        wanted = predict(bundles / MODEL, [place / "series"], place / "command")
        arguments = ("--bundles", str(bundles), "--models", MODEL)
        store = f"{address}/dicom-web"
        environment = {"MONAI_LABEL_DICOMWEB_SEARCH_FILTER": '{"Modality": "MR"}'}
        with server(checks, store, place / "state", *arguments, environment=environment) as (viewer, printed):
            viewer.log_in()
            stats = viewer.call("GET", "/datastore/?output=stats").json()
            checks.hold(stats["total"] == 3, f"{stats['total']} series found")
            sample = viewer.call("POST", "/activelearning/random", json={}).json()
            checks.hold(sample["id"] in series, "the next sample is a series of the store")
            listed = viewer.call("GET", "/proxy/dicom/qido/series", note="as OHIF lists them").json()
            checks.hold(len(listed) == 3, f"OHIF sees {len(listed)} series through the server")
            viewer.call("POST", f"/infer/{MODEL}?image=1.2.3.4", expect=400, note="no such series")
            others = next(iter(series))
            viewer.call(
                "GET", "/proxy/dicom/%252e%252e/system", expect=400, note="path traversal out of the store's DICOMweb"
            )
            for uid, case in series.items():
                path, mask = _check_series(checks, viewer, uid, case, place, wanted[case.name])
                if uid == others:
                    _store_as_ohif(viewer, _without_empty_frames(path))
                else:
                    viewer.save_label(uid, mask, {"anterior": 1, "posterior": 2})
            _check_segmentations(checks, viewer, series, place, address, wanted)
            options = {"device": "cpu", "max_epochs": 1, "val_split": 0.34, "publish": "always"}
            viewer.call("POST", f"/train/{MODEL}", json=options)
            end, seconds = viewer.wait("/train/", seconds=420)
            info = viewer.call("GET", "/info/").json()
            stats = info["train_stats"][MODEL]
            checks.hold(
                end == "DONE" and stats["published"], f"fine-tuned in {seconds:.0f} s: {json.dumps(stats)[:150]}"
            )
            checks.hold(
                stats["train"] + stats["val"] == len(series), f"trained on all labels, skipped: {stats['left_out']}"
            )
            uid, case = next(iter(series.items()))
            found, _ = viewer.infer(MODEL, uid, place / "tuned", result_extension=".nii.gz")
            tuned = predict(place / "state" / "models" / MODEL, [place / "series" / case.name], place / "command-tuned")
            _same(checks, found, tuned[case.name], "fine-tuned, server against `medseg predict` on the DICOM folder")
            text = printed.read_text()
            checks.hold(
                not any(u in text for u in series) and "DOE^" not in text, "the log contains no UID and no patient name"
            )


def _store(folder: Path, plugin: Path, port: int) -> dict[str, Any]:
    return {
        "Name": "label-check",
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "Plugins": [str(plugin)],
        "HttpPort": port,
        "DicomServerEnabled": False,
        "AuthenticationEnabled": False,
        "RemoteAccessAllowed": False,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "StudiesMetadata": "Full", "SeriesMetadata": "Full"},
    }


def _wait_for(address: str, printed: Path) -> None:
    import time

    for _ in range(120):
        try:
            if requests.get(address, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.5)
    raise CheckError(f"Orthanc does not answer: {printed.read_text(errors='replace')[-2000:]}")


def _upload(case: Any, folder: Path, address: str) -> str:
    """Write a volume as a DICOM series, send it to the store, and return the series' UID."""
    image = nibabel.load(case.image)
    array = np.asarray(image.dataobj).astype(np.float64)
    array = np.round(array * (4000.0 / max(array.max(), 1.0))).astype(np.uint16)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    spacing = np.sqrt((lps[:3, :3] ** 2).sum(0))
    directions = lps[:3, :3] / spacing
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    folder.mkdir(parents=True)
    for number in range(array.shape[2]):
        header = _slice(case.name, study, series, frame, number)
        header.ImagePositionPatient = [f"{value:.6f}" for value in lps[:3, 3] + lps[:3, 2] * number]
        header.ImageOrientationPatient = [f"{value:.6f}" for value in (*directions[:, 0], *directions[:, 1])]
        header.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        header.SliceThickness = header.SpacingBetweenSlices = float(spacing[2])
        header.Columns, header.Rows = array.shape[:2]
        header.PixelData = np.ascontiguousarray(array[:, :, number].T).tobytes()
        path = folder / f"{number:03d}.dcm"
        header.save_as(path, write_like_original=False)
        requests.post(f"{address}/instances", data=path.read_bytes(), timeout=30).raise_for_status()
    return str(series)


def _slice(name: str, study: str, series: str, frame: str, number: int) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MR_IMAGE, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    header.is_little_endian, header.is_implicit_VR = True, False
    header.SOPClassUID, header.SOPInstanceUID = MR_IMAGE, meta.MediaStorageSOPInstanceUID
    header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = study, series, frame
    header.PatientName, header.PatientID, header.PatientBirthDate, header.PatientSex = f"DOE^{name}", name, "", ""
    header.StudyDate, header.StudyTime, header.StudyID, header.AccessionNumber = "20200101", "120000", "1", ""
    header.ReferringPhysicianName, header.Manufacturer = "", ""
    header.Modality, header.SeriesNumber, header.InstanceNumber = "MR", "1", str(number + 1)
    header.ImageType = ["ORIGINAL", "PRIMARY"]
    header.ScanningSequence, header.SequenceVariant, header.ScanOptions = "GR", "NONE", ""
    header.MRAcquisitionType, header.EchoTime, header.EchoTrainLength, header.RepetitionTime = "3D", "", "", ""
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 0
    return header


def _same(checks: Checks, found: Path, wanted: Path, what: str) -> None:
    a, b = nibabel.load(found), nibabel.load(wanted)
    first, second = np.asarray(a.dataobj), np.asarray(b.dataobj)
    checks.hold(
        bool(second.any()) and first.shape == second.shape and bool((first == second).all()), f"{what}: same voxels"
    )
    checks.hold(np.allclose(a.affine, b.affine, atol=1e-4), f"{what}: same affine")


def _check_series(checks: Checks, viewer: Any, uid: str, case: Any, place: Path, wanted: Path) -> tuple[Path, Path]:
    """Check the mask of a series against that of the command, and return it as DICOM SEG and NIfTI."""
    found, _ = viewer.infer(MODEL, uid, place / f"server-{case.name}", result_extension=".nii.gz")
    _same(checks, found, wanted, "server on a series of the store against `medseg predict` on its folder")
    info = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]
    form = {"params": json.dumps({"device": "cpu", "result_extension": ".nii.gz", "label_info": info})}
    answer = viewer.call("POST", f"/infer/{MODEL}?image={uid}&output=dicom_seg", data=form)
    path = place / f"{case.name}.seg.dcm"
    path.write_bytes(answer.content)
    _check_object(checks, pydicom.dcmread(path), place / "series" / case.name, wanted, "DICOM SEG of the server")
    _check_terms(checks, pydicom.dcmread(path), "AUTOMATIC")
    return path, found


def _store_as_ohif(viewer: Any, content: bytes) -> None:
    """Send an object to the store through the server, as OHIF exports it."""
    head = b"--part\r\nContent-Type: application/dicom\r\n\r\n"
    kind = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=part'}
    body = head + content + b"\r\n--part--\r\n"
    viewer.call("POST", "/proxy/dicom/wado/studies", data=body, headers=kind, note="a DICOM SEG without empty frames")


def _without_empty_frames(path: Path) -> bytes:
    """Return a DICOM SEG as a new object with the non-empty frames only."""
    header = pydicom.dcmread(path)
    bits = np.unpackbits(np.frombuffer(header.PixelData, np.uint8), bitorder="little")
    planes = bits[: int(header.NumberOfFrames) * header.Rows * header.Columns].reshape(int(header.NumberOfFrames), -1)
    kept = [number for number, plane in enumerate(planes) if plane.any()]
    items = header.PerFrameFunctionalGroupsSequence
    header.PerFrameFunctionalGroupsSequence = [items[number] for number in kept]
    header.NumberOfFrames = len(kept)
    pixels = np.packbits(planes[kept].ravel(), bitorder="little").tobytes()
    header.PixelData = pixels + bytes(len(pixels) % 2)
    header.SeriesInstanceUID, header.SOPInstanceUID = generate_uid(), generate_uid()
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    stored = path.with_name("of-another-program.dcm")
    header.save_as(stored)
    return stored.read_bytes()


def _check_segmentations(
    checks: Checks, viewer: Any, series: dict[str, Any], place: Path, address: str, wanted: dict[str, Path]
) -> None:
    """Check that the store holds one DICOM SEG for each series, with the voxels of the mask."""
    listed = requests.get(f"{address}/dicom-web/series?Modality=SEG", timeout=30).json()
    checks.hold(len(listed) == len(series), f"the store holds {len(listed)} DICOM SEG series")
    for number in requests.get(f"{address}/instances", timeout=30).json():
        content = requests.get(f"{address}/instances/{number}/file", timeout=30).content
        path = place / "instance.dcm"
        path.write_bytes(content)
        header = pydicom.dcmread(path)
        if header.Modality == "SEG":
            uid = str(header.ReferencedSeriesSequence[0].SeriesInstanceUID)
            case = series[uid]
            _check_object(checks, header, place / "series" / case.name, wanted[case.name], "DICOM SEG in the store")
            _check_terms(checks, header, "AUTOMATIC" if uid == next(iter(series)) else "SEMIAUTOMATIC")
    stats = viewer.call("GET", "/datastore/?output=stats").json()
    checks.hold(stats["completed"] == len(series), f"{stats['completed']} of {stats['total']} labeled")


def _check_terms(checks: Checks, header: Any, made: str) -> None:
    """Check the codes of the segments and their algorithm type."""
    types = [item.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for item in header.SegmentSequence]
    codes = {item.SegmentedPropertyTypeCodeSequence[0].CodeValue for item in header.SegmentSequence}
    checks.hold(types == ["anterior", "posterior"] and len(codes) == 2, f"each segment has its own code: {types}")
    checks.hold({item.SegmentAlgorithmType for item in header.SegmentSequence} == {made}, f"algorithm type {made}")


def _check_object(checks: Checks, header: Any, folder: Path, mask: Path, what: str) -> None:
    """Check each frame of a DICOM SEG against the slice of the mask at its position."""
    image = nibabel.load(mask)
    labels = np.asarray(image.dataobj)
    planes = np.unpackbits(np.frombuffer(header.PixelData, np.uint8), bitorder="little")
    planes = planes[: int(header.NumberOfFrames) * header.Rows * header.Columns]
    planes = planes.reshape(-1, header.Rows, header.Columns)
    rebuilt = np.zeros_like(labels)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    inverse = np.linalg.inv(lps)
    shared = header.SharedFunctionalGroupsSequence[0]
    for plane, frame in zip(planes, header.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
        spacing = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, dtype=float)
        number = int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        rows, columns = np.nonzero(plane)
        points = (
            position + np.outer(columns, orientation[:3] * spacing[1]) + np.outer(rows, orientation[3:] * spacing[0])
        )
        places = np.rint(np.c_[points, np.ones(len(points))] @ inverse.T[:, :3]).astype(int)
        rebuilt[tuple(places.T)] = number
    names = {int(item.SegmentNumber): str(item.SegmentLabel) for item in header.SegmentSequence}
    checks.hold(bool((rebuilt == labels).all()) and bool(labels.any()), f"{what}: the mask's voxels, segments {names}")
    slices = {pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in folder.iterdir()}
    named = {item.ReferencedSOPInstanceUID for item in header.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    checks.hold(bool(named) and named <= slices, f"{what}: refers to {len(named)} slices of the series")
