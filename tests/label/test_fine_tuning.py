"""Training from saved labels: a copy is trained, and replaces the old weights only where it is not worse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from medseg.bundle.catalog import Bundle
from medseg.errors import RequestError
from medseg.files import sha256_file
from medseg.label.annotations import Annotation
from medseg.label.fine_tuning import TuningRequest, tune
from medseg.label.served_bundles import ServedBundle, find_served_bundles


@pytest.fixture
def annotations(tiny_data: Path) -> list[Annotation]:
    images = sorted((tiny_data / "imagesTr").iterdir())
    return [Annotation(path.name, path, tiny_data / "labelsTr" / path.name) for path in images]


def _served(bundle: Bundle, tmp_path: Path) -> ServedBundle:
    return find_served_bundles(tmp_path / "tuned", folders=[bundle.root]).served[bundle.name]


def _pseudonym(name: str) -> str:
    return f"case-{name[5]}"


def test_a_bundle_without_weights_is_trained_and_put_into_use(
    trained_copy: Bundle, annotations, tmp_path: Path
) -> None:
    trained_copy.weights.unlink()
    served = _served(trained_copy, tmp_path)
    heard: list[float] = []
    request = TuningRequest(max_epochs=2, settings={"device_name": "cpu"})
    found = tune(
        served,
        annotations,
        request,
        work=tmp_path / "work",
        pseudonym=_pseudonym,
        report=lambda *at: heard.append(at[0]),
    )
    assert found.published
    assert math.isnan(found.before)
    assert (found.train, found.val) == (3, 1)
    assert served.current.root == tmp_path / "tuned" / trained_copy.name
    assert found.weights_sha256 == sha256_file(served.tuned.weights)
    assert heard[-1] == 2
    assert json.loads((served.tuned.root / "trained_on.json").read_text()) == ["case-1", "case-2", "case-3"]
    assert find_served_bundles(tmp_path / "tuned", folders=[trained_copy.root]).served
    assert not trained_copy.weights.exists()
    assert not list((tmp_path / "work").iterdir())
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == [trained_copy.name]


def test_worse_weights_are_thrown_away_unless_asked_for(trained: Bundle, annotations, tmp_path: Path) -> None:
    served = _served(trained, tmp_path)
    before = sha256_file(trained.weights)
    spoiled = {"learning_rate": 1e-9, "ema_decay": 0.0}
    request = TuningRequest(max_epochs=1, pretrained=False, settings=spoiled)
    found = tune(served, annotations, request, work=tmp_path / "work", pseudonym=_pseudonym)
    assert not found.published
    assert found.after < found.before
    assert found.weights_sha256 == before == sha256_file(served.current.weights)
    request = TuningRequest(max_epochs=1, pretrained=False, publish="always", settings=spoiled)
    assert tune(served, annotations, request, work=tmp_path / "work", pseudonym=_pseudonym).published
    assert served.current.root == served.tuned.root
    assert sha256_file(trained.weights) == before


@pytest.mark.parametrize(
    "request_", [TuningRequest(max_epochs=0), TuningRequest(publish="maybe"), TuningRequest(max_epochs=True)]
)
def test_requests_that_cannot_be_are_refused_before_anything_is_written(
    request_: TuningRequest, trained: Bundle, annotations, tmp_path: Path
) -> None:
    with pytest.raises(RequestError):
        tune(_served(trained, tmp_path), annotations, request_, work=tmp_path / "work", pseudonym=_pseudonym)
    assert not (tmp_path / "work").exists()


def test_unknown_knobs_are_refused(trained: Bundle, annotations, tmp_path: Path) -> None:
    request = TuningRequest(settings={"learnin_rate": 1})
    with pytest.raises(RequestError, match="learnin_rate"):
        tune(_served(trained, tmp_path), annotations, request, work=tmp_path / "work", pseudonym=_pseudonym)
