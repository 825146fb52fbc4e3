"""The label server, used over HTTP as viewers use it, and its masks against those of `medseg predict`.

Run by `make label-check` in the label server's own environment; `medseg predict` runs in medseg's. Each HTTP request is
logged with its status and time, each fact with "ok". Exit code 0: all held. Real data beside the project are used where
they are, generated shapes elsewhere.
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
    """Run the named parts; return the exit code."""
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
    checks.say(f"{checks.steps} requests, {checks.found} facts held, {time.perf_counter() - start:.0f} s")
    return 0


def volumes(place: Path) -> list[Case]:
    """Return five volumes with labels: of the hippocampus where the real data are, else generated."""
    root = DATA / "msd_hippocampus"
    if not root.is_dir():
        root = generated(place / "generated", MODEL, 5)
        names = sorted(path.name.removesuffix(".nii.gz") for path in (root / "imagesTr").iterdir())
    else:
        names = json.loads((root / "split.json").read_text())["val"][:5]
    return [Case(n, root / "imagesTr" / f"{n}.nii.gz", root / "labelsTr" / f"{n}.nii.gz") for n in names]


def tiles(place: Path) -> list[Case]:
    """Return four pictures with labels: of glands where the real data are, else generated."""
    root = DATA / "glas"
    if not root.is_dir():
        root = generated(place / "generated", TILES, 4)
    images = sorted((root / "images").glob("*.png"))[:4]
    return [Case(path.stem, path, root / "labels" / path.name) for path in images]


def generated(folder: Path, model: str, cases: int) -> Path:
    """Write random shapes of a bundle's kind; return their folder."""
    from medseg.bundle.catalog import find_bundle
    from medseg.tools.samples import write_samples

    return write_samples(folder, find_bundle(model), cases=cases)


