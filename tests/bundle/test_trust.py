"""The trust check of configs: what may stand in them, and that nothing runs while it is found out."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg import files
from medseg.bundle import trust
from medseg.bundle.compose import compose
from medseg.errors import UntrustedBundleError

BUNDLES = Path(__file__).parents[2] / "bundles"
SENTINEL = "smuggled_sentinel"

DECLARATIVE = {
    "bundle_root": ".",
    "output_dir": {"_target_": "medseg.components.inside", "root": "@bundle_root", "path": "runs/train"},
    "dataset_dir": "dataset",
    "roi_size": [96, 96, 96],
    "load_pretrained": False,
    "reader_name": "NibabelReader",
    "label_names": {"1": "liver", "2": "tumor (any)"},
    "network_def": {
        "_target_": "monai.networks.nets.FlexibleUNet",
        "_desc_": "2D baseline",
        "in_channels": 1,
        "out_channels": 3,
        "backbone": "efficientnet-b0",
        "pretrained": "@load_pretrained",
    },
    "loss": {"_target_": "monai.losses.DiceCELoss", "to_onehot_y": True, "softmax": True},
    "optimizer": {
        "_target_": "torch.optim.AdamW",
        "params": {"_target_": "medseg.components.parameters", "network": "@network_def"},
        "lr": 0.001,
    },
    "scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "optimizer": "@optimizer", "step_size": 10},
    "preprocessing": {
        "_target_": "monai.transforms.Compose",
        "transforms": [
            {"_target_": "monai.transforms.LoadImaged", "keys": ["image", "label"], "reader": "@reader_name"},
            {"_target_": "monai.transforms.Orientationd", "keys": ["image", "label"], "axcodes": "RAS", "labels": None},
            {"_target_": "monai.transforms.RandSpatialCropd", "keys": ["image", "label"], "roi_size": "@roi_size#0"},
        ],
    },
    "dataset": {
        "_target_": "monai.data.CacheDataset",
        "data": {"_target_": "medseg.components.find_dataset", "path": "@dataset_dir", "split": "train"},
        "transform": "@preprocessing",
    },
    "handlers": [
        {
            "_target_": "monai.handlers.StatsHandler",
            "tag_name": "train_loss",
            "output_transform": {"_target_": "monai.handlers.from_engine", "keys": ["loss"], "first": True},
        },
        {"_target_": "monai.handlers.TensorBoardStatsHandler", "log_dir": "@output_dir", "_disabled_": True},
    ],
    "saver": {
        "_target_": "monai.transforms.SaveImaged",
        "keys": "pred",
        "output_dir": "@output_dir",
        "writer": "NibabelWriter",
        "_requires_": "@loss",
        "_mode_": "default",
    },
    "imports": [],
    "run": ["@loss"],
}
METADATA = {
    "version": "0.1.0",
    "schema": "https://example.org/schema.json",
    "description": "/ not a path, ~80 % of it prose",
    "network_data_format": {"outputs": {"pred": {"channel_def": {"0": "background", "1": "liver"}}}},
}

_ITEM = "medseg.components.identity"
_FOLDER = {"_target_": "medseg.components.inside", "root": "@bundle_root", "path": "runs/x"}
# What is put into the declarative config: where, what, and as what it must be found. The payload would write the file
# MARKER if it ran.
SMUGGLED = {
    "program as target": (("loss", "_target_"), "subprocess.run", "callable"),
    "shell as target": (("loss", "_target_"), "os.system", "callable"),
    "eval as target": (("loss", "_target_"), "builtins.eval", "callable"),
    "own module as target": (("loss", "_target_"), f"{SENTINEL}.run", "callable"),
    "target in a list in a dict": (("roi_size", 1), {"x": [{"_target_": f"{SENTINEL}.run"}]}, "callable"),
    "target in metadata": (("_meta_",), {"x": {"_target_": "monai.losses.DiceLoss"}}, "callable"),
    "disabled target": (("scheduler",), {"_target_": f"{SENTINEL}.run", "_disabled_": True}, "callable"),
    "bare name": (("loss", "_target_"), "DiceCELoss", "callable"),
    "leading space": (("loss", "_target_"), " os.system", "callable"),
    "trailing newline": (("loss", "_target_"), "monai.losses.DiceCELoss\n", "callable"),
    "Cyrillic look-alike": (("loss", "_target_"), "m\u043enai.losses.DiceCELoss", "callable"),
    "module below a medseg room": (("loss", "_target_"), "medseg.io.os.system", "callable"),
    "library below a medseg room": (("loss", "_target_"), "medseg.training.torch.load", "callable"),
    "attribute of an allowed class": (("loss", "_target_"), "monai.losses.DiceCELoss.__init__", "callable"),
    "library in torch": (("loss", "_target_"), "torch.os.system", "callable"),
    "MONAI's own lookup": (("loss", "_target_"), "monai.utils.module.instantiate", "callable"),
    "MONAI's command runner": (("loss", "_target_"), "monai.utils.misc.run_cmd", "callable"),
    "any function as transform": (
        ("preprocessing", "transforms", 1, "_target_"),
        "monai.transforms.Lambda",
        "callable",
    ),
    "torchvision by name": (
        ("preprocessing", "transforms", 1, "_target_"),
        "monai.transforms.TorchVisiond",
        "callable",
    ),
    "unpickling": (("loss", "_target_"), "torch.load", "callable"),
    "hub": (("loss", "_target_"), "torch.hub.load", "callable"),
    "another bundle": (("loss", "_target_"), "monai.bundle.load", "callable"),
    "download": (("loss", "_target_"), "monai.apps.download_and_extract", "callable"),
    "log file of any name": (("handlers", 0, "_target_"), "monai.handlers.LogfileHandler", "callable"),
    "reference as target": (("loss", "_target_"), "@reader_name", "callable"),
    "expression as target": (("loss", "_target_"), "$__import__('os').system", "callable"),
    "component as target": (("loss", "_target_"), {"_target_": "monai.losses.DiceLoss"}, "callable"),
    "expression as knob": (("dataset_dir",), "$open('MARKER', 'w').close()", "expression"),
    "expression in a list": (("roi_size", 0), "$open('MARKER', 'w').close()", "expression"),
    "expression as argument": (("optimizer", "lr"), "$open('MARKER', 'w').close()", "expression"),
    "expression in metadata": (("_meta_",), {"a": [{"b": "$open('MARKER', 'w').close()"}]}, "expression"),
    "expression as requirement": (("loss", "_requires_"), ["$open('MARKER', 'w').close()"], "expression"),
    "expression after a space": (("dataset_dir",), " $open('MARKER', 'w').close()", "expression"),
    "import list": (("imports",), [f"$import {SENTINEL}"], "import"),
    "import list without sign": (("imports",), [SENTINEL], "import"),
    "import anywhere": (("roi_size", 2), f"$from {SENTINEL} import run", "import"),
    "macro to a file": (("loss",), "%../other.json::x", "macro"),
    "macro to an id": (("loss",), "%network_def", "macro"),
    "debugger mode": (("loss", "_mode_"), "debug", "mode"),
    "callable mode": (("loss", "_mode_"), "callable", "mode"),
    "mode with a space": (("loss", "_mode_"), "default ", "mode"),
    "mode by reference": (("loss", "_mode_"), "@reader_name", "mode"),
    "disabled by reference": (("loss", "_disabled_"), "@load_pretrained", "argument"),
    "breakpoint": (("loss", "_debug_"), True, "argument"),
    "reader by path": (("preprocessing", "transforms", 0, "reader"), f"{SENTINEL}.run", "argument"),
    "reader among good ones": (("preprocessing", "transforms", 0, "reader"), ["ITKReader", "os.system"], "argument"),
    "reader by reference": (("reader_name",), f"{SENTINEL}.run", "argument"),
    "reader by two references": (("reader_name",), "@dataset_dir", "argument"),
    "reader by circular reference": (("reader_name",), ["@reader_name"], "argument"),
    "other name of monai.data": (("preprocessing", "transforms", 0, "reader"), "PersistentDataset", "argument"),
    "reader by a part": (
        ("preprocessing", "transforms", 0, "reader"),
        {"_target_": "medseg.components.identity", "value": f"{SENTINEL}.run"},
        "argument",
    ),
    "reader by a path": (
        ("preprocessing", "transforms", 0, "reader"),
        {"_target_": "medseg.components.inside", "root": "", "path": f"{SENTINEL}.run"},
        "argument",
    ),
    "reader by a part of that name": (
        ("preprocessing", "transforms", 0, "reader"),
        [{"_target_": f"{SENTINEL}.ITKReader"}],
        "argument",
    ),
    "image changed on disk": (("preprocessing", "transforms", 0, "mmap"), "r+", "argument"),
    "array changed on disk": (("preprocessing", "transforms", 0, "mmap_mode"), "r+", "argument"),
    "writer by path": (("saver", "writer"), f"{SENTINEL}.run", "argument"),
    "writer by a part": (
        ("saver", "writer"),
        {"_target_": "medseg.components.identity", "value": f"{SENTINEL}.run"},
        "argument",
    ),
    "pickled arrays": (("preprocessing", "transforms", 0, "allow_pickle"), True, "argument"),
    "download of weights": (("load_pretrained",), True, "argument"),
    "backbone by path": (("network_def", "backbone"), "os.system", "argument"),
    "cache with pickles": (("dataset", "weights_only"), False, "argument"),
    "compiler of choice": (("loss", "compile_kwargs"), {"options": {"cpp.cxx": ["./evil"]}}, "argument"),
    "number for a flag": (("dataset", "weights_only"), 1, "argument"),
    "flag by a part": (("dataset", "weights_only"), {"_target_": "torch.cuda.is_available"}, "argument"),
    "other name that MONAI gives": (("optional_packages_version",), "os.system", "key"),
    "metadata of its own": (("_meta_",), {"version": "2"}, "key"),
    "override key": (("preprocessing::transforms::0::reader",), "os.system", "key"),
    "old override key": (("loss#_target_",), "os.system", "key"),
    "merging key": (("+preprocessing",), {"_target_": "monai.transforms.Compose"}, "key"),
    "two ids in one": (("label_names", "a::b"), 1, "key"),
    "expression as key": (("label_names", "$open('MARKER', 'w').close()"), 1, "key"),
    "macro as key": (("label_names", "%x"), 1, "key"),
    "reference as key": (("label_names", "@loss"), 1, "key"),
    "key for the whole config": (("",), {"run": "os.system"}, "key"),
    "missing reference": (("optimizer", "lr"), "@learning_rate", "reference"),
    "relative reference": (("optimizer", "lr"), "@##dataset_dir", "reference"),
    "reference to everything": (("optimizer", "lr"), "@", "reference"),
    "reference by an odd number": (("optimizer", "lr"), "@roi_size::01", "reference"),
    "reference beyond a list": (("optimizer", "lr"), "@roi_size::3", "reference"),
    "reference from the end of a list": (("optimizer", "lr"), "@roi_size::-1", "reference"),
    "absolute output": (("saver", "output_dir"), "/etc", "path"),
    "absolute knob": (("dataset_dir",), "/home/someone", "path"),
    "home": (("saver", "output_dir"), "~/.ssh", "path"),
    "climbing": (("saver", "output_postfix"), "seg/../../..", "path"),
    "climbing on Windows": (("saver", "output_dir"), "runs\\..\\..", "path"),
    "drive": (("saver", "output_dir"), "C:\\Windows", "path"),
    "share": (("saver", "output_dir"), "\\\\server\\share", "path"),
    "address": (("handlers", 1, "log_dir"), "s3://bucket/x", "path"),
    "climbing key": (("label_names", "../../metrics"), 1, "path"),
    "output where the user is": (("saver", "output_dir"), "results", "path"),
    "output by a knob": (("saver", "output_dir"), "@dataset_dir", "path"),
    "output in a folder of a part": (("saver", "output_dir"), {"_target_": _ITEM, "value": "x"}, "path"),
    "output inside of something else": (("saver", "output_dir"), {**_FOLDER, "root": "elsewhere"}, "path"),
    "output inside of nothing": (("saver", "output_dir"), {**_FOLDER, "_disabled_": True}, "path"),
    "output at MONAI's default": (("handlers", 1), {"_target_": "monai.handlers.TensorBoardStatsHandler"}, "path"),
    "output up from the folder": (("saver", "data_root_dir"), "a/b/c", "argument"),
    "root of another bundle": (
        ("run",),
        [{"_target_": "medseg.components.Checkpoints", "output_dir": "@output_dir", "bundle_root": "other"}],
        "argument",
    ),
    "object from Python": (("dataset_dir",), os.getcwd, "value"),
}

# Of those, the ones that MONAI does run.
RUNS_IN_MONAI = [
    ("loss", "own module as target"),
    ("roi_size", "target in a list in a dict"),
    ("dataset_dir", "expression as knob"),
    ("roi_size", "expression in a list"),
    ("roi_size", "import list"),
    ("roi_size", "import anywhere"),
    ("preprocessing", "reader by path"),
    ("preprocessing", "reader by reference"),
    ("preprocessing", "reader by a part"),
    ("preprocessing", "reader by a path"),
    ("saver", "writer by a part"),
    ("saver", "writer by path"),
]


def smuggle(name: str, marker: Path) -> dict:
    path, payload, _ = SMUGGLED[name]
    config = copy.deepcopy(DECLARATIVE)
    box = config
    for step in path[:-1]:
        box = box[step]
    if callable(payload):
        box[path[-1]] = payload
    else:
        box[path[-1]] = json.loads(json.dumps(payload).replace("MARKER", marker.as_posix()))
    return config


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that exists as soon as a payload ran; also importing or calling the sentinel module writes it."""
    path = tmp_path / "marker"
    touch = f"open({path.as_posix()!r}, 'w').close()\n"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{SENTINEL}.py").write_text(f"{touch}def run(**arguments):\n    {touch}")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield path
    sys.modules.pop(SENTINEL, None)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("preprocessing", "transforms", 0, "reader"), {"_target_": "monai.data.ITKReader"}),
        (("preprocessing", "transforms", 0, "mmap"), False),
        (("saver", "output_dir"), _FOLDER),
        (("saver", "data_root_dir"), ""),
    ],
)
def test_what_stays_within_the_rules_passes(path, value):
    config = copy.deepcopy(DECLARATIVE)
    box = config
    for step in path[:-1]:
        box = box[step]
    box[path[-1]] = value
    trust.check({"train.json": config}, "ours")


