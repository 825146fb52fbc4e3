import json

import pytest

from medseg import train
from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle, find_bundle
from medseg.bundle.compose import compose
from medseg.bundle.recipes import read_recipe, recipe_names, with_recipe
from medseg.bundle.trust import require_trust
from medseg.errors import RequestError
from medseg.files import load_json
from medseg.networks.presets import small
from medseg.tools.samples import write_samples

NETWORKS = {"banet2022": "BANet", "uctransnet2022": "UCTransNet", "unetplusplus2018": "UNetPlusPlus"}
SOURCES = {2: "gland_pathology_unet", 3: "hippocampus_mri_unet"}


def source(spatial_dims, recipe=""):
    """Return a bundle.json of the small form of the recipe's network."""
    found = load_json(find_bundle(SOURCES[spatial_dims]).root / "bundle.json")
    name = NETWORKS.get(recipe, "UNet")
    network = {**small(name, spatial_dims), "spatial_dims": spatial_dims}
    network |= {"in_channels": len(found["channels"]), "out_channels": len(found["labels"])}
    network |= {"BANet": {"edge_channels": 2}, "UNetPlusPlus": {"deep_supervision": True}}.get(name, {})
    size = [64] * spatial_dims if name == "BANet" else [32] * spatial_dims
    found["knobs"] |= {"patch_size": size, "roi_size": size}
    return {**found, "network_def": {"_target_": f"medseg.components.{name}", **network}}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_where_it_comes_from_and_what_it_adds(name):
    recipe = read_recipe(name, 2)
    assert "arXiv:" in recipe["source"]
    assert set(recipe) == {"source", "choices", "knobs", "blocks"}


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_replaces_what_it_names_and_nothing_else(name, spatial_dims):
    before, recipe = source(spatial_dims, name), read_recipe(name, spatial_dims)
    after = with_recipe({**before, "knobs": {**before["knobs"], "learning_rate": 0.5}}, name, spatial_dims)
    config = compose(after)["train"]
    assert config["learning_rate"] == recipe["knobs"]["learning_rate"] != 0.5
    assert config["optimizer"] == recipe["blocks"]["optimizer"]
    assert config["patch_size"] == before["knobs"]["patch_size"]
    assert compose(after)["inference"] == compose(before)["inference"]


@pytest.mark.parametrize("name", recipe_names())
def test_what_the_bundle_says_after_its_recipe_holds(name):
    taken = with_recipe(source(2, name), name, 2)
    own = {**taken, "knobs": {**taken["knobs"], "learning_rate": 0.5}}
    assert compose(own)["train"]["learning_rate"] == 0.5


def test_an_empty_recipe_goes_back_to_the_template():
    found = source(3)
    assert with_recipe(with_recipe(found, "unetplusplus2018", 3), "", 3) == {
        **found,
        "knobs": {
            key: value
            for key, value in found["knobs"].items()
            if key not in read_recipe("unetplusplus2018", 3)["knobs"]
        },
    }


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(RequestError, match="unknown recipe 'unet1999'; expected one of: banet2022, "):
        with_recipe(source(2), "unet1999", 2)


@pytest.mark.slow
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains(name, spatial_dims, tmp_path):
    bundle = Bundle(tmp_path / "samples_any_network")
    bundle.root.mkdir()
    content = {**source(spatial_dims, name), "name": bundle.name}
    (bundle.root / "bundle.json").write_text(json.dumps(content), encoding="utf-8")
    build(bundle)
    data = write_samples(tmp_path / "data", bundle)
    small_run = {"max_epochs": 1, "batch_size": 2, "precision": "float32", "pictures": 0}
    manifest = train(bundle.root, data, settings={"recipe": name, **small_run})
    assert manifest.status == "done"
    assert bundle.weights.is_file()
    assert load_json(bundle.root / "bundle.json")["recipe"] == name
    require_trust(bundle.root, bundle.load_configs("train"))
