"""End-to-end check of the label server over HTTP, as viewers use it, against the masks of `medseg predict`.

Run by `make label-check` in the label server's own environment; `medseg predict` runs in medseg's. Each HTTP request is
logged with its status and time, each passed check with "ok". The exit code is 0 if all checks passed. Real data sets
are used if they are in the folder `shared/data` beside the project, otherwise generated shapes.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel
import numpy as np
from dicomweb_check import check_dicomweb
from PIL import Image
from viewer import ACCOUNT, PASSWORD, CheckError, Checks, Viewer, server

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
MEDSEG = ROOT / ".venv" / "bin" / "medseg"
MODEL = "hippocampus_mri_unet"
TILES = "gland_pathology_unet"


@dataclass(frozen=True)
class Case:
    """An image and its true label."""

    name: str
    image: Path
    label: Path


def main(parts: list[str]) -> int:
    """Run the named parts and return the exit code."""
    checks, start = Checks(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="label-check-") as place:
        try:
            cases = volumes(Path(place))
            bundles = bundle_folder(Path(place))
            if "folder" in parts:
                check_folder(checks, Path(place) / "folder", cases, bundles)
            if "pictures" in parts:
                check_pictures(checks, Path(place) / "pictures", bundles)
            if "dicomweb" in parts:
                check_dicomweb(checks, Path(place) / "dicomweb", cases, bundles, predict_by_command)
        except CheckError as error:
            checks.say(f"FAILED: {error}")
            return 1
    checks.say(f"{checks.steps} requests, {checks.found} checks passed, {time.perf_counter() - start:.0f} s")
    return 0


def volumes(place: Path) -> list[Case]:
    """Return five volumes with labels: hippocampus MRI if the data set exists, otherwise generated."""
    root = DATA / "msd_hippocampus"
    if not root.is_dir():
        root = generated(place / "generated", MODEL, 5)
        names = sorted(path.name.removesuffix(".nii.gz") for path in (root / "imagesTr").iterdir())
    else:
        names = json.loads((root / "split.json").read_text())["val"][:5]
    return [Case(n, root / "imagesTr" / f"{n}.nii.gz", root / "labelsTr" / f"{n}.nii.gz") for n in names]


def tiles(place: Path) -> list[Case]:
    """Return four 2D images with labels: gland pathology if the data set exists, otherwise generated."""
    root = DATA / "glas"
    if not root.is_dir():
        root = generated(place / "generated", TILES, 4)
    images = sorted((root / "images").glob("*.png"))[:4]
    return [Case(path.stem, path, root / "labels" / path.name) for path in images]


def generated(folder: Path, model: str, cases: int) -> Path:
    """Write random shapes as input for a bundle and return their folder."""
    from medseg.bundle.catalog import find_bundle
    from medseg.tools.samples import write_samples

    return write_samples(folder, find_bundle(model), cases=cases)


def bundle_folder(place: Path) -> Path:
    """Return a folder of bundles: two shipped ones, and one whose config runs code."""
    folder = place / "bundles"
    for name in (MODEL, TILES):
        shutil.copytree(ROOT / "bundles" / name, folder / name, ignore=shutil.ignore_patterns("runs"))
    shutil.copytree(folder / MODEL, folder / "evil_mri_unet")
    config = folder / "evil_mri_unet" / "configs" / "inference.json"
    content = json.loads(config.read_text())
    content["initialize"] = [f"$__import__('pathlib').Path({str(place / 'owned')!r}).touch()"]
    config.write_text(json.dumps(content))
    return folder


def predict_by_command(bundle: Path, images: Sequence[Path], output: Path) -> dict[str, Path]:
    """Return the masks of `medseg predict`, run in medseg's own environment, by image name."""
    command = [str(MEDSEG), "predict", str(bundle), *map(str, images), "-o", str(output), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CheckError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return {path.name.partition(".")[0]: path for path in output.iterdir() if path.name != "manifest.json"}


def voxels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels of a volume or 2D image, and its affine."""
    if path.name.endswith(".nrrd"):
        import SimpleITK as sitk

        image = sitk.ReadImage(str(path))
        affine = np.eye(4)
        affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        return sitk.GetArrayFromImage(image).T, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    if path.suffix.lower() == ".png":
        return np.asarray(Image.open(path)).T, np.eye(4)
    loaded = nibabel.load(path)
    return np.asarray(loaded.dataobj), loaded.affine


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean Dice of the foreground labels."""
    labels = sorted({*np.unique(a), *np.unique(b)} - {0})
    return float(np.mean([2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in labels]))


def same_mask(checks: Checks, found: Path, wanted: Path, what: str) -> None:
    """Check that two masks are non-empty and have equal voxels and affines."""
    (a, here), (b, there) = voxels(found), voxels(wanted)
    checks.hold(b.any() and a.shape == b.shape and bool((a == b).all()), f"{what}: Dice {dice(a, b):.6f}, same voxels")
    checks.hold(np.allclose(here, there, atol=1e-5), f"{what}: same affine")


def check_folder(checks: Checks, place: Path, cases: list[Case], bundles: Path) -> None:
    """A folder of NIfTI files: predict, correct, fine-tune, predict again."""
    checks.say("\n== NIfTI files in a folder ==")
    studies = place / "studies"
    studies.mkdir(parents=True)
    renamed = []
    for number, case in enumerate(cases):
        # Symbolic links to files of the same name in different folders.
        original = place / "originals" / str(number) / "image.nii.gz"
        original.parent.mkdir(parents=True)
        shutil.copy(case.image, original)
        image = studies / f"MUELLER_{number}.nii.gz"
        image.symlink_to(original)
        renamed.append(Case(f"MUELLER_{number}", image, case.label))
    # A folder with the name of an image must not disturb the server.
    (studies / "MUELLER_0").mkdir()
    (studies / "MUELLER_0" / "notes.txt").write_text("unrelated")
    wanted = predict_by_command(bundles / MODEL, [case.image for case in renamed], place / "command")
    with server(checks, str(studies), place / "state", "--bundles", str(bundles)) as (viewer, printed):
        check_login(checks, viewer)
        info = viewer.call("GET", "/info/").json()
        checks.hold(set(info["models"]) == {MODEL}, f"bundles with weights: {list(info['models'])}")
        checks.hold(set(info["trainers"]) == {MODEL, TILES}, f"trainable bundles: {list(info['trainers'])}")
        checks.hold(list(info["refused"]) == ["evil_mri_unet"], f"refused: {info['refused']['evil_mri_unet'][:90]!r}")
        checks.hold("evil_mri_unet" in printed.read_text(), "the log names the refused bundle")
        checks.hold(not (place.parent / "owned").exists(), "its code did not run")
        check_requests(checks, viewer)
        before = check_prediction(checks, viewer, renamed[0], place, wanted["MUELLER_0"])
        check_choice(checks, viewer)
        for case in renamed[:3]:
            # 3D Slicer lists the labels of every bundle, including those that were not drawn.
            names = {"anterior": 7, "posterior": 3, "nucleus": 8, "vessel": 9}
            viewer.save_label(case.name, renumbered(case, place), names)
        stats = viewer.call("GET", "/datastore/?output=stats").json()
        checks.hold(stats["completed"] == 3, f"{stats['completed']} of {stats['total']} labeled")
        check_scoring(checks, viewer, renamed[:3], wanted)
        check_training(checks, viewer)
        images = [case.image for case in (renamed[0], *renamed[3:])]
        wanted = predict_by_command(place / "state" / "models" / MODEL, images, place / "command-tuned")
        check_tuned(checks, viewer, renamed[0], place, before, wanted["MUELLER_0"])
        check_batch(checks, viewer, renamed[3:], place, wanted)
        check_stopping(checks, viewer)
        log = viewer.call("GET", "/logs/?lines=2000&html=false&text=true").text
        for name, text in (("log", log), ("terminal", printed.read_text())):
            checks.hold(
                "MUELLER" not in text and "medseg" in text,
                f"the {name} contains no image name ({len(text)} characters)",
            )


def check_login(checks: Checks, viewer: Viewer) -> None:
    """Endpoints are closed without a login and open with one."""
    checks.hold(viewer.call("GET", "/auth/").json()["enabled"] is True, "login is on by default")
    for method, path in (("GET", "/datastore/"), ("GET", "/info/"), ("GET", "/logs/"), ("GET", "/train/")):
        viewer.call(method, path, expect=(401, 403), note="no login")
    viewer.call("POST", f"/infer/{MODEL}?image=MUELLER_0", expect=(401, 403), note="no login")
    form = {"username": "checker", "password": "wrong"}
    viewer.call("POST", "/auth/token", data=form, expect=401, note="wrong password")
    viewer.headers = {"Authorization": "Bearer forged.token.here"}
    viewer.call("GET", "/datastore/", expect=(401, 403), note="forged token")
    viewer.headers = {}
    viewer.call("POST", "/reload", expect=404, note="open in MONAI Label, disabled by medseg")
    check_browser(checks, viewer)
    check_slicer(checks, viewer)
    viewer.log_in()


def check_browser(checks: Checks, viewer: Viewer) -> None:
    """Login of OHIF in a browser: a form and a cookie."""
    answer = viewer.call("GET", "/ohif/", expect=303, allow_redirects=False, note="no login")
    checks.hold(answer.headers["location"] == "/login", "OHIF redirects to the login page")
    form = {"username": ACCOUNT, "password": "wrong"}
    viewer.call("POST", "/login", data=form, expect=401, note="wrong password")
    form["password"] = PASSWORD
    answer = viewer.call("POST", "/login", data=form, expect=303, allow_redirects=False)
    cookie = answer.headers["set-cookie"]
    checks.hold(
        "HttpOnly" in cookie and "SameSite=strict" in cookie,
        "the cookie is restricted to this server and hidden from scripts",
    )
    page = viewer.call("GET", "/ohif/", cookies=answer.cookies, note="with the cookie").text
    checks.hold("<html" in page.lower(), "OHIF is served")
    viewer.call("GET", "/info/", cookies=answer.cookies, note="with the cookie")
    old = {"medseg_token": "of.an.earlier.start"}
    answer = viewer.call("GET", "/ohif/", expect=303, allow_redirects=False, cookies=old, note="with an expired cookie")
    checks.hold(answer.headers["location"] == "/login", "an expired cookie redirects to the login page")


def check_slicer(checks: Checks, viewer: Viewer) -> None:
    """Login of 3D Slicer, whose module uses this client of MONAI Label."""
    path = Path(sys.prefix, "monailabel/plugins/slicer/MONAILabel/MONAILabelLib/client.py")
    spec = importlib.util.spec_from_file_location("slicer_client", path)
    slicer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slicer)
    client = slicer.MONAILabelClient(viewer.address)
    checks.hold(client.auth_enabled(), "3D Slicer's client detects that a login is required")
    client.update_auth(client.auth_token(ACCOUNT, PASSWORD))
    checks.hold(
        client.auth_valid_token() and MODEL in client.info()["models"],
        "3D Slicer's client logs in and lists the models",
    )


