"""Pruning of a trained UNet++: measure each level, and write the smallest accurate one as a bundle.

Each level is measured after pruning, with its own weight file and the bundle's configs, in a separate process, so that
memory and warm caches of one level do not affect another.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle, find_bundle, merged
from medseg.bundle.compose import Config, compose
from medseg.errors import BundleError, CaseError, MedsegError, RequestError, error_from_json, in_a_line
from medseg.files import check_folder, load_json, replace_text
from medseg.io import list_dataset
from medseg.jobs.job import prepare
from medseg.networks.registry import NETWORKS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from medseg.jobs.job import Job
    from medseg.types import Progress, PrunableNetwork

__all__ = ["LevelResult", "PruneTable", "prune"]

_PRUNABLE = {entry.target: entry for entry in NETWORKS.values() if entry.prunable}
_LOSS = "medseg.components.DeepSupervision"
_METRIC = "monai.handlers.MeanDice"
_WORKER = "from medseg.tools.prune_worker import measure_from_stdin; measure_from_stdin()"


@dataclass(frozen=True)
class LevelResult:
    """Cost and accuracy of one level.

    Attributes:
        level: Name of the level: "L1" (shallowest) to "Ln" for the network pruned to that head, "mean" for all heads.
        parameters: Number of parameters.
        megabytes: Size of the parameters in MB (10^6 bytes).
        peak_memory_mib: Peak memory in MiB (2^20 bytes) until inference of the first case ends: resident memory of the
            process including libraries, or memory allocated by torch on a CUDA device; None if unknown (Windows).
        milliseconds: Median inference time of a case in ms, with all windows and their blending, after a warm-up.
        dice: Mean Dice over labels and cases, in the labels' geometry; None if no case has a label.
        iou: Mean intersection over union, computed in the same way.
    """

    level: str
    parameters: int
    megabytes: float
    peak_memory_mib: float | None
    milliseconds: float
    dice: float | None
    iou: float | None


@dataclass(frozen=True)
class PruneTable:
    """Comparison of the pruning levels of a bundle.

    Attributes:
        bundle: Name of the bundle.
        split: Split of the data set that was scored.
        cases: Number of cases.
        device: Device of inference.
        levels: Results from the shallowest level to the mean of all heads.
        selected: Level that was written, or None.
        root: Folder of the bundle that was written, or None.
    """

    bundle: str
    split: str
    cases: int
    device: str
    levels: tuple[LevelResult, ...]
    selected: str | None = None
    root: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON values; a score without a value is null."""
        return {name: value for name, value in asdict(self).items() if name != "root"}


@dataclass(frozen=True)
class _Variant:
    """Network definition and weight file of a level."""

    level: str
    parameters: int
    megabytes: float
    network_def: Config
    weights: Path


def prune(
    bundle: str | Path,
    data: str | Path,
    *,
    split: str = "val",
    select: float | None = None,
    output: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    trust: str | None = None,
    report: Progress | None = None,
) -> PruneTable:
    """Measure every pruning level of a UNet++ bundle; on request write the smallest one that is accurate enough.

    The request is checked before torch or MONAI are imported.

    Args:
        bundle: Folder of a bundle, or name of a shipped one; its network has heads at several depths, like the UNet++.
        data: Data set as `medseg.components.find_dataset` takes it.
        split: Part of the data set: "val", "train" or "test"; test scores are biased once a level was selected by them.
        select: Largest loss of Dice against the best level, 0 to 1; none is selected by default.
        output: New folder for the selected level as a complete bundle; required with `select`.
        settings: Settings of the measurement, by name; the new bundle keeps the bundle's own.
        trust: SHA-256 of a bundle that contains executable code, to confirm that you trust it.
        report: Called with the passes done, the number of passes, and a note.

    Returns:
        Size, memory, time and scores of each level.

    Raises:
        RequestError: The request is invalid; nothing was written.
        CaseError: A case cannot be scored, so the levels cannot be compared.
    """
    found, root = find_bundle(bundle), Path(data).absolute()
    try:
        _check_network(found)
    except (AttributeError, TypeError) as error:
        raise BundleError(f"the configs of bundle '{found.name}' have a wrong form: {in_a_line(error)}") from error
    target = _check_selection(found, select, output)
    cases = list_dataset(root, split)
    paths = {"dataset_dir": str(root), "split": split}
    job = prepare("evaluate", found, settings or {}, paths=paths, trust=trust)
    with tempfile.TemporaryDirectory() as folder:
        variants = _variants(job, Path(folder))
        request = {"bundle": str(found.root), "settings": dict(settings or {}), "paths": paths, "trust": trust}
        results, device = [], "cpu"
        for number, variant in enumerate(variants):
            tell = _part_of(report, number, len(variants), variant.level)
            answer = _in_own_process({**request, **_as_request(variant)}, tell)
            device = answer.pop("device")
            results.append(LevelResult(variant.level, variant.parameters, variant.megabytes, **answer))
        table = PruneTable(found.name, split, len(cases), device, tuple(results))
        if select is None or target is None:
            return table
        chosen = _smallest(results, select)
        _write(found, variants[chosen], target)
        return replace(table, selected=results[chosen].level, root=target)