def bundle_folder(place: Path) -> Path:
    """Return a folder of bundles: two as they are shipped, and one that would run a program."""
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
    """Return the masks that `medseg predict` writes, run in medseg's own environment, by the name of the image."""
    command = [str(MEDSEG), "predict", str(bundle), *map(str, images), "-o", str(output), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CheckError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return {path.name.partition(".")[0]: path for path in output.iterdir() if path.name != "manifest.json"}


def voxels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels of a volume or picture, and its affine."""
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
    """Return the Dice overlap of the foreground, averaged over the labels."""
    labels = sorted({*np.unique(a), *np.unique(b)} - {0})
    return float(np.mean([2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in labels]))


def same_mask(checks: Checks, found: Path, wanted: Path, what: str) -> None:
    """Check that two masks hold equal voxels in the same place, and that there is something in them."""
    (a, here), (b, there) = voxels(found), voxels(wanted)
    checks.hold(b.any() and a.shape == b.shape and bool((a == b).all()), f"{what}: Dice {dice(a, b):.6f}, same voxels")
    checks.hold(np.allclose(here, there, atol=1e-5), f"{what}: same place in space")


def check_folder(checks: Checks, place: Path, cases: list[Case], bundles: Path) -> None:
    """A folder of NIfTI files: predict, correct, fine-tune, predict again."""
    checks.say("\n== NIfTI files in a folder ==")
    studies = place / "studies"
    studies.mkdir(parents=True)
    renamed = []
    for number, case in enumerate(cases):
        # Links, of which each leads to a file of the same name.
        original = place / "originals" / str(number) / "image.nii.gz"
        original.parent.mkdir(parents=True)
        shutil.copy(case.image, original)
        image = studies / f"MUELLER_{number}.nii.gz"
        image.symlink_to(original)
        renamed.append(Case(f"MUELLER_{number}", image, case.label))
    # A folder that is called as an image is nothing to the server.
    (studies / "MUELLER_0").mkdir()
    (studies / "MUELLER_0" / "notes.txt").write_text("unrelated")
    wanted = predict_by_command(bundles / MODEL, [case.image for case in renamed], place / "command")
    with server(checks, str(studies), place / "state", "--bundles", str(bundles)) as (viewer, printed):
        check_login(checks, viewer)
        info = viewer.call("GET", "/info/").json()
        checks.hold(set(info["models"]) == {MODEL}, f"with weights: {list(info['models'])}")
        checks.hold(set(info["trainers"]) == {MODEL, TILES}, f"for training: {list(info['trainers'])}")
        checks.hold(list(info["refused"]) == ["evil_mri_unet"], f"refused: {info['refused']['evil_mri_unet'][:90]!r}")
        checks.hold("evil_mri_unet" in printed.read_text(), "the log names the refused bundle")
        checks.hold(not (place.parent / "owned").exists(), "its program did not run")
        check_requests(checks, viewer)
        before = check_prediction(checks, viewer, renamed[0], place, wanted["MUELLER_0"])
        check_choice(checks, viewer)
        for case in renamed[:3]:
            # 3D Slicer lists the labels of every bundle, whether they were drawn or not.
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
                "MUELLER" not in text and "medseg" in text, f"the {name} names no image ({len(text)} characters)"
            )


def check_login(checks: Checks, viewer: Viewer) -> None:
    """Without a login nothing is told; with one, everything."""
    checks.hold(viewer.call("GET", "/auth/").json()["enabled"] is True, "login is on by default")
    for method, path in (("GET", "/datastore/"), ("GET", "/info/"), ("GET", "/logs/"), ("GET", "/train/")):
        viewer.call(method, path, expect=(401, 403), note="no login")
    viewer.call("POST", f"/infer/{MODEL}?image=MUELLER_0", expect=(401, 403), note="no login")
    form = {"username": "checker", "password": "wrong"}
    viewer.call("POST", "/auth/token", data=form, expect=401, note="wrong password")
    viewer.headers = {"Authorization": "Bearer forged.token.here"}
    viewer.call("GET", "/datastore/", expect=(401, 403), note="forged token")
    viewer.headers = {}
    viewer.call("POST", "/reload", expect=404, note="open in MONAI Label, closed here")
    check_browser(checks, viewer)
    check_slicer(checks, viewer)
    viewer.log_in()


def check_browser(checks: Checks, viewer: Viewer) -> None:
    """OHIF in a browser: a form, and a cookie."""
    answer = viewer.call("GET", "/ohif/", expect=303, allow_redirects=False, note="no login")
    checks.hold(answer.headers["location"] == "/login", "OHIF leads to the form for the login")
    form = {"username": ACCOUNT, "password": "wrong"}
    viewer.call("POST", "/login", data=form, expect=401, note="wrong password")
    form["password"] = PASSWORD
    answer = viewer.call("POST", "/login", data=form, expect=303, allow_redirects=False)
    cookie = answer.headers["set-cookie"]
    checks.hold("HttpOnly" in cookie and "SameSite=strict" in cookie, "the cookie is for this server and no script")
    page = viewer.call("GET", "/ohif/", cookies=answer.cookies, note="with the cookie").text
    checks.hold("<html" in page.lower(), "OHIF is served")
    viewer.call("GET", "/info/", cookies=answer.cookies, note="with the cookie")
    old = {"medseg_token": "of.an.earlier.start"}
    answer = viewer.call("GET", "/ohif/", expect=303, allow_redirects=False, cookies=old, note="with an old cookie")
    checks.hold(answer.headers["location"] == "/login", "an old cookie leads to the form, too")


def check_slicer(checks: Checks, viewer: Viewer) -> None:
    """The module of 3D Slicer talks through this client, which comes with MONAI Label."""
    path = Path(sys.prefix, "monailabel/plugins/slicer/MONAILabel/MONAILabelLib/client.py")
    spec = importlib.util.spec_from_file_location("slicer_client", path)
    slicer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slicer)
    client = slicer.MONAILabelClient(viewer.address)
    checks.hold(client.auth_enabled(), "3D Slicer's client sees that a login is needed")
    client.update_auth(client.auth_token(ACCOUNT, PASSWORD))
    checks.hold(
        client.auth_valid_token() and MODEL in client.info()["models"], "3D Slicer's client logs in and sees the models"
    )


def check_requests(checks: Checks, viewer: Viewer) -> None:
    """Requests that lead out, or to what is not offered, are answered with a reason."""
    viewer.call("POST", f"/infer/{MODEL}?image=../../etc/hostname", expect=400, note="leads out")
    viewer.call("GET", "/datastore/image?image=/etc/hostname", expect=400, note="a path")
    form = {"params": json.dumps({"image": "/etc/hostname"})}
    viewer.call("POST", f"/infer/{MODEL}?image=MUELLER_0", data=form, expect=400, note="a path among the options")
    form = {"params": json.dumps({"save_label": True, "label_tag": "../../x"})}
    viewer.call("POST", f"/infer/{MODEL}?image=MUELLER_0", data=form, expect=400, note="a tag that leads out")
    answer = viewer.call("POST", f"/infer/{MODEL}?image=MUELLER_0", data={"params": "{"}, expect=400, note="no JSON")
    checks.hold("JSON" in answer.json()["detail"], "the answer says so")
    viewer.call("POST", f"/infer/{MODEL}?image=nobody", expect=400, note="no such image")
    form = {"params": json.dumps({"image": "../MUELLER_0"})}
    viewer.call("POST", f"/infer/{MODEL}?image=MUELLER_0", data=form, expect=400, note="the same, nowhere")
    files = {"files": ("a.tar", b"")}
    viewer.call("PUT", "/session/?uncompress=true", files=files, expect=400, note="an archive to unpack")
    answer = viewer.call("POST", "/infer/evil_mri_unet?image=MUELLER_0", expect=(400, 404, 500), note="refused bundle")
    checks.hold("evil_mri_unet" in answer.text, f"the answer names it: {answer.text[:80]!r}")
    viewer.call("GET", "/info/", headers={"Host": "evil.example"}, expect=400, note="a foreign name of this server")


def check_prediction(checks: Checks, viewer: Viewer, case: Case, place: Path, wanted: Path) -> Path:
    """The mask as 3D Slicer asks for it, and as it is by default, against the command's."""
    slicer = {"result_extension": ".nrrd", "result_dtype": "uint16", "result_compress": False}
    found, said = viewer.infer(MODEL, case.name, place / "slicer", **slicer)
    same_mask(checks, found, wanted, "NRRD of the server against NIfTI of `medseg predict`")
    checks.hold(said["label_names"] == {"anterior": 1, "posterior": 2}, f"labels: {said['label_names']}")
    found, _ = viewer.infer(MODEL, case.name, place / "default")
    same_mask(checks, found, wanted, "NIfTI of the server against `medseg predict`")
    checks.hold(found.read_bytes() == wanted.read_bytes(), "and the two files are equal byte for byte")
    answer = viewer.call("PUT", "/session/", files={"files": ("mine.nii.gz", case.image.read_bytes())}).json()
    session = f"any&session_id={answer['session_id']}"
    mine, _ = viewer.infer(MODEL, session, place / "session", **slicer)
    same_mask(checks, mine, wanted, "an image that 3D Slicer has loaded itself and sent for a session")
    truth, mask = voxels(case.label)[0], voxels(found)[0]
    checks.say(f"     Dice of that mask against the truth: {dice(truth, mask):.4f}")
    again, _ = viewer.infer(MODEL, case.name, place / "again")
    checks.hold(again.read_bytes() == found.read_bytes(), "the same request gives the same bytes")
    return found


def check_choice(checks: Checks, viewer: Viewer) -> None:
    """The next image, at random and by uncertainty."""
    sample = viewer.call("POST", "/activelearning/random", json={}).json()
    checks.hold(sample["id"].startswith("MUELLER_"), f"at random: {sample['id']}")
    strategies = viewer.call("GET", "/info/").json()["strategies"]
    checks.hold(strategies["uncertainty"]["config"]["model"] == [MODEL], "viewers can choose the bundle that measures")
    first = viewer.call("POST", "/activelearning/uncertainty", json={"model": MODEL}, note="measures all").json()["id"]
    second = viewer.call("POST", "/activelearning/uncertainty", json={"model": MODEL}, note="remembers").json()["id"]
    checks.hold(first == second, f"by uncertainty: {first}, and the same when asked again")
    listed = viewer.call("GET", "/datastore/?output=all").json()["objects"]
    values = {n: o["image"]["info"]["medseg_uncertainty"][MODEL]["value"] for n, o in listed.items()}
    checks.hold(
        max(values, key=values.__getitem__) == first, f"entropies: { ({n: round(v, 4) for n, v in values.items()}) }"
    )


def renumbered(case: Case, place: Path) -> Path:
    """Return a corrected label as a viewer saves it: other values, which only their names explain."""
    image = nibabel.load(case.label)
    values = np.array([0, 7, 3], np.uint8)[np.asarray(image.dataobj).astype(int)]
    path = place / "corrected" / f"{case.name}.nii.gz"
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, image.affine), path)
    return path