def test_lists_of_references_to_lists_do_not_take_forever(monkeypatch):
    config = {**copy.deepcopy(DECLARATIVE), "reader_name": ["@readers0", "@readers0"], "readers25": "ITKReader"}
    config |= {f"readers{n}": [f"@readers{n + 1}"] * 2 for n in range(25)}
    looked_up = []
    look_up = trust._Walk.look_up

    def counted(walk, reference):
        looked_up.append(reference)
        assert len(looked_up) < 1000
        return look_up(walk, reference)

    monkeypatch.setattr(trust._Walk, "look_up", counted)
    trust.check({"train.json": config}, "foreign")
    assert looked_up.count("@readers25") > 0


def nested(depth: int) -> dict:
    config: dict = {}
    for _ in range(depth):
        config = {"a": config}
    return config


def test_a_realistic_declarative_config_passes():
    trust.check({"train.json": DECLARATIVE, "metadata.json": METADATA}, "ours")


def test_every_callable_of_a_declarative_config_is_listed_as_allowed():
    findings = trust.find_programs(DECLARATIVE)
    assert {f.kind for f in findings} == {"callable"}
    assert all(f.allowed and not f.reason for f in findings)
    assert [f.where for f in findings if f.value == "monai.handlers.from_engine"] == ["handlers::0::output_transform"]
    assert len(findings) == json.dumps(DECLARATIVE).count('"_target_"')