def _check_network(bundle: Bundle) -> None:
    """Check in the configs that the network has pruning levels and is scored by Dice."""
    config = merged(bundle.load_configs("train", "evaluate"))
    network = config.get("network_def")
    kind = network.get("_target_") if isinstance(network, dict) else network
    if not isinstance(network, dict) or kind not in _PRUNABLE:
        raise RequestError(
            f"network {kind} of bundle '{bundle.name}' cannot be pruned: only {' and '.join(_PRUNABLE)} has heads at "
            "several depths. Train a bundle with that network."
        )
    if not network.get("deep_supervision", True) or len(network.get("features", (0,) * 5)) < 3:
        raise RequestError(
            f"the network of bundle '{bundle.name}' has one head only (deep_supervision="
            f"{network.get('deep_supervision', True)}, features={network.get('features')}), so it has no "
            "smaller level: use a bundle that was trained with deep_supervision=true and three or more features."
        )
    metrics = config.get("validate", {}).get("key_metric", {})
    if [entry.get("_target_") for entry in metrics.values()] != [_METRIC]:
        raise RequestError(
            f"unsupported key metric in the evaluation of bundle '{bundle.name}': {metrics}; expected {_METRIC}, since "
            "levels are compared by Dice"
        )


def _check_selection(bundle: Bundle, select: float | None, output: str | Path | None) -> Path | None:
    """Check that the selected level can be written, before anything is measured."""
    if (select is None) != (output is None):
        raise RequestError(
            "--select and --output require each other: the accepted loss of Dice, and the folder of the new bundle"
        )
    if select is None or output is None:
        return None
    if not 0 <= select <= 1:
        raise RequestError(f"invalid value {select} for --select: give the accepted loss of Dice, 0 to 1, such as 0.01")
    target = Path(output).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise RequestError(f"'{target}' exists: choose a new folder with --output")
    if not (bundle.root / "bundle.json").is_file():
        raise BundleError(f"no bundle.json in '{bundle.root}', from which the configs of the new bundle are built")
    source = load_json(bundle.root / "bundle.json")
    try:
        configs = compose({**source, "name": target.name})
    except BundleError as error:
        raise BundleError(f"cannot write a bundle to '{target}': {error}") from error
    built = bundle.load_configs("train")["train.json"]["network_def"]
    if configs["train"]["network_def"] != built:
        raise BundleError(f"the configs of '{bundle.name}' differ from its bundle.json; run `medseg bundle build`")
    check_folder(target.parent)
    return target


def _variants(job: Job, folder: Path) -> list[_Variant]:
    """Prune the network to every level, from the shallowest to the mean of all heads."""
    from medseg.jobs.config_functions import load_weights
    from medseg.training.checkpoint import save_tensors

    definition = job.config["network_def"]
    module = _PRUNABLE[definition["_target_"]].load()(
        **{name: value for name, value in definition.items() if name[0] != "_"}
    )
    load_weights(module, str(job.weights), str(job.bundle.root))
    network = cast("PrunableNetwork", module)
    network.set_output("mean", head_activation=network.arguments["head_activation"] or _activation(job.config))
    found = []
    for size in network.level_sizes():
        mean = size.level == "mean"
        cut = network if mean else network.prune(int(size.level))
        name = "mean" if mean else f"L{size.level}"
        weights = save_tensors(cut.state_dict(), folder / f"{name}.pt")
        kept = {"_target_": definition["_target_"], **cut.arguments}
        found.append(_Variant(name, size.parameters, size.megabytes, json.loads(json.dumps(kept)), weights))
    return found


