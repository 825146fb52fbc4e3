"""Tables of scores: means by hand, missing labels, and the files that they are read from."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import RequestError
from medseg.manifest import CaseRecord, Manifest
from medseg.scoring.scores import CROSS_VALIDATION, Scores, nanmean, read_scores, write_scores

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
DICE = st.none() | st.just(math.nan) | st.floats(0, 1)


def row(case: str, fold: int = 0, patient: str = "", **metrics: float | None) -> dict[str, Any]:
    return {"case": case, "patient": patient or case, "fold": fold, "metrics": metrics}


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 2), DICE, DICE), min_size=1, max_size=12))
def test_summaries_are_those_of_the_known_values(values: list[tuple[int, float | None, float | None]]) -> None:
    rows = [row(f"c{number}", fold, liver=liver, mean=mean) for number, (fold, liver, mean) in enumerate(values)]
    scores = Scores("run", 3, tuple(rows))
    known = [(fold, liver) for fold, liver, _ in values if liver is not None and not math.isnan(liver)]
    found = scores.summary()["liver"]
    assert found["cases"] == len(known)
    every = [value for _, value in known]
    assert found["mean"] == (pytest.approx(statistics.fmean(every)) if every else None)
    assert found["sd"] == (pytest.approx(statistics.stdev(every)) if len(every) > 1 else None)
    for number in range(3):
        own = [value for fold, value in known if fold == number]
        assert found["folds"][number] == (pytest.approx(statistics.fmean(own)) if own else None)
    json.dumps(scores.to_dict(), allow_nan=False)


def test_labels_keep_their_order_and_the_mean_comes_last() -> None:
    scores = Scores("run", 1, (row("a", mean=0.5, tumor=0.4), row("b", mean=0.5, liver=0.6, tumor=0.4)))
    assert scores.labels == ("tumor", "liver", "mean")
    assert Scores("run", 1, ()).labels == ("mean",)


@pytest.mark.parametrize(
    ("values", "mean"), [([0.5, 0.7], 0.6), ([0.5, math.nan], 0.5), ([0.0, math.nan, 1.0], 0.5), ([1.0], 1.0)]
)
def test_a_mean_leaves_out_what_is_not_a_number(values: list[float], mean: float) -> None:
    assert nanmean(values) == pytest.approx(mean)


def test_a_mean_of_nothing_is_not_a_number() -> None:
    assert math.isnan(nanmean([]))
    assert math.isnan(nanmean([math.nan, math.nan]))


def test_cases_are_listed_worst_first_and_unknown_ones_before_them() -> None:
    rows = (row("good", mean=0.9), row("bad", mean=0.1), row("empty", mean=math.nan), row("also bad", mean=0.1))
    text = Scores("run", 1, rows).to_text()
    listed = [line.rsplit(maxsplit=2)[0].strip() for line in text.splitlines()[-4:]]
    assert listed == ["empty", "also bad", "bad", "good"]
    assert text.splitlines()[-4].split()[-1] == "-"


@pytest.mark.parametrize("folds", [1, 3])
def test_folds_have_columns_only_if_there_are_several(folds: int) -> None:
    table = Scores("run", folds, (row("a", mean=0.5),)).table()
    assert table.count("fold") == (folds if folds > 1 else 0)
    header, line = table.splitlines()[-2:]
    assert len(line.split()) == (4 if folds == 1 else 4 + folds)
    assert header.startswith("label")


def test_columns_are_aligned() -> None:
    rows = (row("a", a_long_label=0.123456, mean=0.5), row("a_long_case_name", mean=1.0))
    lines = Scores("run", 2, rows).to_text().splitlines()
    for first, last in ((2, 5), (6, 9)):
        block = lines[first:last]
        assert len({len(line) for line in block}) == 1
    assert "0.1235" in lines[3]


def test_written_scores_are_read_back(tmp_path: Path) -> None:
    scores = Scores("my_run", 2, (row("a", 0, "p1", liver=0.5, mean=0.5), row("b", 1, mean=None)), ("c",))
    path = tmp_path / "my_run" / CROSS_VALIDATION
    path.parent.mkdir()
    write_scores(scores, path)
    assert read_scores(path) == read_scores(path.parent) == scores


def manifest(path: Path, *records: CaseRecord) -> Path:
    content = Manifest("evaluate")
    for record in records:
        content.add_case(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    content.write(path)
    return path


SCORED = (
    CaseRecord("a", metrics={"liver": 0.75, "mean": 0.75}),
    CaseRecord("b", status="failed", error="unreadable"),
    CaseRecord("c"),
)


@pytest.mark.parametrize("place", ["manifest.json", "runs/evaluate/manifest.json"])
def test_an_evaluation_is_read_from_a_bundle_an_output_or_its_manifest(place: str, tmp_path: Path) -> None:
    path = manifest(tmp_path / "spleen_ct_unet" / place, *SCORED)
    found = read_scores(tmp_path / "spleen_ct_unet")
    assert found == Scores("spleen_ct_unet", 1, (row("a", liver=0.75, mean=0.75),), ("b",))
    assert read_scores(path).rows == found.rows
    assert read_scores(path).failed == ("b",)


def test_a_cross_validation_goes_before_an_evaluation(tmp_path: Path) -> None:
    manifest(tmp_path / "runs" / "evaluate" / "manifest.json", *SCORED)
    write_scores(Scores(tmp_path.name, 2, (row("x", mean=0.25),)), tmp_path / CROSS_VALIDATION)
    assert [each["case"] for each in read_scores(tmp_path).rows] == ["x"]


@pytest.mark.parametrize(
    "content",
    [
        '{"cases": [], "folds": 2}',
        '{"cases": [{"case": "a"}], "folds": 2, "failed": []}',
        '{"cases": 3, "folds": 2, "failed": []}',
        '{"cases": [], "folds": "two", "failed": []}',
        '{"cases": [], "folds": 1, "failed": null}',
        "[]",
        "{",
    ],
)
def test_a_table_of_another_form_is_refused_by_its_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / CROSS_VALIDATION
    path.write_text(content)
    with pytest.raises(RequestError, match=CROSS_VALIDATION):
        read_scores(tmp_path)


def test_an_evaluation_without_scores_is_refused(tmp_path: Path) -> None:
    path = manifest(tmp_path / "manifest.json", *SCORED[1:])
    with pytest.raises(RequestError, match=r"manifest\.json"):
        read_scores(path)
    with pytest.raises(RequestError, match="nowhere"):
        read_scores(tmp_path / "nowhere")
