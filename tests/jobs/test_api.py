"""What a training may take the place of, and what it goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.catalog import Bundle
from medseg.errors import MedsegError, RequestError
from medseg.jobs import api
from medseg.manifest import Manifest

_SHORT = {"max_epochs": 1, "pictures": 0, "num_workers": 0}


def _files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_state_of_an_interrupted_training_is_not_lost_without_a_word(
    make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path
) -> None:
    bundle = make_bundle(tiny_source)

    def stop(done: float, total: int, note: str) -> None:
        if done > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.train(bundle.root, tiny_data, settings={"pictures": 0, "num_workers": 0}, report=stop)
    assert not bundle.weights.exists()
    before = _files(bundle.root)
    with pytest.raises(RequestError, match="--resume to continue, or --overwrite"):
        api.train(bundle.root, tiny_data, settings=_SHORT)
    assert _files(bundle.root) == before
    api.train(bundle.root, tiny_data, settings=_SHORT, overwrite=True)
    assert bundle.weights.is_file()


def test_a_folder_with_another_bundle_is_not_trained_in_place_of_a_copy(
    make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path
) -> None:
    bundle = make_bundle(tiny_source)
    other = make_bundle({**tiny_source, "name": "other_ct_unet", "knobs": {**tiny_source["knobs"], "seed": 7}})
    before = _files(other.root)
    with pytest.raises(RequestError, match="holds a different bundle"):
        api.train(bundle.root, tiny_data, output=other.root, settings=_SHORT, overwrite=True)
    assert _files(other.root) == before


def test_a_run_does_not_go_on_by_another_recipe_and_stays_what_it_was(trained_copy: Bundle, tiny_data: Path) -> None:
    before = _files(trained_copy.root)
    with pytest.raises(RequestError, match="not started with recipe='unet2015'"):
        api.train(trained_copy.root, tiny_data, settings={**_SHORT, "recipe": "unet2015"}, resume=True)
    assert _files(trained_copy.root) == before


def test_a_run_that_cannot_be_continued_keeps_its_record(trained_copy: Bundle, tiny_data: Path) -> None:
    path = trained_copy.root / "runs" / "train" / "manifest.json"
    before = path.read_text()
    assert json.loads(before)["validations"]
    with pytest.raises(MedsegError, match="cannot resume this run"):
        api.train(trained_copy.root, tiny_data, settings={"batch_size": 1}, resume=True)
    assert path.read_text() == before
    assert Manifest.read(path).status == "done"


def test_inputs_are_listed_once_and_the_dataset_takes_the_list(
    trained: Bundle, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medseg.io import cases
    from medseg.jobs import job as workflow

    listed, opened = [], []
    real_listing = cases._found
    monkeypatch.setattr(cases, "_found", lambda path: listed.append(path) or real_listing(path))
    hand_over = workflow._hand_over
    monkeypatch.setattr(
        workflow, "_hand_over", lambda parser, where, found: opened.append(found) or hand_over(parser, where, found)
    )
    manifest = api.predict(trained.root, tiny_data / "imagesTr", tmp_path / "out")
    assert len(listed) == 1
    assert [case.name for case in opened[0]] == sorted(manifest.cases)