def _activation(config: Mapping[str, Any]) -> str:
    """Return the activation that the config applies to the logits."""
    steps = config["validate"]["postprocessing"]["transforms"]
    by_step = any(step.get("sigmoid") is True for step in steps)
    return "sigmoid" if by_step else str(config["validate"]["inferer"].get("activation", "softmax"))


def _smallest(results: Sequence[LevelResult], loss: float) -> int:
    """Return the index of the smallest level whose Dice is at most `loss` below the best."""
    known = {number: result.dice for number, result in enumerate(results) if result.dice is not None}
    if not known:
        raise CaseError("no case of this split has a label, so the levels cannot be compared")
    best = max(known.values())
    return next(number for number, dice in known.items() if dice >= best - loss)


def _write(bundle: Bundle, variant: _Variant, target: Path) -> None:
    """Write a complete bundle atomically."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
        new = Bundle(Path(folder) / target.name)
        (new.root / "models").mkdir(parents=True)
        shutil.copyfile(variant.weights, new.weights)
        if (bundle.root / "docs").is_dir():
            shutil.copytree(bundle.root / "docs", new.root / "docs", symlinks=True)
        for file in (bundle.root / "LICENSE", *bundle.root.glob("models/LICENSE*")):
            if file.is_file():
                shutil.copy2(file, new.root / file.relative_to(bundle.root))
        source = load_json(bundle.root / "bundle.json")
        source |= {"name": target.name, "network_def": variant.network_def}
        if variant.level != "mean":
            source = _without_head_weights(source)
            # Weights of the whole network do not fit the pruned one.
            source.get("knobs", {}).pop("pretrained", None)
        replace_text(new.root / "bundle.json", json.dumps(source, indent=2) + "\n")
        build(new)
        if target.is_dir():
            target.rmdir()
        new.root.replace(target)


def _without_head_weights(node: Any) -> Any:
    """Remove the weights per head from a loss, since the pruned network has one head."""
    if isinstance(node, list):
        return [_without_head_weights(item) for item in node]
    if not isinstance(node, dict):
        return node
    heads = node.get("_target_") == _LOSS
    return {key: _without_head_weights(value) for key, value in node.items() if not (heads and key == "weights")}


def _part_of(report: Progress | None, number: int, total: int, level: str) -> Callable[[float, int, str], None]:
    def tell(done: float, passes: int, note: str) -> None:
        if report is not None:
            report(number * passes + done, total * passes, f"{level}: {note}")

    return tell


def _as_request(variant: _Variant) -> dict[str, Any]:
    return {"network_def": variant.network_def, "weights": str(variant.weights)}


def _in_own_process(request: Mapping[str, Any], tell: Callable[[float, int, str], None]) -> dict[str, Any]:
    """Run `measure_from_stdin` in a child process, and return its result or raise its error."""
    # The child imports the same packages as this process, and none from the current folder.
    places = {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place), "PYTHONSAFEPATH": "1"}
    answer: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **places},
            encoding="utf-8",
        ) as child,
    ):
        try:
            _hand_over(child, request)
            for line in child.stdout or ():
                answer = json.loads(line)
                if "passes" in answer:
                    tell(*answer["passes"])
        except BaseException:
            child.kill()
            raise
        code = child.wait()
        log.seek(0)
        said = log.read().decode("utf-8", errors="replace").strip().splitlines()
    if "error" in answer:
        raise error_from_json(answer["error"])
    if code or "result" not in answer:
        hint = f" ({said[-1]})" if said else ""
        raise MedsegError(
            f"the process of a level ended with code {code}{hint}; a negative code may mean too little memory"
        )
    result: dict[str, Any] = answer["result"]
    return result


def _hand_over(child: subprocess.Popen[str], request: Mapping[str, Any]) -> None:
    # If the child has already ended, its output is reported instead.
    with suppress(BrokenPipeError):
        if child.stdin is not None:
            child.stdin.write(json.dumps(request))
            child.stdin.close()
