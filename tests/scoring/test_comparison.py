"""Tables of scores and the choice among runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.errors import RequestError
from medseg.manifest import CaseRecord, Manifest
from medseg.scoring.comparison import compare
from medseg.scoring.scores import Scores, read_scores, write_scores


def _rows(values: dict[str, float], patients: int = 0) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "case": case,
            "patient": f"case_{number % patients}" if patients else case,
            "fold": number % 2,
            "metrics": {"tumor": value, "mean": value},
        }
        for number, (case, value) in enumerate(values.items())
    )


def _run(folder: Path, values: dict[str, float], patients: int = 0) -> Path:
    folder.mkdir(parents=True)
    write_scores(Scores(folder.name, 2, _rows(values, patients)), folder / "cross_validation.json")
    return folder


def _cases(seed: int, shift: float, count: int = 40) -> dict[str, float]:
    base = np.random.default_rng(0).uniform(0.6, 0.9, count)
    noise = np.random.default_rng(seed).normal(0, 0.02, count)
    return {f"case_{n}": float(value) for n, value in enumerate(base + noise + shift)}


def test_a_table_has_mean_deviation_and_folds_of_each_label(tmp_path: Path) -> None:
    rows = (
        {"case": "a", "patient": "a", "fold": 0, "metrics": {"liver": 0.9, "tumor": math.nan, "mean": 0.9}},
        {"case": "b", "patient": "b", "fold": 1, "metrics": {"liver": 0.7, "tumor": 0.5, "mean": 0.6}},
    )
    scores = Scores("my_ct_unet", 2, rows, ("c",))
    write_scores(scores, tmp_path / "cross_validation.json")
    content = json.loads((tmp_path / "cross_validation.json").read_text())
    assert content["labels"]["liver"]["mean"] == pytest.approx(0.8)
    assert content["labels"]["liver"]["sd"] == pytest.approx(np.std([0.9, 0.7], ddof=1))
    assert content["labels"]["tumor"] == {"mean": 0.5, "sd": None, "cases": 1, "folds": [None, 0.5]}
    assert content["cases"][0]["metrics"]["tumor"] is None
    assert content["failed"] == ["c"]
    text = (tmp_path / "cross_validation.txt").read_text().splitlines()
    assert [line.split() for line in text[2:6]] == [
        ["label", "mean", "SD", "fold", "0", "fold", "1", "cases"],
        ["liver", "0.8000", "0.1414", "0.9000", "0.7000", "2"],
        ["tumor", "0.5000", "-", "-", "0.5000", "1"],
        ["mean", "0.7500", "0.2121", "0.9000", "0.6000", "2"],
    ]
    assert [line.split()[0] for line in text[8:10]] == ["b", "a"]
    assert text[-1] == "failed: c"
    again = read_scores(tmp_path)
    assert again.summary() == scores.summary()


def test_the_best_run_is_named_with_paired_intervals(tmp_path: Path) -> None:
    places = [
        _run(tmp_path / name, _cases(seed, shift))
        for seed, (name, shift) in enumerate({"small": 0.0, "large": 0.03, "same": 0.0}.items(), start=1)
    ]
    found = compare(places)
    assert found.standings[0].name == "large"
    by_name = {each.name: each for each in found.differences}
    values = np.array(list(_cases(2, 0.03).values())) - np.array(list(_cases(1, 0.0).values()))
    small = by_name["small"]
    assert small.mean == pytest.approx(values.mean())
    # The percentile interval of a mean lies close to that of the normal distribution.
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert small.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert small.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert small.better == (values > 0).mean()
    assert small.is_clear
    assert "difference from every other run is significant" in found.verdict
    assert compare(places).to_dict() == found.to_dict()


def test_a_difference_that_may_be_chance_is_called_so(tmp_path: Path) -> None:
    found = compare([_run(tmp_path / "one", _cases(1, 0.0)), _run(tmp_path / "two", _cases(2, 0.0))])
    assert not found.differences[0].is_clear
    assert "is not significant" in found.verdict


@pytest.mark.parametrize("cases", [1, 2, 5])
def test_a_handful_of_patients_makes_nothing_clear(tmp_path: Path, cases: int) -> None:
    found = compare([_run(tmp_path / "one", _cases(1, 0.2, cases)), _run(tmp_path / "two", _cases(1, 0.0, cases))])
    assert found.differences[0].is_clear
    assert found.verdict.startswith("best: one (")
    assert f"{cases} patients are too few" in found.verdict


def test_cases_of_one_patient_count_as_one_piece_of_evidence(tmp_path: Path) -> None:
    one, two = _cases(1, 0.01), _cases(2, 0.0)
    apart = compare([_run(tmp_path / "a" / "x", one), _run(tmp_path / "a" / "y", two)])
    grouped = compare([_run(tmp_path / "b" / "x", one, patients=4), _run(tmp_path / "b" / "y", two, patients=4)])
    assert (apart.patients, grouped.patients) == (40, 4)
    assert grouped.differences[0].mean == pytest.approx(apart.differences[0].mean)
    # Four patients with ten cases each, drawn whole: the same as a bootstrap of the four sums.
    sums = np.zeros(4)
    for number, case in enumerate(one):
        sums[number % 4] += one[case] - two[case]
    draws = np.random.default_rng(9).integers(0, 4, (20_000, 4))
    expected = np.percentile(sums[draws].mean(1) / 10, [2.5, 97.5])
    best_is_x = grouped.standings[0].name == "x"
    expected = expected if best_is_x else -expected[::-1]
    assert [grouped.differences[0].low, grouped.differences[0].high] == pytest.approx(expected, abs=5e-4)


def test_only_shared_cases_count_and_evaluations_can_be_compared(tmp_path: Path) -> None:
    folder = _run(tmp_path / "folds", {"a": 0.5, "b": 0.7, "c": 0.9})
    manifest = Manifest("evaluate")
    for name, value in {"a": 0.6, "b": 0.9, "d": 0.1}.items():
        manifest.add_case(CaseRecord(name, metrics={"tumor": value, "mean": value}))
    manifest.add_case(CaseRecord("e", status="failed", error="unreadable"))
    (tmp_path / "bundle" / "runs" / "evaluate").mkdir(parents=True)
    manifest.write(tmp_path / "bundle" / "runs" / "evaluate" / "manifest.json")
    found = compare([folder, tmp_path / "bundle"])
    assert (found.cases, found.left_out) == (2, ("c", "d"))
    assert [(each.name, each.mean) for each in found.standings] == [
        ("bundle", pytest.approx(0.75)),
        ("folds", pytest.approx(0.6)),
    ]


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one, other = _run(tmp_path / "one", {"a": 0.5}), _run(tmp_path / "other", {"b": 0.5})
    (tmp_path / "empty").mkdir()
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "cross_validation.json").write_text('{"folds": 2}')
    for places, message in [
        ([one], "two or more runs"),
        ([one, other], "No common cases"),
        ([one, one], "given twice"),
        ([one, tmp_path / "empty"], "No scores in"),
        ([one, tmp_path / "nowhere"], "No scores in"),
        ([one, torn], "is not a table of a cross-validation"),
    ]:
        with pytest.raises(RequestError, match=message):
            compare(places)


def _table(folder: Path, rows: Any, folds: int = 1) -> Path:
    folder.mkdir(parents=True)
    write_scores(Scores(folder.name, folds, tuple(rows)), folder / "cross_validation.json")
    return folder


def _row(case: str, patient: str = "", **metrics: float | None) -> dict[str, Any]:
    return {"case": case, "patient": patient or case, "fold": 0, "metrics": metrics}


def test_standings_are_means_and_deviations_by_hand(tmp_path: Path) -> None:
    one = _table(tmp_path / "one", [_row("a", liver=0.8, mean=0.8), _row("b", liver=0.6, mean=0.6)])
    two = _table(tmp_path / "two", [_row("a", liver=0.9, mean=0.9), _row("b", liver=0.6, mean=0.6)])
    found = compare([one, two])
    assert [each.name for each in found.standings] == ["two", "one"]
    assert [each.mean for each in found.standings] == pytest.approx([0.75, 0.7])
    assert [each.sd for each in found.standings] == pytest.approx(
        [np.std([0.9, 0.6], ddof=1), np.std([0.8, 0.6], ddof=1)]
    )
    (difference,) = found.differences
    assert (difference.name, difference.better) == ("one", 0.75)
    assert difference.mean == pytest.approx(0.05)
    assert 0 <= difference.low <= difference.mean <= difference.high <= 0.1 + 1e-9


def test_an_interval_is_that_of_every_possible_draw(tmp_path: Path) -> None:
    values = [0.02, -0.01, 0.05, 0.03, 0.00, 0.06]
    one = _run(tmp_path / "one", {f"c{n}": 0.5 + value for n, value in enumerate(values)})
    two = _run(tmp_path / "two", dict.fromkeys((f"c{n}" for n in range(6)), 0.5))
    (difference,) = compare([one, two]).differences
    draws = np.array(np.meshgrid(*[values] * 6)).reshape(6, -1).mean(0)
    low, high = np.percentile(draws, [2.5, 97.5])
    assert [difference.low, difference.high] == pytest.approx([low, high], abs=0.002)
    assert difference.better == pytest.approx((4 + 0.5) / 6)


def test_equal_runs_differ_by_nothing_and_are_ordered_by_name(tmp_path: Path) -> None:
    values = _cases(1, 0.0, 8)
    found = compare([_run(tmp_path / name, values) for name in ("zeta", "alpha", "mu")])
    assert [each.name for each in found.standings] == ["alpha", "mu", "zeta"]
    for difference in found.differences:
        assert (difference.mean, difference.low, difference.high, difference.better) == (0, 0, 0, 0.5)
        assert not difference.is_clear
    assert "mu, zeta" in found.verdict


def test_cases_that_a_run_could_not_score_are_left_out_of_all(tmp_path: Path) -> None:
    one = _table(tmp_path / "one", [_row("a", mean=0.8), _row("b", mean=math.nan), _row("c", mean=0.4)])
    two = _table(tmp_path / "two", [_row("a", mean=0.7), _row("b", mean=0.9), _row("d", mean=0.1), _row("c", mean=0.5)])
    found = compare([one, two])
    assert (found.cases, found.left_out) == (2, ("b", "d"))
    assert [each.mean for each in found.standings] == pytest.approx([0.6, 0.6])


def test_a_single_shared_case_has_no_deviation_and_a_point_interval(tmp_path: Path) -> None:
    found = compare([_run(tmp_path / "one", {"a": 0.5, "x": 1.0}), _run(tmp_path / "two", {"a": 0.75, "y": 0.0})])
    assert (found.cases, found.patients) == (1, 1)
    assert {each.sd for each in found.standings} == {None}
    (difference,) = found.differences
    assert (difference.low, difference.mean, difference.high, difference.better) == (0.25, 0.25, 0.25, 1.0)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["best"] == "two"


def test_a_label_counts_over_the_shared_cases_that_have_it(tmp_path: Path) -> None:
    rows = [_row("a", liver=0.8, tumor=0.2, mean=0.5), _row("b", liver=0.6, tumor=None, mean=0.6)]
    other = [_row("a", liver=0.7, mean=0.7), _row("b", liver=0.7, mean=0.7), _row("c", liver=0.0, mean=0.0)]
    found = compare([_table(tmp_path / "one", rows), _table(tmp_path / "two", other)])
    labels = {each.name: each.labels for each in found.standings}
    assert labels["one"] == pytest.approx({"liver": 0.7, "tumor": 0.2})
    assert labels["two"] == pytest.approx({"liver": 0.7})


def test_patients_are_those_of_any_run_that_knows_them(tmp_path: Path) -> None:
    values = _cases(1, 0.0, 8)
    known = _run(tmp_path / "known", values, patients=2)
    unknown = _run(tmp_path / "unknown", _cases(2, 0.0, 8))
    assert compare([known, unknown]).patients == compare([unknown, known]).patients == 2


def test_the_order_of_runs_changes_nothing_but_ties(tmp_path: Path) -> None:
    places = [_run(tmp_path / f"run{n}", _cases(n, 0.01 * n, 12)) for n in range(4)]
    assert compare(places) == compare(places[::-1])
    best, *others = compare(places).standings
    assert all(best.mean >= other.mean for other in others)


def test_runs_in_folders_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    one, two = (_run(tmp_path / parent / "unet", _cases(1, shift, 7)) for parent, shift in (("a", 0.1), ("b", 0.0)))
    found = compare([one, str(two)])
    assert [each.name for each in found.standings] == [str(one), str(two)]


@pytest.mark.parametrize(("patients", "told"), [(5, False), (6, True)])
def test_six_patients_are_needed_for_a_clear_difference(patients: int, told: bool, tmp_path: Path) -> None:
    one, two = _run(tmp_path / "one", _cases(1, 0.1, patients)), _run(tmp_path / "two", _cases(1, 0.0, patients))
    found = compare([one, two])
    assert found.differences[0].is_clear
    assert found.patients == patients
    assert (str(patients) in found.verdict.partition(")")[2]) != told
