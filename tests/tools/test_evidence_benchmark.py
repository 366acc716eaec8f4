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

from evidence_plan import FULL, Part, parts_of

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
            assert part.recipe.training.cuda_graph_impl == "local", "the host would be what is measured"
    muon = named["optimizer-muon"]
    for name in ("quintic", "squaring", "polar_express"):
        part = named[f"coefficients-{name}"]
        assert part.recipe.optimizer.coefficient_type == name
        optimizer = replace(part.recipe.optimizer, muon_coefficient_type=None)
        assert replace(part.recipe, optimizer=optimizer) == muon.recipe, "nothing else differs"
        assert {t.values for _, t in part.todo({part.name: {}})} == {muon.plan.trial(FULL.big, 0, (), 0).values}
    assert len({len(range(p.plan.axis.low, p.plan.axis.high + 1)) for p in parts if p.alone}) == 1, "one budget"
    assert len({(p.recipe.training.train_iters, p.recipe.training.global_batch_size) for p in parts if p.alone}) == 1


def parabola(part, sizes, minimum):
    """Losses of all seeds of the plan, with a minimum in units of grid points."""
    grid, seeds = range(part.plan.axis.low, part.plan.axis.high + 1), range(part.plan.seeds)
    return {part.plan.trial(s, k, (), n).key: (k - minimum(s)) ** 2 for s in sizes for k in grid for n in seeds}


def test_the_target_waits_for_its_proxies(planned):
    named = {part.name: part for part in planned[0]}
    target, proxy = named["target-adam"], named["completep-adam"]
    assert proxy.proxies == ((256, 4), (256, 8), (256, 16), (512, 4)), "those of at most 20 M parameters"
    assert target.todo({"target-adam": {}, "completep-adam": {}}) == []
    done = parabola(proxy, proxy.proxies[:-1], lambda size: 0)
    assert target.todo({"target-adam": {}, "completep-adam": done}) == []
    edge = parabola(proxy, proxy.proxies, lambda size: 5 * (size == (512, 4)))
    edge |= {proxy.plan.trial((512, 4), k, (), n).key: (k - 5) ** 2 for k in (3, 4) for n in range(3)}
    assert target.todo({"target-adam": {}, "completep-adam": edge}) == [], "its best may lie beyond the grid"
    # The largest proxy's best is a little above a point, and what is larger doesn't count.
    done = parabola(proxy, proxy.plan.sizes, lambda size: {(512, 4): -0.8, (1024, 4): 1}.get(size, 0))
    todo = target.todo({"target-adam": {}, "completep-adam": done})
    rates = [dict(trial.values)["lr"] for _, trial in todo[:5]]
    assert rates[0] == pytest.approx(dict(proxy.plan.axis.at(-1))["lr"])
    assert len(set(rates)) == 5
    first = target.plan.first_seed
    assert [(dict(t.values)["lr"], t.seed - first) for _, t in todo[5:]] == [(rates[0], 1), (rates[0], 2)]
    urgencies = [urgency for urgency, _ in todo]
    once = {key: loss for key, loss in done.items() if key.endswith(f"-s{first}")}
    assert target.todo({"target-adam": {}, "completep-adam": once}) == [], "one seed tells little"
    seeds = [urgency for urgency, trial in proxy.todo({proxy.name: once}) if trial.seed != first]
    assert urgencies[0] < urgencies[1] < urgencies[5] <= min(seeds), "they are the longest, and can't wait"
    swept = {trial.key: 2 + abs(dict(trial.values)["lr"] - 0.0028) for _, trial in todo[:5]}
    more = target.todo({"target-adam": swept, "completep-adam": done})
    assert sorted((dict(t.values)["lr"], t.seed - first) for _, t in more) == [
        *((0.0028, seed) for seed in (1, 2)),
        *((rates[0], seed) for seed in (1, 2)),
    ], "at the proxy's rate and the best one"
    assert {(trial.hidden_size, trial.num_layers) for _, trial in todo} == {FULL.target}


def test_an_optimizer_repeats_its_best_rate(planned):
    part = next(part for part in planned[0] if part.name == "optimizer-muon")
    done = parabola(part, part.plan.sizes, lambda size: 1)
    beyond = part.plan.trial(FULL.big, 2, (), 0)
    assert [trial for _, trial in part.todo({part.name: done})] == [beyond], "the best may lie beyond the grid"
    done[beyond.key] = 1.0
    todo = [trial for _, trial in part.todo({part.name: done})]
    assert {trial.seed - part.plan.first_seed for trial in todo} == {1, 2}
    assert {dict(trial.values)["muon_lr"] for trial in todo} == {dict(part.plan.axis.at(1))["muon_lr"]}
    done |= {trial.key: 3.0 for trial in todo}
    assert part.todo({part.name: done}) == [], "however much worse another seed is"


