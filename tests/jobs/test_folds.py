"""Cross-validation through bundles: which case where, what is trained again, the table, the ensemble."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from medseg.bundle.catalog import Bundle, find_bundle
from medseg.errors import BundleError, RequestError, WeightsError
from medseg.io.datasets import find_dataset
from medseg.jobs import api, folds
from medseg.jobs.ensembles import write_ensemble
from medseg.jobs.folds import cross_validate, make_folds
from medseg.tools.samples import write_samples


def _pictures(root: Path, names: list[str], split: dict[str, list[str]] | None = None) -> Path:
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / f"{name}.png").write_bytes(b"x")
    if split:
        (root / "split.json").write_text(json.dumps(split))
    return root


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NAMES = [f"eye_{number:02d}{side}" for number in range(6) for side in "LR"]


def test_folds_are_of_all_cases_where_nothing_is_held_out(tmp_path: Path) -> None:
    dealt = make_folds(_pictures(tmp_path, NAMES), 3, seed=0)
    assert sorted(case for fold in dealt.folds for case in fold) == NAMES
    assert dealt.held_out == ()
    for fold in dealt.folds:
        assert {case[:-1] for case in fold if case.endswith("L")} == {case[:-1] for case in fold if case.endswith("R")}
    split = dealt.split(1)
    assert sorted(split["train"] + split["val"]) == NAMES
    assert split["val"] == list(dealt.folds[1])


def test_the_validation_part_of_a_data_set_is_held_out(tmp_path: Path) -> None:
    root = _pictures(tmp_path, NAMES, {"train": NAMES[:8], "val": NAMES[8:]})
    dealt = make_folds(root, 2, seed=0)
    assert sorted(case for fold in dealt.folds for case in fold) == NAMES[:8]
    assert dealt.held_out == tuple(NAMES[8:])


def test_folds_depend_on_data_and_seed_alone(tmp_path: Path) -> None:
    one, other = _pictures(tmp_path / "a", NAMES), _pictures(tmp_path / "b", NAMES[::-1])
    assert make_folds(one, 3, 0).to_json() == make_folds(other, 3, 0).to_json()
    assert make_folds(one, 3, 1).to_json() != make_folds(one, 3, 0).to_json()
    assert str(tmp_path) not in make_folds(one, 3, 0).to_json()


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "chase_db1").is_dir(), reason="needs ../shared/data beside the project")
def test_both_eyes_of_a_person_are_in_one_fold() -> None:
    dealt = make_folds(DATA / "chase_db1", 5, seed=0)
    people = [{case[:-1] for case in fold} for fold in dealt.folds]
    assert sum(map(len, people)) == len(set.union(*people)) == 8
    assert sum(map(len, dealt.folds)) == 16
    assert not {case[:-1] for case in dealt.held_out} & set.union(*people)


class _Calls:
    """Stand-ins for training and scoring that leave what these leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trained: Bundle) -> None:
        self.trained = trained
        self.made: list[tuple[str, str, bool]] = []
        self.interrupt = ""
        monkeypatch.setattr(api, "train", self.train)
        monkeypatch.setattr(api, "evaluate", self.evaluate)

    def train(self, source: Bundle, data: Path, *, output: Path, settings: Any, resume: bool, **_: Any) -> None:
        self.made.append(("train", output.name, resume))
        if not (output / "configs").is_dir():
            shutil.copytree(self.trained.root, output, dirs_exist_ok=True)
            shutil.rmtree(output / "runs" / "evaluate", ignore_errors=True)
        manifest = output / "runs" / "train" / "manifest.json"
        content = json.loads(manifest.read_text())
        content["overrides"] = sorted(settings)
        content["knobs"].update({**settings, "split_file": "split.json"})
        content["status"] = "running" if output.name == self.interrupt else "done"
        manifest.write_text(json.dumps(content))
        if output.name == self.interrupt:
            raise KeyboardInterrupt

    def evaluate(self, bundle: Path, data: Path, *, settings: Any, **_: Any) -> None:
        self.made.append(("evaluate", bundle.name, False))
        monkeyed = json.loads((self.trained.root / "runs" / "train" / "manifest.json").read_text())
        split = json.loads((bundle / "split.json").read_text())
        cases = find_dataset(data, "val", split_file=bundle / "split.json")
        assert [case["name"].split(".")[0] for case in cases] == split["val"]
        monkeyed.update(command="evaluate", status="done")
        monkeyed["bundle"]["weights_sha256"] = find_bundle(bundle).metadata["weights"]["models/model.pt"]["sha256"]
        monkeyed["cases"] = [
            {"name": case["name"], "status": "done", "seconds": 1, "error": None, "output": None, "metrics": metrics}
            for case in cases
            for metrics in [{"small": 0.5, "large": 0.9, "mean": 0.7}]
        ]
        (bundle / "runs" / "evaluate").mkdir(parents=True, exist_ok=True)
        (bundle / "runs" / "evaluate" / "manifest.json").write_text(json.dumps(monkeyed))