def check_scoring(checks: Checks, viewer: Viewer, cases: list[Case], masks: Mapping[str, Path]) -> None:
    """Dice of the saved labels against predictions."""
    result = viewer.call("POST", "/scoring/dice?run_sync=true", json={"model": MODEL}).json()
    checks.hold(len(result["images"]) == len(cases), f"Dice of the saved labels: {result['mean']}")
    for case in cases:
        found = result["images"][case.name]
        wanted = dice(voxels(case.label)[0], voxels(masks[case.name])[0])
        checks.hold(abs(np.mean(list(found.values())) - wanted) < 1e-9, f"{case.name}: {wanted:.6f}, computed anew")


def check_training(checks: Checks, viewer: Viewer) -> None:
    """Fine-tune on the saved labels."""
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
    """Predict with the new weights."""
    found, _ = viewer.infer(MODEL, case.name, place / "tuned")
    checks.hold(found.read_bytes() != before.read_bytes(), "the new mask is another one")
    same_mask(checks, found, wanted, "fine-tuned, server against `medseg predict`")
    truth = voxels(case.label)[0]
    scores = [dice(truth, voxels(path)[0]) for path in (before, found)]
    checks.say(f"     Dice against the truth before and after: {scores[0]:.4f}, {scores[1]:.4f}")


