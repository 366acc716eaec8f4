"""The grid of coordinate checks: which there are, and what a line of its tables says."""

from __future__ import annotations

import csv

from benchmarks import coordinates
from benchmarks.coordinates import CASE_COLUMNS, PLANS, Case, case_line, cases
from megatron_mup.transfer.verdict import Verdict


def verdict(slope: float, name: str = "logits") -> Verdict:
    return Verdict("width", "activation", name, 4, slope, 0.0, -0.25, 0.25, 1.0, 2.0)


def test_every_promise_is_checked_and_the_standard_scheme_too():
    found = {(case.parametrization, case.axis) for case in cases(optimizers=["adam"])}
    wide = {"completep", "umup", "mup", "munit", "spectral", "standard"}
    assert {name for name, axis in found if axis == "width"} == wide
    assert {name for name, axis in found if axis == "depth"} == {"completep", "umup", "standard"}
    assert {name for name, axis in found if axis == "both"} == {"completep", "umup"}
    assert len(list(cases())) == 3 * len(found)


def test_a_line_says_what_is_farthest_and_whether_it_must_be():
    found = [verdict(0.1), verdict(-0.6, "router"), verdict(0.3)]
    line = dict(zip(CASE_COLUMNS, case_line(Case("mup", "adam", "width"), PLANS["width"], found), strict=False))
    assert (line["failed"], line["checked"], line["farthest"]) == (2, 3, "activation of router")
    assert (line["widths"], line["depths"], line["as it must"]) == ("128-2048", "2", False)
    standard = case_line(Case("standard", "adam", "width"), PLANS["width"], found)
    assert standard[CASE_COLUMNS.index("as it must")] is True
    assert case_line(Case("standard", "adam", "width"), PLANS["width"], found[:1])[-1] is False


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    done = [[case.parametrization, case.optimizer, case.axis] for case in cases(["mup"], ["adam"])]
    with open(tmp_path / "cases.csv", "w", newline="") as file:
        csv.writer(file).writerows([CASE_COLUMNS, *done])
    monkeypatch.setattr(Case, "run", lambda *_: 1 / 0)
    words = ["--output", str(tmp_path), "--parametrization", "mup", "--optimizer", "adam"]
    assert coordinates.main(words) == 0