@pytest.mark.parametrize("name", SMUGGLED)
def test_a_smuggled_program_is_refused_and_does_not_run(name, marker):
    config = smuggle(name, marker)
    found = [f for f in trust.find_programs(config) if not f.allowed]
    assert SMUGGLED[name][2] in {f.kind for f in found}
    assert all(f.reason for f in found)
    with pytest.raises(UntrustedBundleError, match="is not trusted"):
        trust.check({"train.json": config}, "foreign")
    assert not marker.exists()
    assert SENTINEL not in sys.modules


@pytest.mark.parametrize(("wanted", "name"), RUNS_IN_MONAI)
def test_the_same_payload_does_run_in_monai(wanted, name, marker):
    from monai.bundle import ConfigParser

    parser = ConfigParser(smuggle(name, marker))
    with suppress(RuntimeError, TypeError):  # what the payload returns is of no use to the config; it ran all the same
        parser.get_parsed_content(wanted)
    assert marker.exists()


_KEYS = ["a", "b", "_target_", "_mode_", "_disabled_", "_requires_", "_meta_", "imports", "a::b", "a#b", "+a"]
_LEAVES = [
    *(
        "@a",
        "@b",
        "@a::b",
        "@a::0",
        "@b::a",
        "@b::_target_",
        "@_meta_::a",
        "@a#b",
        "@#a",
        "@",
        "%a",
        "%a::b",
        "%x.json",
    ),
    *("$a", "$import os", "os.system", "monai.losses.DiceLoss", "torch.optim.Adam", "default", "debug", True, 1, None),
]
_CONFIGS = st.recursive(
    st.sampled_from(_LEAVES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3)
        | st.builds(
            lambda rest: {**rest, "_target_": "torch.optim.Adam"}, st.dictionaries(st.sampled_from(_KEYS), inner)
        )
    ),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(config=st.fixed_dictionaries({"a": _CONFIGS, "b": _CONFIGS}, optional={"a::b": _CONFIGS, "+b": _CONFIGS}))
