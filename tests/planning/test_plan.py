"""Plans: every one composes, is declarative, has reasons with numbers, and takes a training step."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import list_data_collate

from medseg.bundle.compose import compose
from medseg.bundle.trust import check
from medseg.errors import BundleError, RequestError
from medseg.io import find_dataset
from medseg.networks import NETWORKS
from medseg.planning.case_stats import Fingerprint
from medseg.planning.fingerprint import take_fingerprint
from medseg.planning.model_card import card
from medseg.planning.plan import make_plan
from medseg.planning.request import PlanRequest
from medseg.planning.result import Plan

CT = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "tumor"}}
NAMES = list(NETWORKS)


def planned(root: Any, request: PlanRequest, probe: Any = None, **options: Any) -> tuple[Fingerprint, Plan]:
    found = take_fingerprint(root, spatial_dims=request.dims)
    return found, make_plan(found, request, compose=compose, probe=probe, **options)


def train_once(bundle: dict[str, Any], root: Any) -> float:
    """Take one training step of a planned bundle on the data set's own cases; return the loss."""
    config = compose(bundle)["train"]
    config["train"]["dataset"]["data"] = find_dataset(root, "train")[:2]
    parser = ConfigParser({**config, "device_name": "cpu"})
    parser.parse()
    torch.manual_seed(0)
    dataset = parser.get_parsed_content("train::dataset")
    samples = [each for index in range(len(dataset)) for each in _listed(dataset[index])]
    batch = list_data_collate(samples[:2])
    network = parser.get_parsed_content("training_network").train()
    optimizer = parser.get_parsed_content("optimizer")
    loss = parser.get_parsed_content("loss")(network(batch["image"]), batch["label"])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _listed(sample: Any) -> list[Any]:
    return list(sample) if isinstance(sample, list) else [sample]


def data_sets(volumes: Any, pictures: Any) -> dict[str, Any]:
    return {
        "mr": lambda: volumes(),
        "ct": lambda: volumes(low=-1000, high=900, classes=1, listing=CT),
        "thick": lambda: volumes(
            shapes=((96, 90, 12), (90, 96, 14), (96, 96, 12)),
            spacings=((0.7, 0.7, 5.0),),
            listing={"modality": {"0": "CT"}},
            low=-1000,
        ),
        "large": lambda: volumes(shapes=((90, 100, 96), (100, 90, 96), (96, 96, 96)), classes=1),
        "channels": lambda: volumes(channels=2, listing={"modality": {"0": "T1", "1": "T2"}}),
        "one case": lambda: volumes(shapes=((20, 24, 20), (20, 24, 20))),
        "color": lambda: pictures(),
        "mixed": lambda: pictures(colored=(True, False), tops=(250, 60)),
        "grey": lambda: pictures(colored=(False,), labels="two"),
        "classes": lambda: pictures(colored=(False,), labels="classes"),
    }


@pytest.mark.parametrize(
    "kind", ["mr", "ct", "thick", "large", "channels", "one case", "color", "mixed", "grey", "classes"]
)
def test_every_kind_of_data_gives_a_bundle_that_takes_a_step(kind: str, volumes: Any, pictures: Any) -> None:
    root = data_sets(volumes, pictures)[kind]()
    found, plan = planned(root, PlanRequest())
    configs = compose(plan.bundle)
    check({"train": configs["train"], "evaluate": configs["evaluate"]}, "x")
    check({"inference": configs["inference"]}, "x")
    assert plan.bundle["network_def"]["in_channels"] == found.channels
    small = {**plan.bundle, "network_def": {**plan.bundle["network_def"]}}
    small["network_def"]["features"] = [4] * len(small["network_def"]["features"])
    assert train_once(small, root) > 0


@pytest.mark.parametrize(("name", "selfreg"), [*((name, False) for name in NAMES), ("BANet", True)])
@pytest.mark.parametrize("kind", ["thick", "color"])
def test_every_network_is_planned_in_2d_and_3d_and_takes_a_step(
    kind: str, name: str, selfreg: bool, volumes: Any, pictures: Any
) -> None:
    root = data_sets(volumes, pictures)[kind]()
    _, plan = planned(
        root,
        PlanRequest(
            network=name,
            selfreg=selfreg,
            memory=2 << 30,
            settings={"patch_size": [32, 32, 8][: 3 if kind == "thick" else 2]},
        ),
    )
    assert plan.bundle["network_def"]["_target_"].endswith(f".{name}")
    assert plan.bundle["name"].endswith(name.lower() + ("_selfreg" if selfreg else ""))
    assert train_once(plan.bundle, root) > 0


