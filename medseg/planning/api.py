"""`medseg.plan`: from a labeled data set to a bundle that can be trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import Bundle
from medseg.errors import BundleError, RequestError
from medseg.files import check_folder, load_json, replace_text
from medseg.io import find_dataset
from medseg.planning.request import PlanRequest, parse_duration, parse_network, parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from medseg.planning.case_stats import Fingerprint
    from medseg.planning.probe import Measurement
    from medseg.planning.result import Plan
    from medseg.types import Progress

__all__ = ["plan"]

_RECORD: Final = "plan.json"


def plan(
    data: str | Path,
    output: str | Path,
    *,
    network: str = "unet",
    dims: int | None = None,
    memory: str = "",
    budget: str = "",
    name: str = "",
    settings: Mapping[str, Any] | None = None,
    measure: bool = True,
    overwrite: bool = False,
    report: Progress | None = None,
) -> Plan:
    """Choose grid, patch size, network and schedule for a data set, and write them as an untrained bundle.

    Args:
        data: Folder with `dataset.json`, `imagesTr/` and `labelsTr/`, or `images/` and `labels/`.
        output: Folder of the new bundle.
        network: Class of a network in lower case, such as "unet"; with "+selfreg" its features are regularized.
        dims: 2 or 3, to refuse data of other dimensions; those of the images by default.
        memory: Limit of the device memory for training, such as "1500M"; 8 GiB by default.
        budget: Limit of the time for training and validation on this machine, such as "12h"; none by default.
        name: Name of the bundle, `<target>_<modality>_<network>`; made from folder and data by default.
        settings: Settings of the bundle that are not planned but given, by name.
        measure: Whether to measure a training step of the planned network; otherwise memory is counted only.
        overwrite: Whether to replace an untrained bundle in `output`.
        report: Called with the cases read, the number of cases, and a note.

    Returns:
        The bundle's description with a reason for each choice, and the forecast of memory and time.

    Raises:
        RequestError: The request is invalid, or data, memory and time do not allow a plan.
        BundleError: A setting that the bundle's template does not have.
    """
    request = _request(network, dims, memory, budget, name, settings or {})
    if request.budget is not None and not measure:
        raise RequestError("--budget needs a measured training step: omit --no-measure.")
    for part in ("train", "val"):
        find_dataset(data, part)
    bundle = _target(Path(output), overwrite=overwrite)
    found = _fingerprint(Path(data), bundle, request, report)
    made = replace(_plan_bundle(Path(data), bundle, request, found, report, measured=measure), root=bundle.root)
    _write(bundle, made, found)
    return made


def _request(
    network: str, dims: int | None, memory: str, budget: str, name: str, settings: Mapping[str, Any]
) -> PlanRequest:
    if dims not in (None, 2, 3):
        raise RequestError(f"Images have 2 or 3 dimensions, got dims={dims}.", found=dims, expected=[2, 3])
    kind, selfreg = parse_network(network)
    given: dict[str, Any] = {"memory": parse_size(memory), "memory_given": True} if memory else {}
    time = parse_duration(budget) if budget else None
    return PlanRequest(kind, selfreg, dims, budget=time, name=name, settings=settings, **given)


def _target(folder: Path, *, overwrite: bool) -> Bundle:
    """Return the bundle to write; refuse a folder with other files, a planned bundle, or a trained one."""
    bundle = Bundle(folder.absolute())
    if folder.is_file():
        raise RequestError(f"'{folder}' is a file, not a folder. Choose another folder for the bundle.", path=folder)
    if bundle.weights.is_file():
        raise RequestError(
            f"'{folder}' contains a trained bundle, which is never replaced. Choose another folder.",
            path=bundle.weights,
        )
    if (folder / "bundle.json").exists() and not overwrite:
        raise RequestError(
            f"'{folder}' already contains a bundle. Choose another folder, or pass --overwrite to replace it.",
            path=folder,
        )
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / n).exists() for n in (_RECORD, "bundle.json")):
        raise RequestError(f"'{folder}' is not empty and is not a bundle. Choose a new or empty folder.", path=folder)
    return bundle


def _fingerprint(data: Path, bundle: Bundle, request: PlanRequest, report: Progress | None) -> Fingerprint:
    """Compute and save the fingerprint; reuse the one in `plan.json` if the data files have not changed."""
    from medseg.planning.case_stats import Fingerprint
    from medseg.planning.fingerprint import take_fingerprint

    record = bundle.root / _RECORD
    known = None
    if record.is_file():
        try:
            known = Fingerprint.from_json(load_json(record).get("fingerprint", {}))
        except BundleError:
            known = None
    found = take_fingerprint(data, spatial_dims=request.dims, known=known, report=report)
    if found is not known:
        check_folder(bundle.root)
        _write_record(bundle, {"fingerprint": found.to_json()})
    return found


def _plan_bundle(
    data: Path, bundle: Bundle, request: PlanRequest, found: Fingerprint, report: Progress | None, *, measured: bool
) -> Plan:
    from medseg.bundle.compose import compose
    from medseg.jobs.config_functions import select_device
    from medseg.planning.plan import make_plan
    from medseg.planning.probe import measure

    case = find_dataset(data, "train")[found.middle_case()]
    cases = len(found.cases)

    def probe(config: Mapping[str, Any]) -> Measurement:
        if report is not None:
            size = " x ".join(str(n) for n in config["patch_size"])
            report(
                cases, cases, f"measuring training steps of {config['batch_size']} cases with patches of {size} voxels"
            )
        return measure(config, case)

    gpu = select_device(str(request.settings.get("device_name", "auto"))).type == "cuda"
    name = bundle.root.name
    return make_plan(found, request, compose=compose, probe=probe if measured else None, folder=name, gpu=gpu)


def _write(bundle: Bundle, made: Plan, found: Fingerprint) -> None:
    from medseg.bundle.build import build
    from medseg.planning.model_card import card

    check_folder(bundle.root)
    replace_text(bundle.root / "bundle.json", json.dumps(made.bundle, indent=2) + "\n")
    build(bundle)
    replace_text(bundle.root / "docs" / "README.md", card(made))
    _write_record(bundle, made.to_json(found))


def _write_record(bundle: Bundle, content: Mapping[str, Any]) -> None:
    replace_text(bundle.root / _RECORD, json.dumps(content, indent=1, allow_nan=False) + "\n")