def test_what_passes_makes_monai_call_only_listed_parts(config):
    from monai.bundle import ConfigParser

    with suppress(UntrustedBundleError):
        trust.check({"train.json": config}, "foreign")
        with pytest.MonkeyPatch.context() as patch:
            calls = record_monai(patch)
            parser = ConfigParser(ConfigParser.load_config_files(config))
            for name in ("a", "b", ""):
                with suppress(KeyError, ValueError):  # circular references
                    parser.get_parsed_content(name)
        assert all(target in trust._TARGETS and mode == "default" for target, mode in calls)


def record_monai(patch: pytest.MonkeyPatch) -> list[tuple[object, object]]:
    """Let MONAI note what it would call; evaluating or loading anything is an error that nothing catches."""
    from monai.bundle import config_item, config_parser

    def fail(*arguments, **options):
        raise AssertionError(f"MONAI went on to {arguments}")

    calls: list[tuple[object, object]] = []
    patch.setattr(config_item, "instantiate", lambda target, mode, **arguments: calls.append((target, mode)))
    patch.setattr(config_item.ConfigExpression, "evaluate", fail)
    patch.setattr(config_parser.ConfigParser, "load_config_file", fail)
    return calls


@pytest.mark.parametrize("source", sorted(BUNDLES.glob("*/bundle.json")), ids=lambda path: path.parent.name)
@pytest.mark.parametrize("job", [("train",), ("train", "evaluate"), ("inference",)], ids="+".join)
def test_the_shipped_bundles_are_declarative(source, job):
    configs = compose(files.load_json(source))
    trust.check({f"{name}.json": configs[name] for name in job}, source.parent.name)