@pytest.fixture
def data(make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path) -> Path:
    return write_samples(tmp_path / "cases", make_bundle(tiny_source), cases=5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, trained: Bundle) -> _Calls:
    return _Calls(monkeypatch, trained)


def test_jobs_of_single_folds_make_what_one_run_of_all_makes(
    calls: _Calls, trained: Bundle, data: Path, tmp_path: Path
) -> None:
    assert cross_validate(trained.root, data, tmp_path / "jobs", folds=2, fold=1) is None
    with pytest.raises(BundleError, match="contains an unfinished cross-validation"):
        find_bundle(tmp_path / "jobs")
    scores = cross_validate(trained.root, data, tmp_path / "jobs", folds=2, fold=0)
    assert scores is not None
    whole = cross_validate(trained.root, data, tmp_path / "whole", folds=2)
    assert whole is not None
    for name in ("folds.json", "cross_validation.json", "cross_validation.txt", "models/model.pt"):
        assert (tmp_path / "jobs" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(whole.rows) == 4
    assert whole.summary()["mean"]["mean"] == pytest.approx(0.7)


def test_a_finished_fold_stays_and_an_unfinished_one_goes_on(
    calls: _Calls, trained: Bundle, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    calls.interrupt = "fold_1"
    with pytest.raises(KeyboardInterrupt):
        cross_validate(trained.root, data, out, folds=3)
    with pytest.raises(RequestError, match="pass --resume"):
        cross_validate(trained.root, data, out, folds=3)
    calls.made.clear()
    calls.interrupt = ""
    assert cross_validate(trained.root, data, out, folds=3, resume=True) is not None
    assert calls.made == [
        ("train", "fold_1", True),
        ("evaluate", "fold_1", False),
        ("train", "fold_2", False),
        ("evaluate", "fold_2", False),
    ]
    calls.made.clear()
    cross_validate(trained.root, data, out, folds=3, resume=True)
    assert calls.made == []


def test_folds_that_were_trained_otherwise_are_refused(
    calls: _Calls, trained: Bundle, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cross_validate(trained.root, data, out, folds=2, fold=0, settings={"max_epochs": 3})
    with pytest.raises(RequestError, match="max_epochs=3, which now is 4"):
        cross_validate(trained.root, data, out, folds=2, settings={"max_epochs": 4}, resume=True)
    with pytest.raises(RequestError, match="max_epochs=3, which now is not set"):
        cross_validate(trained.root, data, out, folds=2, resume=True)
    for change in ({"folds": 3}, {"settings": {"max_epochs": 3, "seed": 5}}):
        with pytest.raises(RequestError, match="assigns the cases differently"):
            cross_validate(trained.root, data, out, **{"folds": 2, **change}, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 2, "fold": 2}, "invalid fold number, expected 0 to 1"),
        ({"folds": 1}, "use at least 2"),
        ({"folds": 9}, "at most 4 folds"),
    ],
)
def test_folds_that_cannot_be_are_refused(
    trained: Bundle, data: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        cross_validate(trained.root, data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cross_validation_trains_scores_and_averages(
    make_bundle: Any, tiny_source: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    bundle, out = make_bundle(tiny_source), tmp_path / "out"
    told: list[str] = []
    scores = cross_validate(
        bundle.root,
        data,
        out,
        folds=2,
        settings={"max_epochs": 2},
        report=lambda done, total, note: told.append(note),
    )
    assert scores is not None
    listed = json.loads((out / "folds.json").read_text())
    assert listed["held_out"] == ["case_4"]
    table = json.loads((out / "cross_validation.json").read_text())
    assert sorted(row["case"] for row in table["cases"]) == [f"case_{n}.nii.gz" for n in range(4)]
    for row in table["cases"]:
        assert row["case"].split(".")[0] in listed["folds"][row["fold"]]["val"]
    assert any(note.startswith("epochs of fold 1 of 2: ") for note in told)
    assert any(note.startswith("scored cases of fold 1 of 2: ") for note in told)
    together = find_bundle(out)
    assert together.label_names == bundle.label_names
    case = find_dataset(data, "val")[0]
    assert api.predict(out, case["image"], tmp_path / "masks").exit_code == 0
    by_list = api.predict([out / "fold_0", out / "fold_1"], case["image"], tmp_path / "listed")
    assert by_list.exit_code == 0
    mask = np.asarray(nibabel.load(tmp_path / "masks" / case["name"]).dataobj)
    assert (mask == np.asarray(nibabel.load(tmp_path / "listed" / case["name"]).dataobj)).all()
    single = [api.predict(out / f"fold_{n}", case["image"], tmp_path / f"single_{n}").exit_code for n in range(2)]
    assert single == [0, 0]
    manifest = api.evaluate(out, data, output=tmp_path / "scores")
    assert list(manifest.cases) == [case["name"]]


def _member(trained: Bundle, folder: Path, scale: float) -> Bundle:
    bundle = Bundle(Path(shutil.copytree(trained.root, folder / trained.name)))
    state = torch.load(bundle.weights, weights_only=True)
    torch.save({name: scale * value for name, value in state.items()}, bundle.weights)
    metadata = json.loads(bundle.config_path("metadata").read_text())
    metadata.pop("weights")
    bundle.config_path("metadata").write_text(json.dumps(metadata))
    return bundle


def test_an_ensemble_is_the_mean_of_its_members(trained: Bundle, tmp_path: Path) -> None:
    members = [_member(trained, tmp_path / str(scale), scale) for scale in (1.0, 0.7)]
    together = write_ensemble(members, tmp_path / "mean")
    network = _network(together)
    image = torch.rand(1, 1, 16, 24, 24)
    with torch.no_grad():
        found = network(image).softmax(1)
        expected = sum(_network(member)(image).softmax(1) for member in members) / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("inferer", {"activation": "sigmoid"}),
        ("postprocessing", {"transforms": [{"_target_": "monai.transforms.Activationsd", "sigmoid": True}]}),
    ],
)
def test_channels_that_may_overlap_are_averaged_one_by_one(
    trained: Bundle, tmp_path: Path, part: str, change: dict[str, Any]
) -> None:
    members = [_member(trained, tmp_path / str(scale), scale) for scale in (1.0, 0.7)]
    for member in members:
        config = json.loads(member.config_path("inference").read_text())
        config[part] = {**config[part], **change}
        member.config_path("inference").write_text(json.dumps(config))
    together = write_ensemble(members, tmp_path / "mean")
    image = torch.rand(1, 1, 16, 24, 24)
    with torch.no_grad():
        found = _network(together)(image).sigmoid()
        expected = sum(_network(member)(image).sigmoid() for member in members) / 2
    torch.testing.assert_close(found, expected)


def _network(bundle: Bundle) -> torch.nn.Module:
    from monai.bundle import ConfigParser

    config = json.loads(bundle.config_path("inference").read_text())
    network: torch.nn.Module = ConfigParser({"network": config["network_def"]}).get_parsed_content("network")
    network.load_state_dict(torch.load(bundle.weights, weights_only=True))
    return network.eval()


def test_bundles_that_do_not_fit_together_are_not_averaged(
    trained: Bundle, make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path
) -> None:
    member = _member(trained, tmp_path / "a", 1.0)
    changed = json.loads(member.config_path("inference").read_text())
    changed["spacing"] = [1.0, 1.0, 3.0]
    member.config_path("inference").write_text(json.dumps(changed))
    with pytest.raises(BundleError, match=r"spacing of configs/inference\.json"):
        write_ensemble([trained, member], tmp_path / "mean")
    with pytest.raises(WeightsError, match="has no weights: train it first"):
        write_ensemble([trained, make_bundle(tiny_source)], tmp_path / "mean")
    altered = Bundle(Path(shutil.copytree(trained.root, tmp_path / "b" / trained.name)))
    altered.weights.write_bytes(_member(trained, tmp_path / "c", 0.5).weights.read_bytes())
    with pytest.raises(WeightsError, match="was altered or replaced"):
        write_ensemble([trained, altered], tmp_path / "mean")
    assert not (tmp_path / "mean" / "configs").exists()


def test_scoring_anew_is_needed_after_other_weights(trained_copy: Bundle) -> None:
    assert not folds.is_scored(trained_copy)


@pytest.mark.parametrize("recipe", ["unet2015", "unetplusplus2018"])
def test_a_fold_of_another_recipe_is_neither_kept_nor_joined(
    calls: _Calls, trained: Bundle, data: Path, tmp_path: Path, recipe: str
) -> None:
    out = tmp_path / "out"
    cross_validate(trained.root, data, out, folds=2, fold=0)
    calls.made.clear()
    with pytest.raises(RequestError, match="started from another bundle or recipe"):
        cross_validate(trained.root, data, out, folds=2, settings={"recipe": recipe}, resume=True)
    assert calls.made == []


@pytest.mark.parametrize("settings", [{"seed": "abc", "recipe": "unet2015"}, {"seed": None}])
def test_a_seed_that_is_no_number_is_refused(
    trained: Bundle, data: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match="seed"):
        cross_validate(trained.root, data, tmp_path / "out", folds=2, settings=settings)
    assert not (tmp_path / "out").exists()
