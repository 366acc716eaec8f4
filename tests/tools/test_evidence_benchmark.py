"""The program of the evidence: its plan is what the bars ask for, and all of it runs at toy size."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mup.config import to_yaml
from megatron_mup.transfer.proxy import parameters
from megatron_mup.transfer.trials import Results, configured, digest

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
    done = {proxy.plan.trial((256, 4), k, (), 0).key: (k - 2.2) ** 2 for k in range(-3, 5)}
    todo = target.todo({"target-adam": {}, "completep-adam": done})
    rates = [dict(trial.values)["lr"] for _, trial in todo]
    assert rates[0] == pytest.approx(dict(proxy.plan.axis.at(2))["lr"])
    assert len(rates) == 5
    urgencies = [urgency for urgency, _ in todo]
    seeds = [urgency for urgency, trial in proxy.todo({proxy.name: done}) if trial.seed != proxy.plan.first_seed]
    assert urgencies[0] < urgencies[1] < min(seeds), "they are the longest, and can't wait until the end"
    assert {(trial.hidden_size, trial.num_layers) for _, trial in todo} == {FULL.target}


def test_results_of_another_machine_are_taken_over(planned, tmp_path):
    import evidence

    former, output = tmp_path / "former", tmp_path / "output"
    parts = {part.name: part for part in planned[0] if part.name in ("completep-adam", "completep-muon")}
    for part in parts.values():
        file = evidence.recipe_file(former, part)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Where the data lay is no part of what was trained; the rate of decay is.
        recipe = replace(part.recipe, data=replace(part.recipe.data, data_cache_path="elsewhere"))
        if part.name == "completep-muon":
            recipe = replace(recipe, optimizer=replace(recipe.optimizer, weight_decay=0.2))
        file.write_text(to_yaml(recipe))
    (former / "about.json").write_text(json.dumps({"data": {"train": 5}}))
    row = {"hidden_size": 256, "num_layers": 4, "status": "finished", "loss": 2.5, "seconds": 30.0}
    for part, trial, more in (
        ("completep-adam", "a", {}),
        ("completep-adam", "b", {"status": "failed", "loss": None}),
        ("completep-adam", "c", {"status": "diverged", "loss": None}),
        ("completep-muon", "d", {}),
        ("gone", "e", {}),
    ):
        evidence.write_row(former / "trials.csv", {"part": part, "trial": trial, **row, **more})
    (former / "completep-adam--a.csv").write_text("iteration\n")
    output.mkdir()
    kept = {name: Results(tmp_path / name, digest(part.recipe)) for name, part in parts.items()}
    for _ in range(2):
        evidence.adopt(former, output, {"train": 5}, list(parts.values()), kept)
    assert {name: {t: r["loss"] for t, r in results.read().items()} for name, results in kept.items()} == {
        "completep-adam": {"a": 2.5, "c": None},
        "completep-muon": {},
    }
    with open(output / "trials.csv", newline="") as file:
        assert [line["trial"] for line in csv.DictReader(file)] == ["a", "c"], "once each"
    assert (output / "completep-adam--a.csv").exists()
    with pytest.raises(SystemExit, match="tokens of data"):
        evidence.adopt(former, output, {"train": 6}, list(parts.values()), kept)


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