def test_a_later_file_cannot_change_what_an_earlier_one_refers_to():
    trust.check({"train.json": DECLARATIVE}, "foreign")
    with pytest.raises(UntrustedBundleError, match=r"train\.json: preprocessing::transforms::0::reader"):
        trust.check({"train.json": DECLARATIVE, "evaluate.json": {"reader_name": "os.system"}}, "foreign")


def test_a_later_file_may_refer_to_an_earlier_one():
    evaluate = {"run": [{"_target_": "medseg.components.run", "engine": "@dataset"}]}
    trust.check({"train.json": DECLARATIVE, "evaluate.json": evaluate}, "foreign")
    with pytest.raises(UntrustedBundleError, match="no such id"):
        trust.check({"evaluate.json": evaluate}, "foreign")


@pytest.mark.parametrize(("reference", "good"), [("@_meta_::version", True), ("@_meta_::out", False)])
@pytest.mark.parametrize("order", [1, -1], ids=["metadata last", "metadata first"])
def test_paths_cannot_come_in_through_the_metadata(reference, good, order):
    config = {**DECLARATIVE, "dataset_dir": reference}
    files = [("train.json", config), ("metadata.json", {**METADATA, "out": "/etc"})]
    if good:
        trust.check(dict(files[::order]), "foreign")
    else:
        with pytest.raises(UntrustedBundleError, match="plain values"):
            trust.check(dict(files[::order]), "foreign")


