"""From a fingerprint to the content of a `bundle.json`, with the reason of each choice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from medseg.inferers.blend import count_windows
from medseg.machine import shown_bytes
from medseg.networks.registry import NETWORKS
from medseg.planning.case_stats import shown
from medseg.planning.choices import analyze, bundle_name
from medseg.planning.network_sizing import strides_note
from medseg.planning.result import Forecast, Plan
from medseg.planning.schedule import Schedule, epoch_steps, fixed_schedule, schedule_for, schedule_without_limit
from medseg.planning.search import Candidate, Found, candidates, find, overlap_for, pace_of, positive_integer

if TYPE_CHECKING:
    from medseg.planning.case_stats import Fingerprint
    from medseg.planning.choices import DatasetAnalysis
    from medseg.planning.probe import Measurement
    from medseg.planning.request import PlanRequest
    from medseg.planning.schedule import Throughput

__all__ = ["make_plan"]

# Composes the content of a bundle.json into configs by name, such as medseg.bundle.compose.compose.
Compose: TypeAlias = Callable[[dict[str, Any]], Mapping[str, Mapping[str, Any]]]
# Measures a train config, such as medseg.planning.probe.measure on one case.
Probe: TypeAlias = Callable[[Mapping[str, Any]], "Measurement"]

_AVERAGES = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
_WARMUP_SHARE = 30
# (lowest fraction of foreground voxels, fraction of patches that are centered on foreground).
_FOREGROUND = ((0.25, 0.0), (0.1, 0.33), (0.01, 0.5), (0.0, 0.67))


def make_plan(
    fingerprint: Fingerprint,
    request: PlanRequest,
    *,
    compose: Compose,
    probe: Probe | None,
    folder: str = "",
    gpu: bool = False,
) -> Plan:
    """Plan a bundle.

    Without a budget the plan depends on the data and the request only, apart from `precision`, which is measured. With
    a budget it also depends on the measured speed.

    Args:
        fingerprint: Statistics of the training cases.
        request: Network, memory, budget and settings.
        compose: Composes the content of a `bundle.json` into configs and validates it.
        probe: Measures a train config; None for no measurement, which plans for float32.
        folder: Name of the bundle's folder, used as the bundle's name where it is a valid one.
        gpu: Whether training will run on a GPU.

    Raises:
        RequestError: Data, memory or time that do not allow a plan, or an invalid value for a setting.
        BundleError: Unknown setting of the template.
    """
    for setting in ("max_epochs", "val_interval"):
        positive_integer(setting, request.settings.get(setting, 1))
    analysis = analyze(fingerprint, request)
    name = bundle_name(request, folder, analysis, fingerprint)
    trial = Schedule(1, 1, 0.0, "")

    every = list(candidates(analysis, fingerprint, request))

    def config(candidate: Candidate) -> Mapping[str, Any]:
        return compose(_bundle(name, analysis, fingerprint, request, Found(candidate, None, 0, 0), trial))["train"]

    config(every[-1])  # validates the settings before anything is measured
    measure = None if probe is None else _measuring(probe, config, request)
    found = find(every, analysis, fingerprint, request, measure, gpu=gpu)
    pace = None
    if found.measured is not None:
        pace = pace_of(found.candidate, found.measured, analysis, fingerprint, request)
    schedule = _schedule(request, fingerprint, found.candidate, pace)
    bundle = _bundle(name, analysis, fingerprint, request, found, schedule)
    compose(bundle)
    return Plan(bundle, _forecast(found, pace, schedule, gpu=gpu), found.measured, request)


def _measuring(
    probe: Probe, config: Callable[[Candidate], Mapping[str, Any]], request: PlanRequest
) -> Callable[[Candidate], Measurement]:
    return lambda item: _chosen_precision(probe(config(item)), request)


def _chosen_precision(measured: Measurement, request: PlanRequest) -> Measurement:
    """Keep only the precision that the user set, if any."""
    wanted = {name: time for name, time in measured.step_seconds.items() if name == request.settings.get("precision")}
    return replace(measured, step_seconds=wanted or measured.step_seconds)


def _schedule(
    request: PlanRequest, fingerprint: Fingerprint, candidate: Candidate, pace: Throughput | None
) -> Schedule:
    epochs = request.settings.get("max_epochs")
    interval = request.settings.get("val_interval")
    if isinstance(epochs, int) and epochs > 0:
        return fixed_schedule(epochs, interval if isinstance(interval, int) and interval > 0 else None, pace)
    if request.budget is not None and pace is not None:
        return schedule_for(request.budget, pace)
    return schedule_without_limit(_steps(request, fingerprint, candidate), pace)


def _steps(request: PlanRequest, fingerprint: Fingerprint, candidate: Candidate) -> int:
    return epoch_steps(len(fingerprint.cases), candidate.batch_size, request.settings.get("steps_per_epoch"))


def _forecast(found: Found, pace: Throughput | None, schedule: Schedule, *, gpu: bool) -> Forecast:
    memory = found.candidate.memory(gpu=gpu)
    if pace is None or found.measured is None:
        return Forecast(memory)
    held = 0 if gpu else found.measured.program_bytes + found.candidate.cache_bytes
    return Forecast(
        memory=memory,
        measured_memory=held + found.measured.step_bytes,
        step=pace.step,
        epoch=pace.epoch,
        validation=pace.validation,
        total=schedule.seconds,
        device=found.measured.device,
    )


def _bundle(
    name: str,
    analysis: DatasetAnalysis,
    fingerprint: Fingerprint,
    request: PlanRequest,
    found: Found,
    schedule: Schedule,
) -> dict[str, Any]:
    """Return the content of the `bundle.json`."""
    candidate = found.candidate
    knobs, reasons = _knobs(analysis, fingerprint, request, found, schedule)
    blocks, block_reasons = _blocks(analysis, request)
    reasons |= block_reasons
    reasons |= dict.fromkeys(request.settings, "set by the user")
    labels = ", ".join(list(analysis.classes.labels.values())[1:])
    sizes = f"{len(fingerprint.cases)} training and {fingerprint.validation_cases} validation cases"
    bundle: dict[str, Any] = {
        "name": name,
        "template": analysis.template,
        "version": "0.1.0",
        "changelog": {"0.1.0": "Planned from the data set."},
        "description": f"Segments {labels} with a {request.network}. Planned by `medseg plan` for the data set "
        f"{fingerprint.dataset} ({sizes}).",
        "authors": "not stated",
        "data_source": fingerprint.dataset,
        "intended_use": "Research. Not for diagnosis or treatment decisions",
        "channels": analysis.channels,
        "labels": analysis.classes.labels,
    }
    if not analysis.classes.is_plain:
        bundle["label_mapping"] = analysis.classes.mapping
    bundle["network_def"] = dict(candidate.definition)
    if blocks:
        bundle["blocks"] = blocks
    return {**bundle, "knobs": {**knobs, **request.settings}, "plan": reasons}


def _knobs(
    analysis: DatasetAnalysis, fingerprint: Fingerprint, request: PlanRequest, found: Found, schedule: Schedule
) -> tuple[dict[str, Any], dict[str, str]]:
    item = found.candidate
    layout = item.layout
    steps = _steps(request, fingerprint, item) * schedule.epochs
    sampled, sampling_reason = _sampling(analysis, fingerprint, item)
    knobs: dict[str, Any] = {
        **analysis.knobs,
        "patch_size": list(layout.patch),
        "roi_size": list(layout.patch),
        "sw_batch_size": 2
        if analysis.spatial_dims == 3 and layout.voxels <= 100_000
        else 1
        if analysis.spatial_dims == 3
        else 4,
        "overlap": overlap_for(analysis, item),
        "batch_size": item.batch_size,
        "patches_per_case": item.patches_per_case,
        "foreground_sampling": sampled,
        "max_epochs": schedule.epochs,
        "val_interval": schedule.interval,
        "warmup_epochs": max(1, schedule.epochs // _WARMUP_SHARE),
        "learning_rate": _learning_rate(request, analysis),
        "ema_decay": _average(steps),
        "precision": found.measured.precision if found.measured else "float32",
    }
    reasons = {
        **analysis.reasons,
        "network_def": _network_reason(analysis, request, found),
        "patch_size": _patch_reason(analysis, item),
        "roi_size": f"the size of the training patches, {shown(layout.patch)}",
        "sw_batch_size": f"windows per forward pass; a window has {layout.voxels:,} voxels",
        "overlap": _overlap_reason(analysis, item),
        "batch_size": _batch_reason(analysis, fingerprint, item),
        "patches_per_case": _patches_reason(item),
        "foreground_sampling": sampling_reason,
        "max_epochs": schedule.reason,
        "val_interval": f"every {schedule.interval} of {schedule.epochs} epochs and after the last: often enough to "
        "find the best weights, at a tenth of the training time or less",
        "warmup_epochs": f"one in {_WARMUP_SHARE} of the {schedule.epochs} epochs, at least one",
        "learning_rate": _rate_reason(request, analysis),
        "ema_decay": f"averages about the last {1 / (1 - _average(steps)):.0f} of {steps:,} steps, in which the "
        "learning rate is near 0",
        "precision": _precision_reason(found.measured),
    }
    passed = -(-len(fingerprint.cases) // item.batch_size)
    if steps != passed * schedule.epochs and "steps_per_epoch" not in request.settings:
        knobs["steps_per_epoch"] = steps // schedule.epochs
        reasons["steps_per_epoch"] = (
            f"one pass over the {len(fingerprint.cases)} training cases takes only {passed} steps; longer epochs spend "
            "less time on checkpoints and other work between epochs"
        )
    if not item.cache_all:
        knobs["cache_memory"] = f"{item.cache_bytes >> 20}M"
        reasons["cache_memory"] = (
            f"two fifths of the limit of {shown_bytes(request.memory)}; cases beyond it are loaded again for each use"
        )
    return knobs, reasons


def _blocks(analysis: DatasetAnalysis, request: PlanRequest) -> tuple[dict[str, Any], dict[str, str]]:
    blocks, own = dict(analysis.blocks), NETWORKS[request.network].planning
    loss: dict[str, Any] = {"_target_": "medseg.components.TrainingLoss", "loss": {"block": "loss"}}
    why = (
        "Dice and cross-entropy in equal parts: Dice is insensitive to class imbalance, and cross-entropy gives every "
        "voxel a gradient from the start"
    )
    if own.training_loss:
        loss = copy.deepcopy(dict(own.training_loss))
        why += f"; {own.loss_reason}"
    if request.selfreg:
        loss = {"_target_": "medseg.components.SelfRegularizedLoss", "loss": loss}
        why += "; SelfReg regularizes the features, as requested"
    if own.training_loss or request.selfreg:
        blocks["training_loss"] = loss
    return blocks, {"loss": why}


def _sampling(analysis: DatasetAnalysis, fingerprint: Fingerprint, item: Candidate) -> tuple[float, str]:
    """Return the fraction of patches that are centered on foreground, and the reason."""
    foreground = sum(share for value, share in fingerprint.shares().items() if value != 0)
    sizes = f"{shown(item.layout.patch)} voxels, in a median image of {shown(analysis.shape)}"
    if item.layout.whole:
        return 0.0, f"a patch covers the median image, {shown(analysis.shape)}, and with it the foreground"
    share = next(share for limit, share in _FOREGROUND if foreground >= limit)
    return share, (
        f"{100 * foreground:.2g}% of all voxels are foreground, and a patch has {sizes}: the rarer the foreground, the "
        "more patches are centered on it, with each class equally often"
    )


def _patches_reason(item: Candidate) -> str:
    room = shown_bytes(item.cache_bytes)
    if item.patches_per_case == 1:
        return f"all prepared cases fit in {room} of memory, so each patch of a step comes from another case"
    return f"only {room} of the prepared cases fit in memory, so several patches are taken from each loaded case"


def _learning_rate(request: PlanRequest, analysis: DatasetAnalysis) -> float:
    return NETWORKS[request.network].planning.learning_rate[analysis.spatial_dims]


def _rate_reason(request: PlanRequest, analysis: DatasetAnalysis) -> str:
    return f"default for {request.network} in {analysis.spatial_dims}D with AdamW, warm-up and cosine decay"


def _average(steps: int) -> float:
    return max((decay for decay in _AVERAGES if 1 / (1 - decay) <= steps / 40), default=_AVERAGES[0])


def _network_reason(analysis: DatasetAnalysis, request: PlanRequest, found: Found) -> str:
    item = found.candidate
    layout = item.layout
    step = " x ".join(map(str, layout.step))
    text = (
        f"{request.network} of width {item.width}, with {item.cost.parameters:,} parameters and {len(layout.strides)} "
        f"poolings down to {shown(layout.bottom)} voxels (total stride {step}; {strides_note(request.network)})"
    )
    if analysis.spatial_dims == 3 and len(set(layout.step)) > 1:
        text += "; axes with coarse spacing are pooled later than fine ones"
    text += f"; {_norm_reason(analysis)}"
    if found.slower:
        text += f"; {found.slower} larger sizes are too slow for enough training steps within the budget"
    if found.larger:
        text += f"; {found.larger} larger sizes do not fit in {shown_bytes(request.memory)}"
    elif request.budget is None and item.width <= 16:
        text += "; with neither a GPU nor a --budget, a size that two CPU cores train in hours"
    return text


def _norm_reason(analysis: DatasetAnalysis) -> str:
    if analysis.spatial_dims == 3:
        return "instance norm, because a step has few patches"
    if analysis.norm == "batch":
        return "batch norm, because images share one intensity scale, so the mean color of a patch is informative"
    return "instance norm, because the images have no common intensity scale"


def _patch_reason(analysis: DatasetAnalysis, item: Candidate) -> str:
    layout = item.layout
    spacing = f" at {shown(analysis.spacing)} mm" if analysis.spacing else ""
    if layout.whole:
        return (
            f"covers the median image, {shown(analysis.shape)}{spacing}, rounded up to multiples of the total stride "
            f"{shown(layout.step)}"
        )
    side = [n * mm for n, mm in zip(layout.patch, analysis.spacing or (1.0,) * len(layout.patch), strict=True)]
    extent = f"{shown(side, 3)} {'mm' if analysis.spacing else 'pixels'}"
    return (
        f"covers {extent} of the median image, {shown(analysis.shape)}{spacing}: nearly equal sides, in multiples of "
        f"the total stride {shown(layout.step)}, as large as memory and time allow"
    )


def _overlap_reason(analysis: DatasetAnalysis, item: Candidate) -> str:
    if item.layout.whole:
        return f"one window covers the median image, {shown(analysis.shape)}; in larger images, windows overlap by half"
    share = overlap_for(analysis, item)
    count = count_windows(analysis.shape, item.layout.patch, share)
    return f"a window's border is blended with its neighbors; the median image takes {count} windows"


def _batch_reason(analysis: DatasetAnalysis, fingerprint: Fingerprint, item: Candidate) -> str:
    cases = len(fingerprint.cases)
    text = f"{item.batch} patch{'es' * (item.batch > 1)} of {item.layout.voxels:,} voxels per step"
    if item.patches_per_case > 1:
        text += f", {item.patches_per_case} from {_cases(item)}"
    if item.batch_size >= cases:
        text += f" (of {cases} training cases)"
    norm = "batch norm needs several patches" if analysis.norm == "batch" else "instance norm needs no more"
    return f"{text}: {norm}"


def _cases(item: Candidate) -> str:
    return "one case" if item.batch_size == 1 else f"each of {item.batch_size} cases"


def _precision_reason(measured: Measurement | None) -> str:
    if measured is None:
        return "the default, because no training step was measured"
    times = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in measured.step_seconds.items())
    threads = f"{measured.threads} threads" if measured.device == "cpu" else measured.device
    return f"a training step on {threads} takes {times}; bfloat16 is used if it saves a fifth of the time"
