"""Composing configs from a short source: what comes out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medseg.bundle.build import build, built_files
from medseg.bundle.catalog import Bundle, shipped_bundles
from medseg.bundle.compose import CONFIG_NAMES, compose, template_names
from medseg.bundle.knobs import knobs
from medseg.bundle.trust import check
from medseg.errors import BundleError
from medseg.transforms.labels import MapLabelsd

SHIPPED = shipped_bundles()


@pytest.mark.parametrize("bundle", SHIPPED, ids=lambda bundle: bundle.name)
def test_committed_configs_are_what_the_source_builds(bundle: Bundle) -> None:
    for name, text in built_files(bundle).items():
        assert (bundle.root / name).read_text(encoding="utf-8") == text


def test_building_twice_changes_nothing(make_bundle: Any, tiny_source: dict[str, Any]) -> None:
    bundle = make_bundle(tiny_source)
    before = {path: path.read_bytes() for path in build(bundle)}
    assert {path: path.read_bytes() for path in build(bundle)} == before


def test_the_network_is_the_same_everywhere(tiny_source: dict[str, Any]) -> None:
    configs = compose(tiny_source)
    assert configs["train"]["network_def"] == configs["inference"]["network_def"] == tiny_source["network_def"]
    assert "network_def" not in configs["evaluate"]


@pytest.mark.parametrize("template", template_names())
def test_every_template_composes_to_declarative_configs(template: str, tiny_source: dict[str, Any]) -> None:
    spatial_dims = 2 if "image" in template else 3
    tiny_source.update(template=template, knobs={})
    tiny_source["network_def"]["spatial_dims"] = spatial_dims
    configs = compose(tiny_source)
    assert set(configs) == set(CONFIG_NAMES)
    check({"train": configs["train"], "evaluate": configs["evaluate"]}, "x")
    check({"inference": configs["inference"]}, "x")
    assert '"block"' not in str(configs).replace("'", '"')
    assert configs["inference"]["spatial_dims"] == spatial_dims


def test_only_knobs_that_a_config_uses_stand_in_it(tiny_source: dict[str, Any]) -> None:
    configs = compose(tiny_source)
    assert "learning_rate" in knobs(configs["train"])
    assert "learning_rate" not in knobs(configs["inference"])
    assert configs["inference"]["roi_size"] == [16, 24, 24]


def test_a_bundle_replaces_a_block(tiny_source: dict[str, Any]) -> None:
    loss = {"_target_": "monai.losses.DiceLoss", "softmax": True, "to_onehot_y": True}
    tiny_source["blocks"] = {"loss": loss}
    assert compose(tiny_source)["train"]["loss"]["loss"] == loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knobs": {"learning_rat": 1.0}}, "unknown knob 'learning_rat'; did you mean 'learning_rate'?"),
        ({"knobs": {"learning_rate": "fast"}}, "'learning_rate' must be a number"),
        ({"knobs": {"roi_size": 64}}, "'roi_size' must be a list"),
        ({"knobs": {"roi_size": [64, "64", 64]}}, r"'roi_size\[1\]' must be a whole number"),
        ({"knobs": {"max_epochs": True}}, "'max_epochs' must be a whole number"),
        ({"blocks": {"los": {}}}, "unknown block 'los'; did you mean 'loss'?"),
        ({"template": "mr_volum"}, "no template 'mr_volum'; did you mean 'mr_volume'?"),
        ({"template": "../secret"}, "no template"),
        ({"autors": "x"}, "unknown key 'autors'; did you mean 'authors'?"),
        ({"name": "deepedit_ct_unet"}, "deepedit"),
        ({"name": "Liver CT"}, "should read <target>_<modality>_<network>"),
        ({"labels": {"0": "background", "1": "a"}}, "out_channels=3, but labels lists 2"),
        ({"channels": {"1": "MRI"}}, "must be numbered"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "labels names 'a' twice"),
    ],
)
def test_a_wrong_source_is_refused_with_the_nearest_name(
    change: dict[str, Any], message: str, tiny_source: dict[str, Any]
) -> None:
    with pytest.raises(BundleError, match=message):
        compose({**tiny_source, **change})


def test_a_missing_entry_is_named(tiny_source: dict[str, Any]) -> None:
    del tiny_source["authors"], tiny_source["labels"]
    with pytest.raises(BundleError, match="missing authors, labels"):
        compose(tiny_source)


@pytest.mark.parametrize(
    ("mapping", "names"),
    [
        (None, {"liver": 1, "tumor": 2}),
        ({"0": 0, "5": 1, "7": 1, "255": 2}, {"liver": 5, "tumor": 255}),
        ({"0": 0, "1": 1, "other": 2}, {"liver": 1, "tumor": 2}),
        ({"0": 0, "2": 1, "other": 2}, {"liver": 2, "tumor": 1}),
        ({"0": 0, "3": 1}, {"liver": 3}),
    ],
)
def test_classes_are_named_for_labels_that_hold_names(
    mapping: dict[str, int] | None, names: dict[str, int], tiny_source: dict[str, Any]
) -> None:
    labels = {"0": "background", "1": "liver", "2": "tumor"}
    bundle = tiny_source | {"labels": labels} | ({} if mapping is None else {"label_mapping": mapping})
    bundle["network_def"] = bundle["network_def"] | {"out_channels": 3}
    found = compose(bundle)["train"]["label_names"]
    assert found == names
    classes = MapLabelsd("label", mapping or {"0": 0, "1": 1, "2": 2})({"label": torch.tensor(list(found.values()))})
    assert classes["label"].tolist() == [int(key) for key, name in labels.items() if name in found]


@pytest.mark.parametrize("name", ["patchs", 3])
def test_an_unknown_block_within_a_block_is_refused(name: Any, tiny_source: dict[str, Any]) -> None:
    tiny_source["blocks"] = {"augmentation": [{"block": name}]}
    with pytest.raises(BundleError, match="unknown block"):
        compose(tiny_source)


def test_blocks_that_never_end_are_refused(tiny_source: dict[str, Any]) -> None:
    loss = {"block": "loss"}
    for block in (loss, [loss] * 2, {"a": {"b": loss}}):
        with pytest.raises(BundleError, match="blocks hold each other"):
            compose({**tiny_source, "blocks": {"loss": block}})


@pytest.mark.parametrize(
    "changes",
    [{"network_def": []}, {"labels": 3}, {"knobs": [1]}, {"blocks": "x"}, {"name": 5}, {"label_mapping": {"x": "y"}}],
    ids=str,
)
def test_an_entry_of_a_wrong_form_is_an_error_of_the_bundle(
    changes: dict[str, Any], tiny_source: dict[str, Any]
) -> None:
    with pytest.raises(BundleError, match=r"bundle\.json"):
        compose({**tiny_source, **changes})
