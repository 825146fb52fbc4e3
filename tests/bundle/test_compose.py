"""Composing configs from a short source: what comes out, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medseg.bundle.archive import find_all
from medseg.bundle.build import build, built_files
from medseg.bundle.catalog import Bundle, shipped_bundles
from medseg.bundle.compose import CONFIG_NAMES, compose, template_knobs, template_names
from medseg.bundle.knobs import knobs
from medseg.bundle.recipes import recipe_names
from medseg.bundle.source_schema import SCHEMA, check_source
from medseg.bundle.trust import check, require_trust
from medseg.errors import BundleError
from medseg.files import load_json
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
        ({"knobs": {"learning_rat": 1.0}}, "knobs: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ({"knobs": {"skip_glas": True}}, "knobs: unknown key 'skip_glas'; did you mean 'skip_glass'?"),
        (
            {"knobs": {"skip_glass": True}},
            "knobs: unknown setting 'skip_glass' of this template; known are: ",
        ),
        ({"knobs": {"learning_rate": "fast"}}, 'knobs.learning_rate: found "fast", expected a number'),
        ({"knobs": {"roi_size": 64}}, "knobs.roi_size: found 64, expected a list"),
        ({"knobs": {"roi_size": [64, "64", 64]}}, r'knobs.roi_size\[1\]: found "64", expected an integer'),
        ({"knobs": {"spacing": [1, None, 1]}}, r"knobs.spacing\[1\]: found null, expected a number"),
        ({"knobs": {"max_epochs": True}}, "knobs.max_epochs: found true, expected an integer"),
        ({"knobs": {"max_epochs": 5.0}}, r"knobs.max_epochs: found 5.0, expected an integer \(for example 100\)"),
        ({"knobs": {"learning_rate": float("nan")}}, "knobs.learning_rate: found nan, expected a finite number"),
        ({"knobs": {"precision": "float23"}}, "expected one of float32, bfloat16, float16; did you mean 'float32'?"),
        ({"blocks": {"los": {}}}, "blocks: this template has no block 'los'; did you mean 'loss'?"),
        ({"template": "mr_volum"}, "template: found \"mr_volum\", expected one of .*; did you mean 'mr_volume'?"),
        ({"template": "../secret"}, 'template: found "../secret", expected one of '),
        ({"recipe": "unet1999"}, 'recipe: found "unet1999", expected one of '),
        ({"autors": "x"}, "bundle.json: unknown key 'autors'; did you mean 'authors'?"),
        ({"name": "deepedit_ct_unet"}, 'name: found "deepedit_ct_unet", expected .* without deepedit'),
        ({"name": "Liver CT"}, 'name: found "Liver CT", expected a name of the form <target>_<modality>_<network>'),
        ({"name": "liver_ct_unet\n"}, "name: found"),
        ({"labels": {"0": "background", "1": "a"}}, "network_def.out_channels: found 3, expected 2 as labels lists"),
        ({"labels": {"0": "background", "one": "a"}}, 'labels: found "one", expected the index of a label'),
        ({"channels": {"1": "MRI"}}, r"channels: found the indices \['1'\], expected '0', '1', ... in order"),
        ({"channels": {}}, "channels: found {}, expected at least 1 of its entries"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "labels: found 'a' twice"),
        ({"label_mapping": {"0": -1}}, "label_mapping.0: found -1, expected 0 or more"),
        ({"references": ["a", 5]}, r"references\[1\]: found 5, expected a text"),
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


@pytest.mark.parametrize("name", ["patchs", 3, ["loss"], {}])
def test_an_unknown_block_within_a_block_is_refused(name: Any, tiny_source: dict[str, Any]) -> None:
    tiny_source["blocks"] = {"augmentation": [{"block": name}]}
    with pytest.raises(BundleError, match="unknown block"):
        compose(tiny_source)


def test_blocks_that_never_end_are_refused(tiny_source: dict[str, Any]) -> None:
    loss = {"block": "loss"}
    for block in (loss, [loss] * 2, {"a": {"b": loss}}):
        with pytest.raises(BundleError, match="circular or too deeply nested blocks"):
            compose({**tiny_source, "blocks": {"loss": block}})


@pytest.mark.parametrize(
    "changes",
    [{"network_def": []}, {"labels": 3}, {"knobs": [1]}, {"blocks": "x"}, {"name": 5}, {"label_mapping": {"x": "y"}}],
    ids=str,
)
def test_an_entry_of_a_wrong_form_is_named_with_what_was_found(
    changes: dict[str, Any], tiny_source: dict[str, Any]
) -> None:
    with pytest.raises(BundleError, match=rf"bundle\.json: {next(iter(changes))}.*: found .*, expected "):
        compose({**tiny_source, **changes})


def test_every_fault_has_a_line_up_to_five(tiny_source: dict[str, Any]) -> None:
    wrong = dict.fromkeys(("authors", "copyright", "data_source", "data_type", "description", "display_name"), 1)
    with pytest.raises(BundleError) as caught:
        compose({**tiny_source, **wrong})
    lines = str(caught.value).splitlines()
    assert lines[0] == "bundle.json: authors: found 1, expected a text"
    assert len(lines) == 6
    assert lines[-1] == "... and 1 more"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_json_at_any_place_is_composed_or_refused(tiny_source: dict[str, Any], data: Any) -> None:
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["block", "0", "x"]), inner),
        max_leaves=4,
    )
    properties = load_json(SCHEMA)["properties"]
    source = tiny_source | {data.draw(st.sampled_from(sorted(properties))): data.draw(values)}
    if data.draw(st.booleans()):
        source |= {"blocks": {"loss": data.draw(values)}}
    assert (_fault(source) or "bundle.json: none").startswith("bundle.json: ")


def _fault(source: dict[str, Any]) -> str:
    try:
        compose(source)
    except BundleError as error:
        return str(error)
    return ""


# The schema


def test_the_schema_is_valid_and_describes_every_entry() -> None:
    schema = load_json(SCHEMA)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    entries = schema["properties"]
    for entry in (*entries.values(), *entries["knobs"]["properties"].values()):
        assert entry["title"]
        assert entry["description"].endswith(".")
    assert entries["recipe"]["enum"] == list(recipe_names())
    assert entries["template"]["enum"] == list(template_names())


def test_the_schema_knows_the_knobs_of_the_templates_and_their_kinds(tiny_source: dict[str, Any]) -> None:
    known = set()
    for template in template_names():
        source = tiny_source | {"template": template, "knobs": template_knobs(template)}
        check_source(source)
        known |= set(source["knobs"])
    assert set(load_json(SCHEMA)["properties"]["knobs"]["properties"]) == known


@pytest.mark.parametrize("bundle", SHIPPED, ids=lambda bundle: bundle.name)
def test_every_shipped_source_fits_the_schema(bundle: Bundle) -> None:
    check_source(load_json(bundle.root / "bundle.json"))


def test_a_source_may_name_its_schema_for_editors(make_bundle: Any, tiny_source: dict[str, Any]) -> None:
    plain = make_bundle(tiny_source)
    named = make_bundle({"$schema": "../../medseg/bundle/schema/bundle.schema.json", **tiny_source})
    require_trust(named.root, named.load_configs("inference"))
    assert [str(item) for _, item in find_all(named) if not item.allowed] == []
    assert built_files(named) == built_files(plain)


def test_listing_bundles_does_not_load_the_validator() -> None:
    code = (
        "import sys; from medseg.bundle import catalog; catalog.shipped_bundles(); print('jsonschema' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
