"""Benchmarks of what saving and multipliers cost, on a CPU: they run, and their rows hang together."""

from __future__ import annotations

import importlib
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = "--preset toy --no-torch-compile --seq-length 32 --vocab-size 64 --json"


def lines(program: str, flags: str) -> list[dict]:
    command = [sys.executable, str(BENCHMARKS / program), *SMALL.split(), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_costs_are_against_the_standard_of_the_same_round(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows = importlib.import_module("multipliers").rows
    draw = random.Random(0)
    standard = [draw.uniform(1.0, 2.0) for _ in range(31)]
    slower = [1.01 * seconds * draw.uniform(0.999, 1.001) for seconds in standard]
    found = {row["parametrization"]: row for row in rows({"standard": standard, "mup": slower})}
    assert found["standard"]["cost_percent"] == 0
    assert found["mup"]["cost_percent"] == pytest.approx(1, abs=0.05)
    low, high = found["mup"]["interval_95_percent"]
    assert 0.9 < low < found["mup"]["cost_percent"] < high < 1.1
    assert statistics.median(found["mup"]["cost_percent_by_round"]) == found["mup"]["cost_percent"]


@pytest.mark.long
def test_a_save_among_steps():
    rows = lines("checkpoint.py", "--tokens-per-step 64 --steps 2")
    saves = [row for row in rows if "save" in row]
    assert [row["save"] for row in saves] == ["async", "async", "async, copied first", "plain"]
    assert all(row["steps"] == len(row["step_s"]) >= 2 for row in saves)
    # What is saved: weights and two moments in fp32.
    assert rows[-1]["checkpoint_gb"] == pytest.approx(12 * 1_507_000 / 1e9, rel=0.1)


@pytest.mark.long
def test_parametrizations_in_turn():
    rows = lines("multipliers.py", "--global-batch-size 2 --rounds 2 --steps-per-turn 1 --width-ratio 2")
    assert [row["parametrization"] for row in rows] == ["standard", "standard again", "mup", "completep"]
    assert all(row["ms_per_step"] > 0 and row["rounds"] == 2 for row in rows)


def test_overheads_are_shares_of_a_measured_step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    add_ratios = importlib.import_module("optimizer_step").add_ratios
    rows = {"muon": {"device ms": 35.0}, "adam": {"device ms": 5.0}, "dion": {"device ms": 49.0}}
    # Seven eighths of a millisecond per 8 tokens beside the optimizer: 7168 ms and AdamW's 5 for 64 k tokens.
    add_ratios(rows, (12.0, 64.0), None)
    assert rows["muon"]["overhead 64 k"] == pytest.approx(30 / 7173)
    assert rows["dion"]["overhead 0.5 M"] == pytest.approx(44 / (8 * 7168 + 5))
    assert rows["adam"]["overhead 64 k"] == 0
    assert rows["dion"]["times muon"] == 1.4
    without = {"muon": {"device ms": 35.0}, "dion": {"device ms": 49.0}}
    add_ratios(without, None, 7.0 / 64)
    assert without["dion"]["overhead 64 k"] == pytest.approx(14 / (7168 + 35)), "over the first one"


def test_rounds_end_in_time(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    multipliers = importlib.import_module("multipliers")

    class Nothing:
        def take(self, count: int) -> None:
            pass

    models = {"standard": Nothing(), "mup": Nothing()}
    assert len(multipliers.rounds(models, 3, 1, False)["mup"]) == 3
    assert len(multipliers.rounds(models, 3, 1, False, deadline=0.0)["mup"]) == 1
