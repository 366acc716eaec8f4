"""The program of the evidence: its plan is what the bars ask for, and all of it runs at toy size."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from megatron_mup.transfer.proxy import parameters
from megatron_mup.transfer.trials import configured

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from evidence_plan import FULL, parts_of

MOCK = ["--mock-data", "--vocab-size=4096"]


@pytest.fixture(scope="module")
def planned():
    return parts_of(FULL, MOCK)


def millions(part, size) -> float:
    model = configured(part.recipe, part.plan.trial(size, 0, (), 0)).model
    return parameters(model, 4096) / 1e6


def test_the_plan(planned):
    parts, problems = planned
    assert problems == []
    named = {part.name: part for part in parts}
    for optimizer in ("adam", "muon"):
        sweep, target = named[f"completep-{optimizer}"], named[f"target-{optimizer}"]
        assert {(256, 4), (512, 4), (1024, 4), (256, 8), (256, 16), (256, 32)} == set(sweep.plan.sizes)
        assert target.proxy is sweep
        assert millions(sweep, (256, 4)) <= 20
        assert millions(target, target.plan.sizes[0]) >= 300
        assert target.recipe.training.train_iters == sweep.recipe.training.train_iters, "fixed tokens"
    for part in parts:
        if part.name.startswith(("optimizer", "fp8")):
            assert millions(part, part.plan.sizes[0]) >= 100
    assert len({len(range(p.plan.axis.low, p.plan.axis.high + 1)) for p in parts if p.alone}) == 1, "one budget"
    assert len({(p.recipe.training.train_iters, p.recipe.training.global_batch_size) for p in parts if p.alone}) == 1


def test_the_target_waits_for_its_proxy(planned):
    named = {part.name: part for part in planned[0]}
    target, proxy = named["target-adam"], named["completep-adam"]
    assert target.todo({"target-adam": {}, "completep-adam": {}}) == []
    # The best is a little above the second point.
    done = {proxy.plan.trial((256, 4), k, (), 0).key: (k - 2.2) ** 2 for k in range(-2, 5)}
    todo = target.todo({"target-adam": {}, "completep-adam": done})
    rates = [dict(trial.values)["lr"] for _, trial in todo]
    assert rates[0] == pytest.approx(dict(proxy.plan.axis.at(2))["lr"])
    assert len(rates) == 5
    assert {(trial.hidden_size, trial.num_layers) for _, trial in todo} == {FULL.target}


@pytest.mark.long
def test_all_of_it_at_toy_size(tmp_path, monkeypatch):
    import evidence

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--toy", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out"), "--seeds", "2"]
    assert evidence.main(["prepare", *words]) == 0
    some = [
        "--parts",
        "completep-adam",
        "target-adam",
        "fp8-umup-s",
        "optimizer-muon",
        "--workers",
        "2",
        "--alone",
        "0",
    ]
    assert evidence.main(["run", *words, *some]) == 0
    with open(tmp_path / "out" / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {"finished"}
    assert len({(row["part"], row["trial"]) for row in rows}) == len(rows)
    assert evidence.main(["report", *words]) == 0
    assert "target-adam" in (tmp_path / "out" / "evidence.md").read_text()
    assert (tmp_path / "out" / "completep-adam.png").read_bytes().startswith(b"\x89PNG")
    assert evidence.main(["run", *words, *some]) == 0
    with open(tmp_path / "out" / "trials.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows), "nothing is run twice"