def check_batch(checks: Checks, viewer: Viewer, cases: list[Case], place: Path, wanted: Mapping[str, Path]) -> None:
    """Masks of all images without a label, saved by the server."""
    viewer.call("POST", f"/batch/infer/{MODEL}?images=unlabeled&run_sync=true", json={"device": "cpu"})
    for case in cases:
        path = place / f"{case.name}.batch.nii.gz"
        path.write_bytes(viewer.call("GET", f"/datastore/label?label={case.name}&tag=original").content)
        same_mask(checks, path, wanted[case.name], "batch, server against `medseg predict`")
    left = list((place / "state" / "results").iterdir())
    checks.hold(not left, f"no mask stays behind in the server's own folder {[path.name for path in left]}")


def check_stopping(checks: Checks, viewer: Viewer) -> None:
    """A training that would take long is stopped, and leaves the weights as they were."""
    old = viewer.call("GET", "/info/").json()["models"][MODEL]["weights"]
    viewer.call("POST", f"/train/{MODEL}", json={"device": "cpu", "max_epochs": 100000})
    time.sleep(8)
    viewer.call("GET", "/train/?check_if_running=true", note="runs")
    viewer.call("DELETE", "/train/")
    end, _ = viewer.wait("/train/", seconds=30)
    checks.hold(end == "STOPPED", "the training was stopped")
    checks.hold(
        viewer.call("GET", "/info/").json()["models"][MODEL]["weights"] == old, "a stopped training changes nothing"
    )


def check_pictures(checks: Checks, place: Path, bundles: Path) -> None:
    """PNG tiles of pathology: labels are saved, a network is trained from nothing, and predicts."""
    checks.say("\n== PNG pictures in a folder ==")
    cases = tiles(place)
    (place / "studies").mkdir(parents=True)
    for case in cases:
        # As cameras and Windows write it.
        shutil.copy(case.image, place / "studies" / case.image.with_suffix(".PNG").name)
    arguments = ("--bundles", str(bundles / TILES))
    with server(checks, str(place / "studies"), place / "state", *arguments) as (viewer, _):
        viewer.log_in()
        info = viewer.call("GET", "/info/").json()
        checks.hold(info["models"] == {} and list(info["trainers"]) == [TILES], "no weights yet, but it can be trained")
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
        checks.say(f"     share of foreground: {np.mean(b > 0):.3f}")
        checks.hold(
            found.suffix.lower() == ".png" and a.shape == b.shape and bool((a == b).all()),
            f"the PNG mask is the command's, {a.shape}",
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["folder", "pictures", "dicomweb"]))