def test_reasons_hold_the_numbers_they_come_from(volumes: Any, fake_probe: Any) -> None:
    root = volumes(low=-1000, high=900, classes=1, listing=CT)
    found, plan = planned(root, PlanRequest(budget=1800.0), fake_probe())
    knobs, reasons = plan.bundle["knobs"], plan.bundle["plan"]
    for knob in knobs:
        assert knob in reasons
    assert [knob for knob, reason in reasons.items() if not re.search(r"\d", reason)] == ["loss"]
    (intensity,) = found.intensities
    assert f"{intensity.mean:.4g}" in reasons["intensity_range"]
    assert f"{intensity.low:.4g}" in reasons["intensity_range"]
    assert " x ".join(map(str, found.median_shape(knobs["spacing"]))) in reasons["patch_size"]
    assert str(knobs["max_epochs"]) in reasons["max_epochs"]


def test_the_same_input_gives_the_same_file(volumes: Any, fake_probe: Any) -> None:
    root = volumes()
    request = PlanRequest(memory=4 << 30, memory_given=True)
    texts = {json.dumps(planned(root, request, fake_probe(seconds))[1].bundle["knobs"]) for seconds in (0.3, 0.31, 5.0)}
    assert len(texts) == 1


def test_a_window_of_ct_holds_what_is_marked(volumes: Any) -> None:
    root = volumes(low=-1000, high=900, classes=1, listing=CT)
    found, plan = planned(root, PlanRequest())
    low, high = plan.bundle["knobs"]["intensity_range"]
    (intensity,) = found.intensities
    assert low < intensity.low < intensity.high < high
    assert plan.bundle["template"] == "ct_volume"


@pytest.mark.parametrize(
    ("options", "template"),
    [
        ({"low": -1000}, "ct_volume"),
        ({"low": -1000, "dtype": "float32"}, "mr_volume"),
        ({"low": 0}, "mr_volume"),
        ({"low": 0, "listing": {"modality": {"0": "CT"}}}, "mr_volume"),
        ({"low": -1000, "listing": {"modality": {"0": "PET"}}}, "mr_volume"),
    ],
)
def test_ct_is_told_by_its_values_and_by_what_is_said(options: dict[str, Any], template: str, volumes: Any) -> None:
    assert planned(volumes(**options), PlanRequest())[1].bundle["template"] == template


def test_pictures_of_unlike_brightness_are_standardized_each(pictures: Any) -> None:
    _, plan = planned(pictures(tops=(250, 40)), PlanRequest())
    assert "NormalizeIntensityd" in json.dumps(plan.bundle["blocks"]["intensity"])
    assert "intensity_range" not in plan.bundle["knobs"]
    assert plan.bundle["network_def"]["norm"][0] == "instance"
    _, plan = planned(pictures(name="even"), PlanRequest())
    assert plan.bundle["knobs"]["intensity_range"] == [0.0, 255.0]
    assert plan.bundle["network_def"]["norm"] == "batch"


def test_objects_are_mapped_to_one_class(pictures: Any) -> None:
    _, plan = planned(pictures(), PlanRequest())
    assert plan.bundle["label_mapping"] == {"0": 0, "other": 1}


def test_less_memory_gives_a_smaller_plan_and_too_little_is_refused(volumes: Any) -> None:
    root = volumes(shapes=((128, 128, 128),) * 3)
    sizes = []
    for memory in (64 << 30, 6 << 30, 2 << 30):
        _, plan = planned(root, PlanRequest(memory=memory, memory_given=True), gpu=True)
        assert plan.forecast.memory <= memory
        sizes.append(plan.forecast.memory)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    with pytest.raises(RequestError, match=r"the limit is 500 MiB.*--memory"):
        planned(root, PlanRequest(memory=500 << 20, memory_given=True))


def test_a_step_that_needs_more_than_counted_leads_to_a_smaller_plan(volumes: Any, fake_probe: Any) -> None:
    root = volumes(shapes=((96, 96, 96),) * 3)
    _, usual = planned(root, PlanRequest(), fake_probe())
    used = 0

    def probe(config: Any) -> Any:
        nonlocal used
        used += 1
        return fake_probe(bytes_per_step=(9 << 30) if used == 1 else 1 << 30)(config)

    _, plan = planned(root, PlanRequest(), probe)
    assert used == 2
    assert plan.bundle["network_def"] != usual.bundle["network_def"] or plan.bundle["knobs"] != usual.bundle["knobs"]


def test_a_budget_is_used_and_kept(volumes: Any, fake_probe: Any) -> None:
    root = volumes()
    for budget, seconds in ((1800.0, 0.3), (1800.0, 3.0), (36000.0, 1.0)):
        _, plan = planned(root, PlanRequest(budget=budget), fake_probe(seconds))
        assert plan.forecast.total <= budget
        assert plan.forecast.total > 0.85 * budget


def test_more_time_gives_a_wider_network(volumes: Any, fake_probe: Any) -> None:
    root = volumes(shapes=((64, 64, 64),) * 6)
    weights = []
    for budget in (600.0, 3600.0, 86400.0):
        _, plan = planned(root, PlanRequest(budget=budget), fake_probe(0.4, by_width=True))
        weights.append(plan.bundle["network_def"]["features"][0])
    assert weights == sorted(weights)
    assert weights[0] < weights[-1]