def check_requests(checks: Checks, viewer: Viewer) -> None:
    """Path traversal, unknown images and refused bundles are answered with a reason."""
    viewer.call("POST", f"/infer/{MODEL}?image=../../etc/hostname", expect=400, note="path traversal")
    viewer.call("GET", "/datastore/image?image=/etc/hostname", expect=400, note="an absolute path")
    form = {"params": json.dumps({"image": "/etc/hostname"})}
    viewer.call("POST", f"/infer/{MODEL}?image=MUELLER_0", data=form, expect=400, note="a path in the parameters")
    form = {"params": json.dumps({"save_label": True, "label_tag": "../../x"})}
    viewer.call("POST", f"/infer/{MODEL}?image=MUELLER_0", data=form, expect=400, note="path traversal in the tag")
    answer = viewer.call(
        "POST", f"/infer/{MODEL}?image=MUELLER_0", data={"params": "{"}, expect=400, note="invalid JSON"
    )
    checks.hold("JSON" in answer.json()["detail"], "the answer mentions JSON")
    viewer.call("POST", f"/infer/{MODEL}?image=unknown", expect=400, note="no such image")
    form = {"params": json.dumps({"image": "../MUELLER_0"})}
    viewer.call(
        "POST", f"/infer/{MODEL}?image=MUELLER_0", data=form, expect=400, note="path traversal in the parameters"
    )
    files = {"files": ("a.tar", b"")}
    viewer.call("PUT", "/session/?uncompress=true", files=files, expect=400, note="an archive to unpack")
    answer = viewer.call("POST", "/infer/evil_mri_unet?image=MUELLER_0", expect=(400, 404, 500), note="refused bundle")
    checks.hold("evil_mri_unet" in answer.text, f"the answer names it: {answer.text[:80]!r}")
    viewer.call("GET", "/info/", headers={"Host": "evil.example"}, expect=400, note="foreign host name")