def test_tables_compare_runs_of_the_same_seed(planned):
    from evidence_report import coefficients, fp8, target

    def row(part, seed, loss, train):
        return {"part": part, "trial": f"w8-l1-lr=2-s{seed}", "loss": str(loss), "train_loss": str(train)}

    rows = [row("fp8-te-bf16", 1, 2.0, 4.0), row("fp8-te-bf16", 2, 3.0, 5.0)]
    rows += [
        row("fp8-te-delayed", 1, 2.02, 4.0),
        row("fp8-te-delayed", 2, 3.0, 5.1),
        row("fp8-te-delayed", 3, 9.0, 9.0),
    ]
    assert "| te-delayed | 2 | 2.5100 | +0.50 % ± 0.50 % | 4.5500 | +1.00 % ± 1.00 % |" in fp8(rows)
    rows += [row("coefficients-quintic", 1, 1.0, 2.0), row("coefficients-squaring", 1, 1.01, 1.98)]
    assert "| quintic | 1 | 1.0000 |  | 2.0000 |  |\n" in coefficients(rows)
    assert coefficients(rows).endswith("| squaring | 1 | 1.0100 | +1.00 % | 1.9800 | -1.00 % |")
    named = {part.name: part for part in planned[0]}
    part, proxy = named["target-adam"], named["completep-adam"]
    done = parabola(proxy, proxy.plan.sizes, lambda size: 0)
    losses = {part.plan.trial(FULL.target, k, (), s).key: 2.0 + 0.1 * k + s for k in (0, 1) for s in (0, 1)}
    text = target(part, {proxy.name: done, part.name: losses})
    assert "| 0.0056 | 2.0000, 3.0000 | +0.0000 | the proxy says so |" in text
    assert "| 0.00792 | 2.1000, 3.1000 | +0.1000" in text


def test_curves_are_compared_at_the_loss_that_adamw_ends_with(planned, tmp_path):
    from evidence_report import optimizers

    parts = [part for part in planned[0] if part.name in ("optimizer-adam", "optimizer-muon")]
    results = {part.name: parabola(part, part.plan.sizes, lambda size: 1) for part in parts}
    for part, steps, last in ((parts[0], 10, 2.0), (parts[1], 20, 1.0)):
        for k, seed, slower in ((1, 0, 3), (0, 0, 2), (1, 1, 1)):
            # The first two had to share their GPU; the last one, which did the same work, had not.
            trial = part.plan.trial(FULL.big, k, (), seed).key
            lines = [f"{10 * (i + 1)},{i + 1}000000,{last + 19 - i},{(i + 1) * steps * slower}" for i in range(20)]
            (tmp_path / f"{part.name}--{trial}.csv").write_text("\n".join(["iteration,tokens,loss,seconds", *lines]))
            results[part.name] |= {trial: 1.0 - k + seed}
    results["optimizer-muon"] |= {
        parts[1].plan.trial(FULL.big, k, (), seed).key: loss for k, seed, loss in ((2, 0, 5.0), (1, 1, 1.5))
    }
    timed = {(part.name, part.plan.trial(FULL.big, 1, (), 1).key) for part in parts}
    text = optimizers(tmp_path, results, parts, timed)
    assert "| adam | 0.0028: 4.0000, 0.0056: 1.0000, 0.0112: 0.0000 | 0.0112 | 0.0000, 1.0000 |  |" in text
    # A running mean over five points lags by two: AdamW ends at 4.0, and Muon is there a point before its end.
    row = "0.08: 0.0000, 0.16: 5.0000 | 0.08 | 0.0000, 1.5000 | +0.250 ± 0.250 |"
    assert row in text, "rates beyond the grid count; differences are those of the same seeds"
    assert "| 1000.0 | 20.0 M, 20.0 M | 200.0, 200.0 |" in text
    assert "| 2000.0 | 19.0 M, 19.0 M | 380.0, 380.0 |" in text
    assert (tmp_path / "optimizers.png").exists()
    assert text.count("not timed alone") == 0
    text = optimizers(tmp_path, results, parts, {pair for pair in timed if pair[0] == "optimizer-adam"})
    assert "| not timed alone | 19.0 M, 19.0 M | not timed alone |" in text


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
    # After so few steps the highest rate is the best, and a target would wait for ever.
    monkeypatch.setattr(Part, "best_of_proxies", lambda part, done: 0)
    words = ["--toy", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out"), "--seeds", "2"]
    assert evidence.main(["prepare", *words]) == 0
    some = [
        "--parts",
        "completep-adam",
        "target-adam",
        "fp8-umup-s",
        "optimizer-muon",
        "coefficients-squaring",
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
    assert {row["alone"] for row in rows} == {""}, "--alone 0"
    assert evidence.main(["report", *words]) == 0
    assert "target-adam" in (tmp_path / "out" / "evidence.md").read_text()
    assert (tmp_path / "out" / "completep-adam.png").read_bytes().startswith(b"\x89PNG")
    other = ["--parts", "fp8-umup-bf16", "--sizes", "9x9", "--workers", "1", "--alone", "0"]
    for again in (some, other):
        assert evidence.main(["run", *words, *again]) == 0
        with open(tmp_path / "out" / "trials.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(rows), "nothing is run twice, nor what wasn't asked for"
