"""Pictures of a training: files in its folder, the same in its log, never the reason that it ends."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ignite.engine import Engine, Events
from PIL import Image

from medseg.bundle.catalog import Bundle
from medseg.jobs import runner, training_pictures
from medseg.jobs.job import prepare
from medseg.jobs.training_pictures import PredictionPictures
from medseg.reporting.drawing import PALETTE
from medseg.tools.samples import write_samples


def _count(picture: Any, color: Any) -> int:
    return int((np.asarray(picture.convert("RGB")) == np.asarray(color, np.uint8)).all(-1).sum())


def _logged(folder: Path) -> dict[int, Image.Image]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for path in folder.glob("events*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag.startswith("prediction/"):
                    found[event.step] = Image.open(io.BytesIO(value.tensor.string_val[2]))
    return found


def test_each_validation_leaves_a_picture_as_a_file_and_in_the_log(trained: Bundle) -> None:
    run = trained.root / "runs" / "train"
    files = sorted((run / "pictures").rglob("*.png"))
    assert [path.relative_to(run / "pictures").as_posix() for path in files] == [
        "case_3/epoch_00002.png",
        "case_3/epoch_00004.png",
    ]
    logged = _logged(run / "tensorboard")
    for epoch, path in zip((2, 4), files, strict=True):
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(logged[epoch].convert("RGB")))
            # contours of the truth are dashes of pure white; labels are tinted by the palette
            assert _count(picture, (255, 255, 255)) > 20
            assert sum(_count(picture, color) for color in PALETTE[:2]) > 20


def test_pictures_of_colors_are_drawn_too_and_can_be_left_out(
    make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path
) -> None:
    tiny_source.update(name="balls_rgb_unet", template="rgb_image", channels={"0": "r", "1": "g", "2": "b"})
    tiny_source["network_def"].update(spatial_dims=2, in_channels=3)
    tiny_source["knobs"] = {"patch_size": [48, 64], "roi_size": [48, 64], "max_epochs": 1, "val_interval": 1}
    bundle = make_bundle(tiny_source)
    data = write_samples(tmp_path / "data", bundle, cases=3)
    for number in (0, 1):
        paths = {"dataset_dir": str(data), "resume": False, "output_dir": str(tmp_path / str(number))}
        runner.train(prepare("train", bundle, {"pictures": number}, paths=paths))
        assert len(list((tmp_path / str(number)).rglob("*.png"))) == number


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path: Path, assert_warns: Any) -> None:
    trainer, validator = Engine(lambda e, b: None), Engine(lambda e, b: None)
    PredictionPictures(str(tmp_path), validator, None).attach(trainer)  # type: ignore[arg-type]
    validator.add_event_handler(Events.ITERATION_STARTED, lambda engine: setattr(engine.state, "batch", []))
    assert_warns(lambda: validator.run([0]), "overlay-skipped", run=True)


@pytest.mark.parametrize(("interval", "drawn"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_only_every_so_many_validations_are_drawn(
    interval: int, drawn: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, validator = Engine(lambda e, b: None), Engine(lambda e, b: None)
    PredictionPictures(str(tmp_path), validator, None, cases=1, interval=interval).attach(trainer)  # type: ignore[arg-type]
    tried = []
    for number in range(4):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            validator.run([0, 0])
        tried += [number] * len(caplog.records)
    assert tried == drawn


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("case_3.nii.gz", "case_3"),
        ("scan.1.nii.gz", "scan.1"),
        ("1.2.840.10008.nii.gz", "1.2.840.10008"),
        ("a/scan.png", "a_scan"),
        ("../../scan.png", "_.._scan"),
    ],
)
def test_each_case_has_a_folder_of_its_own_within_the_run(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_pictures, "_drawn", lambda *_: Image.new("RGB", (4, 4)))
    validator = Engine(lambda e, b: None)
    pictures = PredictionPictures(str(tmp_path), validator, SimpleNamespace(picture=lambda *_: None))  # type: ignore[arg-type]
    pictures.attach(Engine(lambda e, b: None))
    validator.run([0])
    validator.state.batch, validator.state.output = [{"name": name}], [{}]
    pictures.validations = 1
    pictures.draw(validator)
    assert [path.relative_to(tmp_path / "pictures").as_posix() for path in tmp_path.rglob("*.png")] == [
        f"{folder}/epoch_00000.png"
    ]
