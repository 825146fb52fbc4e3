"""`medseg plan`: from a labeled data set to a bundle that can be trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.bundle.catalog import Bundle
from medseg.bundle.knobs import parse_settings
from medseg.cli.console import Device, Settings, errors, output, progress, with_options
from medseg.errors import BundleError, RequestError
from medseg.files import check_folder, load_json, replace_text
from medseg.io import find_dataset
from medseg.networks.registry import NETWORKS
from medseg.planning import PlanRequest, parse_duration, parse_network, parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from medseg.planning import Fingerprint, Measurement, Plan

__all__ = ["plan"]

_RECORD = "plan.json"


def plan(
    data: Annotated[
        Path,
        typer.Argument(
            help="Data set: a folder with dataset.json, imagesTr/ and labelsTr/, or images/ and labels/.",
            metavar="DATASET",
        ),
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.", metavar="BUNDLE")],
    network: Annotated[
        str, typer.Option(help=f"{', '.join(NETWORKS).lower()}; with +selfreg its features are regularized.")
    ] = "unet",
    dims: Annotated[int | None, typer.Option(min=2, max=3, help="Refuse data of other dimensions.")] = None,
    memory: Annotated[
        str, typer.Option(help="What training may take on its device, such as 8G (the default) or 1500M.")
    ] = "",
    budget: Annotated[
        str, typer.Option(help="Time that training with its validations may take on this machine, such as 30m or 12h.")
    ] = "",
    name: Annotated[str, typer.Option(help="Name of the bundle: <target>_<modality>_<network>.")] = "",
    settings: Settings = None,
    device: Device = None,
    measure_it: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure a training step of what is planned.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Plan an untrained bundle anew.")] = False,
) -> None:
    """DatasetAnalysis at a data set, choose grid, patch, network and schedule for it, and write them as a bundle."""
    request = _request(network, dims, memory, budget, name, parse_settings(with_options(settings, device_name=device)))
    if request.budget is not None and not measure_it:
        raise RequestError("--budget needs the measurement that --no-measure leaves out")
    find_dataset(data, "train")
    find_dataset(data, "val")
    bundle = _target(out, overwrite=overwrite)
    found = _fingerprint(data, bundle, request)
    made = _plan(data, bundle, request, found, measure_it=measure_it)
    _write(bundle, made, found, request)
    _print(made, bundle, request, data)


def _request(
    network: str, dims: int | None, memory: str, budget: str, name: str, settings: Mapping[str, Any]
) -> PlanRequest:
    kind, selfreg = parse_network(network)
    given: dict[str, Any] = {"memory": parse_size(memory), "memory_given": True} if memory else {}
    return PlanRequest(
        kind, selfreg, dims, budget=parse_duration(budget) if budget else None, name=name, settings=settings, **given
    )


def _target(folder: Path, *, overwrite: bool) -> Bundle:
    """Refuse a folder that holds something else, or what would be lost."""
    bundle = Bundle(folder.absolute())
    if folder.is_file():
        raise RequestError(f"'{folder}' is a file; name a folder for the bundle")
    if bundle.weights.is_file():
        raise RequestError(f"'{bundle.weights}' was trained by the plan that is there; plan into another folder")
    if (folder / "bundle.json").exists() and not overwrite:
        raise RequestError(f"'{folder}' holds a bundle; name another folder, or give --overwrite to plan it anew")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / n).exists() for n in (_RECORD, "bundle.json")):
        raise RequestError(f"'{folder}' holds other files; name a new folder for the bundle")
    return bundle


def _fingerprint(data: Path, bundle: Bundle, request: PlanRequest) -> Fingerprint:
    """Take the fingerprint, or that of an earlier plan if the files have not changed, and keep it."""
    from medseg.planning import Fingerprint, take_fingerprint

    record = bundle.root / _RECORD
    known = None
    if record.is_file():
        try:
            known = Fingerprint.from_json(load_json(record).get("fingerprint", {}))
        except BundleError:
            known = None
    with progress("cases") as report:
        found = take_fingerprint(data, spatial_dims=request.dims, known=known, report=report)
    if found is not known:
        check_folder(bundle.root)
        _write_record(bundle, {"fingerprint": found.to_json()})
    return found


def _plan(data: Path, bundle: Bundle, request: PlanRequest, found: Fingerprint, *, measure_it: bool) -> Plan:
    from medseg.bundle.compose import compose
    from medseg.jobs.config_functions import select_device
    from medseg.planning import make_plan, measure

    case = find_dataset(data, "train")[found.middle_case()]
    gpu = select_device(str(request.settings.get("device_name", "auto"))).type == "cuda"

    def probe(config: Mapping[str, Any]) -> Measurement:
        size = " x ".join(str(n) for n in config["patch_size"])
        note = f"measuring training steps of {config['batch_size']} cases, patches of {size} ..."
        errors.print(note, markup=False, highlight=False)
        return measure(config, case)

    return make_plan(
        found, request, compose=compose, probe=probe if measure_it else None, folder=bundle.root.name, gpu=gpu
    )


def _write(bundle: Bundle, made: Plan, found: Fingerprint, request: PlanRequest) -> None:
    from medseg.bundle.build import build
    from medseg.planning.model_card import card

    check_folder(bundle.root)
    replace_text(bundle.root / "bundle.json", json.dumps(made.bundle, indent=2) + "\n")
    build(bundle)
    replace_text(bundle.root / "docs" / "README.md", card(made, request))
    _write_record(bundle, made.to_json(found))


def _write_record(bundle: Bundle, content: Mapping[str, Any]) -> None:
    replace_text(bundle.root / _RECORD, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _print(made: Plan, bundle: Bundle, request: PlanRequest, data: Path) -> None:
    from rich.table import Table

    from medseg.planning.model_card import forecast_rows

    for knob, reason in made.bundle["plan"].items():
        value = made.bundle["knobs"].get(knob)
        text = f" = {json.dumps(value)}" if value is not None else ""
        output.print(f"{knob}{text}: {reason}", markup=False, highlight=False, soft_wrap=True)
    table = Table("forecast", "", show_header=False)
    for what, figure in forecast_rows(made, request):
        table.add_row(what, figure)
    output.print(table)
    if made.bundle["name"] != bundle.name:
        output.print(f"the bundle is called {made.bundle['name']}; rename its folder so, for others to find it by name")
    output.print(f"next: medseg train {bundle.root} --data {data}", markup=False, highlight=False, soft_wrap=True)