def check_prediction(checks: Checks, viewer: Viewer, case: Case, place: Path, wanted: Path) -> Path:
    """Masks in the format that 3D Slicer requests and in the default format equal those of the command."""
    slicer = {"result_extension": ".nrrd", "result_dtype": "uint16", "result_compress": False}
    found, said = viewer.infer(MODEL, case.name, place / "slicer", **slicer)
    same_mask(checks, found, wanted, "NRRD of the server against NIfTI of `medseg predict`")
    checks.hold(said["label_names"] == {"anterior": 1, "posterior": 2}, f"labels: {said['label_names']}")
    found, _ = viewer.infer(MODEL, case.name, place / "default")
    same_mask(checks, found, wanted, "NIfTI of the server against `medseg predict`")
    checks.hold(found.read_bytes() == wanted.read_bytes(), "both files are equal byte for byte")
    answer = viewer.call("PUT", "/session/", files={"files": ("mine.nii.gz", case.image.read_bytes())}).json()
    session = f"any&session_id={answer['session_id']}"
    mine, _ = viewer.infer(MODEL, session, place / "session", **slicer)
    same_mask(checks, mine, wanted, "an image that 3D Slicer uploaded for a session")
    truth, mask = voxels(case.label)[0], voxels(found)[0]
    checks.say(f"     Dice of this mask against the reference: {dice(truth, mask):.4f}")
    again, _ = viewer.infer(MODEL, case.name, place / "again")
    checks.hold(again.read_bytes() == found.read_bytes(), "the same request returns the same bytes")
    return found