def test_a_wider_network_that_is_not_slower_is_taken(volumes: Any, fake_probe: Any) -> None:
    def widest(probe: Any) -> int:
        _, plan = planned(root, PlanRequest(budget=1800.0), probe)
        return int(plan.bundle["network_def"]["features"][0])

    root = volumes(shapes=((64, 64, 64),) * 6)
    assert widest(fake_probe(0.4)) == 32
    assert widest(fake_probe(2.0, by_width=True)) < 32


def test_precision_is_what_was_measured_to_be_faster(volumes: Any, fake_probe: Any) -> None:
    root = volumes()
    assert planned(root, PlanRequest(), fake_probe(half=0.4))[1].bundle["knobs"]["precision"] == "bfloat16"
    assert planned(root, PlanRequest(), fake_probe(half=0.95))[1].bundle["knobs"]["precision"] == "float32"
    assert planned(root, PlanRequest())[1].bundle["knobs"]["precision"] == "float32"


def test_settings_are_kept_and_said_to_be_the_users(volumes: Any) -> None:
    settings = {"patch_size": [32, 32, 32], "spacing": [2.0, 2.0, 2.0], "max_epochs": 3, "learning_rate": 0.01}
    _, plan = planned(volumes(), PlanRequest(settings=settings))
    assert {knob: plan.bundle["knobs"][knob] for knob in settings} == settings
    assert {plan.bundle["plan"][knob] for knob in settings} == {"set by the user"}
    assert plan.bundle["knobs"]["roi_size"] == [32, 32, 32]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 0.1}, "did you mean 'learning_rate'"),
        ({"patch_size": [32, 32]}, "3 integers"),
        ({"spacing": [1, 0, 1]}, "above 0"),
        ({"batch_size": 0}, "from 1 up"),
        ({"max_epochs": "many"}, "max_epochs"),
        ({"max_epochs": -1}, "max_epochs=-1"),
        ({"val_interval": 0}, "val_interval=0"),
        ({"learning_rate": float("nan")}, "finite"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings: dict[str, Any], message: str, volumes: Any) -> None:
    with pytest.raises((RequestError, BundleError), match=message):
        planned(volumes(), PlanRequest(settings=settings))


def test_a_name_that_the_folder_cannot_give_is_made(volumes: Any) -> None:
    root = volumes(name="My Scans")
    assert planned(root, PlanRequest(), folder="out")[1].bundle["name"] == "my_scans_mri_unet"
    assert planned(root, PlanRequest(), folder="lesion_mri_unet")[1].bundle["name"] == "lesion_mri_unet"
    assert planned(root, PlanRequest(name="a_b_c"), folder="out")[1].bundle["name"] == "a_b_c"


@pytest.mark.parametrize(("radius", "share"), [(40, 0.0), (25, 0.33), (12, 0.5), (3, 0.67)])
def test_the_rarer_the_foreground_the_more_patches_are_centered_in_it(
    radius: int, share: float, volumes: Any, save_volume: Any
) -> None:
    shape = (80, 80, 80)
    root = volumes(shapes=(shape,) * 2, classes=1)
    grid = np.stack(np.meshgrid(*(np.arange(n) - 40 for n in shape), indexing="ij"))
    save_volume(root / "labelsTr" / "case_0.nii.gz", ((grid**2).sum(0) < radius**2).astype(np.uint8))
    _, plan = planned(root, PlanRequest())
    assert plan.bundle["knobs"]["foreground_sampling"] == share
    _, plan = planned(root, PlanRequest(settings={"patch_size": list(shape)}))
    assert plan.bundle["knobs"]["foreground_sampling"] == 0


def test_cases_that_do_not_stay_in_memory_give_several_patches_each(volumes: Any) -> None:
    root = volumes(shapes=((64, 64, 64),) * 3, classes=1)
    found, plan = planned(root, PlanRequest(memory=8 << 30))
    assert plan.bundle["knobs"]["patches_per_case"] == 1
    assert "cache_memory" not in plan.bundle["knobs"]
    many = replace(found, cases=tuple(replace(case, name=str(n)) for n, case in enumerate(found.cases * 1000)))
    knobs = make_plan(many, PlanRequest(memory=2 << 30), compose=compose, probe=None).bundle["knobs"]
    assert knobs["patches_per_case"] == 2
    assert knobs["cache_memory"] == f"{int(0.4 * (2 << 30)) >> 20}M"


def test_the_card_holds_every_choice(volumes: Any, fake_probe: Any) -> None:
    request = PlanRequest(budget=1800.0)
    _, plan = planned(volumes(), request, fake_probe())
    text = card(plan)
    for knob, reason in plan.bundle["plan"].items():
        assert f"| {knob} |" in text
        assert reason.replace("|", "\\|") in text
    assert "30 min" in text