def test_the_old_name_of_an_entry_may_stand_in_metadata_but_not_beside_the_new_one():
    old = {**METADATA, "optional_packages_version": {"x": "1"}}
    trust.check({"train.json": DECLARATIVE, "metadata.json": old}, "foreign")
    with pytest.raises(UntrustedBundleError, match="renames it to required_packages_version"):
        trust.check({"train.json": DECLARATIVE, "metadata.json": {**old, "required_packages_version": {}}}, "foreign")


def test_metadata_cannot_hide_a_path_behind_a_second_reference():
    metadata = {**METADATA, "out": "@_meta_::there", "there": "/etc"}
    with pytest.raises(UntrustedBundleError, match="plain values"):
        trust.check(
            {"train.json": {**DECLARATIVE, "dataset_dir": "@_meta_::out"}, "metadata.json": metadata}, "foreign"
        )


def test_the_user_may_set_any_path_but_no_program():
    trust.check({"train.json": DECLARATIVE, trust.SETTINGS: {"dataset_dir": "/data"}}, "ours")
    with pytest.raises(UntrustedBundleError, match="--set: dataset_dir"):
        trust.check({"train.json": DECLARATIVE, trust.SETTINGS: {"dataset_dir": "$print()"}}, "ours")


@pytest.mark.parametrize("depth", [65, 100_000])
def test_deep_nesting_is_refused_without_recursing(depth):
    with pytest.raises(UntrustedBundleError, match="levels deep"):
        trust.check({"train.json": nested(depth)}, "foreign")


def test_the_refusal_names_the_first_entries_and_the_way_on():
    config = {f"knob{index}": f"$expression{index}" for index in range(9)}
    with pytest.raises(UntrustedBundleError) as caught:
        trust.check({"train.json": config}, "foreign")
    message = str(caught.value)
    assert "train.json: knob0: expression '$expression0'" in message
    assert "knob4" in message
    assert "knob5" not in message
    assert "... and 4 more" in message
    assert "medseg bundle inspect foreign" in message
    assert "--trust SHA256" in message


def test_the_refusal_shows_hidden_characters_and_cuts_long_values():
    with pytest.raises(UntrustedBundleError) as caught:
        trust.check({"a\x1b[2J.json": {"k\r\x07": "$\x1b]0;\u202e" + "x" * 10_000}}, "b\x1bundle")
    message = str(caught.value)
    assert message.replace("\n", "").isascii()
    assert message.replace("\n", "").isprintable()
    assert r"\x1b]0;\u202e" in message
    assert len(message) < 1000


def test_a_finding_keeps_the_whole_value():
    value = "$" + "x" * 10_000
    assert trust.find_programs({"a": [value]})[0] == trust.Finding(
        "a::0", "expression", value, False, "would be evaluated as Python"
    )


def test_the_check_loads_neither_torch_nor_monai_nor_numpy():
    code = (
        "import sys, medseg.bundle.trust as t; t.check({'a': {'b': {'_target_': 'monai.losses.DiceLoss'}}}, 'x');"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'monai', 'numpy', 'ignite'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