def check_choice(checks: Checks, viewer: Viewer) -> None:
    """Both active-learning strategies select the next image."""
    sample = viewer.call("POST", "/activelearning/random", json={}).json()
    checks.hold(sample["id"].startswith("MUELLER_"), f"random: {sample['id']}")
    strategies = viewer.call("GET", "/info/").json()["strategies"]
    checks.hold(
        strategies["uncertainty"]["config"]["model"] == [MODEL], "viewers can choose the bundle of the strategy"
    )
    first = viewer.call(
        "POST", "/activelearning/uncertainty", json={"model": MODEL}, note="computes all uncertainties"
    ).json()["id"]
    second = viewer.call(
        "POST", "/activelearning/uncertainty", json={"model": MODEL}, note="uses stored uncertainties"
    ).json()["id"]
    checks.hold(first == second, f"uncertainty: {first}, and the same on a second request")
    listed = viewer.call("GET", "/datastore/?output=all").json()["objects"]
    values = {n: o["image"]["info"]["medseg_uncertainty"][MODEL]["value"] for n, o in listed.items()}
    checks.hold(
        max(values, key=values.__getitem__) == first, f"entropies: { ({n: round(v, 4) for n, v in values.items()}) }"
    )


def renumbered(case: Case, place: Path) -> Path:
    """Return a corrected label as a viewer saves it, with values that differ from those of the bundle."""
    image = nibabel.load(case.label)
    values = np.array([0, 7, 3], np.uint8)[np.asarray(image.dataobj).astype(int)]
    path = place / "corrected" / f"{case.name}.nii.gz"
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, image.affine), path)
    return path


def check_scoring(checks: Checks, viewer: Viewer, cases: list[Case], masks: Mapping[str, Path]) -> None:
    """Dice scoring of the saved labels equals an independent computation."""
    result = viewer.call("POST", "/scoring/dice?run_sync=true", json={"model": MODEL}).json()
    checks.hold(len(result["images"]) == len(cases), f"Dice of the saved labels: {result['mean']}")
    for case in cases:
        found = result["images"][case.name]
        wanted = dice(voxels(case.label)[0], voxels(masks[case.name])[0])
        checks.hold(
            abs(np.mean(list(found.values())) - wanted) < 1e-9, f"{case.name}: {wanted:.6f}, as computed independently"
        )


def check_training(checks: Checks, viewer: Viewer) -> None:
    """A training on the saved labels publishes new weights."""
    old = viewer.call("GET", "/info/").json()["models"][MODEL]["weights"]
    options = {"device": "cpu", "max_epochs": 1, "val_split": 0.34, "publish": "always"}
    viewer.call("POST", f"/train/{MODEL}", json=options)
    end, seconds = viewer.wait("/train/", seconds=420)
    info = viewer.call("GET", "/info/").json()
    stats = info["train_stats"][MODEL]
    checks.hold(end == "DONE" and stats["published"], f"fine-tuned in {seconds:.0f} s: {json.dumps(stats)[:150]}")
    model = info["models"][MODEL]
    checks.hold(model["weights"] != old and model["trained_here"], "the new weights are in use")


def check_tuned(checks: Checks, viewer: Viewer, case: Case, place: Path, before: Path, wanted: Path) -> None:
    """Predictions use the new weights."""
    found, _ = viewer.infer(MODEL, case.name, place / "tuned")
    checks.hold(found.read_bytes() != before.read_bytes(), "the new mask differs from the old one")
    same_mask(checks, found, wanted, "fine-tuned, server against `medseg predict`")
    truth = voxels(case.label)[0]
    scores = [dice(truth, voxels(path)[0]) for path in (before, found)]
    checks.say(f"     Dice against the reference before and after: {scores[0]:.4f}, {scores[1]:.4f}")


def check_batch(checks: Checks, viewer: Viewer, cases: list[Case], place: Path, wanted: Mapping[str, Path]) -> None:
    """Batch inference saves masks of all images without a label."""
    viewer.call("POST", f"/batch/infer/{MODEL}?images=unlabeled&run_sync=true", json={"device": "cpu"})
    for case in cases:
        path = place / f"{case.name}.batch.nii.gz"
        path.write_bytes(viewer.call("GET", f"/datastore/label?label={case.name}&tag=original").content)
        same_mask(checks, path, wanted[case.name], "batch, server against `medseg predict`")
    left = list((place / "state" / "results").iterdir())
    checks.hold(not left, f"no temporary mask is left on the server {[path.name for path in left]}")


def check_stopping(checks: Checks, viewer: Viewer) -> None:
    """Stopping a training does not change the weights."""
    old = viewer.call("GET", "/info/").json()["models"][MODEL]["weights"]
    viewer.call("POST", f"/train/{MODEL}", json={"device": "cpu", "max_epochs": 100000})
    time.sleep(8)
    viewer.call("GET", "/train/?check_if_running=true", note="is running")
    viewer.call("DELETE", "/train/")
    end, _ = viewer.wait("/train/", seconds=30)
    checks.hold(end == "STOPPED", "the training was stopped")
    checks.hold(viewer.call("GET", "/info/").json()["models"][MODEL]["weights"] == old, "the weights are unchanged")


def check_pictures(checks: Checks, place: Path, bundles: Path) -> None:
    """PNG tiles of pathology: save labels, train a network from scratch, predict with it."""
    checks.say("\n== PNG images in a folder ==")
    cases = tiles(place)
    (place / "studies").mkdir(parents=True)
    for case in cases:
        # Upper-case suffix, as cameras and Windows write it.
        shutil.copy(case.image, place / "studies" / case.image.with_suffix(".PNG").name)
    arguments = ("--bundles", str(bundles / TILES))
    with server(checks, str(place / "studies"), place / "state", *arguments) as (viewer, _):
        viewer.log_in()
        info = viewer.call("GET", "/info/").json()
        checks.hold(info["models"] == {} and list(info["trainers"]) == [TILES], "no weights yet, but trainable")
        for case in cases:
            pixels = (np.asarray(Image.open(case.label)) > 0).astype(np.uint8)
            label = place / f"label-{case.name}.png"
            Image.fromarray(pixels).save(label)
            viewer.save_label(case.name, label, {"gland": 1})
        viewer.call("POST", f"/train/{TILES}", json={"device": "cpu", "max_epochs": 2, "val_split": 0.25})
        end, seconds = viewer.wait("/train/", seconds=420)
        info = viewer.call("GET", "/info/").json()
        checks.hold(
            end == "DONE" and TILES in info["models"],
            f"trained in {seconds:.0f} s: {json.dumps(info['train_stats'][TILES])[:150]}",
        )
        found, _ = viewer.infer(TILES, cases[0].name, place / "server")
        masks = predict_by_command(place / "state" / "models" / TILES, [cases[0].image], place / "command")
        (a, _), (b, _) = voxels(found), voxels(masks[cases[0].name])
        checks.say(f"     foreground fraction: {np.mean(b > 0):.3f}")
        checks.hold(
            found.suffix.lower() == ".png" and a.shape == b.shape and bool((a == b).all()),
            f"the PNG mask equals that of `medseg predict`, {a.shape}",
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["folder", "pictures", "dicomweb"]))
