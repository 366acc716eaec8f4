"""Grids, rounds, optima, drifts, telescopes and proxies, on losses that are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron_mup.config import Config, ConfigError, parse_config, validate
from megatron_mup.parametrization.base import BaseSizes
from megatron_mup.transfer.optimum import Optimum, find_drift, find_optima, find_optimum, levelled
from megatron_mup.transfer.proxy import claims, make_proxy
from megatron_mup.transfer.sizes import pin_base, resize
from megatron_mup.transfer.sweep import GridAxis, SweepPlan, findings, format_findings, share, wanted
from megatron_mup.transfer.telescope import TelescopePlan, format_levels, telescope
from megatron_mup.transfer.trials import DIVERGED, FAILED, FINISHED, Results, Trial, configured, digest

ROOT2 = math.sqrt(2)


def recipe(*flags: str) -> Config:
    return parse_config(" ".join(("--vocab-size 64 --mock-data --train-iters 5", *flags)).split()).config


def axis(low=-3, high=3, spacing=ROOT2, start=1e-2) -> GridAxis:
    return GridAxis(("lr",), (start,), spacing, low, high)


def plan_of(**changes) -> SweepPlan:
    return SweepPlan(**{"sizes": ((64, 2), (128, 2), (256, 2)), "axis": axis(), **changes})


def answer(plan, best, seeds_differ=0.0, limit=200):
    """Plays all rounds with parabolas whose minimum is ``best(trial)`` in log2 of lr; returns losses and rounds."""
    done, rounds = {}, []
    while trials := wanted(plan, done):
        rounds.append(trials)
        for trial in trials:
            x = math.log2(dict(trial.values)["lr"])
            done[trial.key] = (
                3 + 0.1 * (x - best(trial)) ** 2 + seeds_differ * ((trial.seed * 7919 + trial.hidden_size) % 5 - 2)
            )
        assert len(done) < limit
    return done, rounds


def test_a_grid_point_has_one_spelling():
    a = axis()
    assert a.at(0) == (("lr", 0.01),)
    assert a.at(2)[0][1] == 0.02
    assert a.nearest(a.place(3)) == 3
    moved = GridAxis.of(recipe("--lr 3e-3"), ["lr", "muon_lr"], 2, -1, 1)
    assert dict(moved.at(1)) == {"lr": 6e-3, "muon_lr": 6e-3}, "--muon-lr defaults to --lr"
    with pytest.raises(ConfigError, match="no factor moves"):
        GridAxis.of(recipe("--weight-decay 0"), ["weight_decay"], 2, -1, 1)


def curve(losses: dict[float, tuple[float, ...]]) -> dict[float, dict[int, float]]:
    return {x: dict(enumerate(seeds)) for x, seeds in losses.items()}


def test_optimum_of_a_parabola():
    optimum = find_optimum(curve({k / 2: (2 + 0.3 * (k / 2 - 0.8) ** 2,) for k in range(-4, 6)}))
    assert optimum.place == pytest.approx(0.8)
    assert optimum.loss == pytest.approx(2)
    assert optimum.error < 1e-6
    assert (optimum.edge, optimum.problem) == (None, None)


def test_seeds_give_the_error():
    quiet, loud = (
        find_optimum(curve({x: (x * x, x * x + step * (1 + x)) for x in (-1.0, 0.0, 1.0)})) for step in (1e-3, 0.2)
    )
    assert 0 < quiet.error < loud.error
    assert math.isnan(find_optimum(curve({x: (x * x,) for x in (-1.0, 0.0, 1.0)})).error), "nothing is left over"


def test_a_seed_that_is_worse_everywhere_moves_nothing():
    """Each seed is validated on other tokens, and not every seed has run everywhere."""
    losses = {x: {0: 0.1 * (x - 0.2) ** 2} for x in (-1.0, -0.5, 0.0, 0.5, 1.0)}
    for x in (0.0, 0.5, 1.0):
        losses[x][1] = losses[x][0] + 0.5
    assert find_optimum(losses).place == pytest.approx(0.2, abs=1e-6)
    assert levelled(losses)[0.5][1] == pytest.approx(losses[0.5][0])
    plan = plan_of(sizes=((64, 2),), axis=axis(-2, 2), seeds=2)
    done = {plan.trial((64, 2), k, (), s).key: losses[k / 2][s] for k in range(-2, 3) for s in losses[k / 2]}
    left = {(dict(t.values)["lr"], t.seed) for t in wanted(plan, done)}
    assert left == {(plan.axis.at(k)[0][1], plan.first_seed + 1) for k in (-2, -1)}, "around 0, not around -0.5"


def test_a_size_with_one_seed_borrows_the_noise_of_others():
    """At a spacing of 2 the fit has three points, which leave next to nothing over."""
    plan = plan_of(sizes=((64, 2), (128, 2)), seeds=2, axis=axis(-1, 1, 2.0))
    losses = {-1: 2.1, 0: 2.0, 1: 2.1}
    done = {plan.trial(size, k, (), 0).key: loss for size in plan.sizes for k, loss in losses.items()}
    (finding,) = findings(plan, done)
    assert all(math.isnan(optimum.error) for optimum in finding.optima.values())
    text = format_findings(plan, [finding])
    assert "nan" not in text
    assert "±" in text
    assert "--seeds 2" in text
    again = done | {plan.trial((64, 2), k, (), 1).key: loss + 0.02 * (k % 2) for k, loss in losses.items()}
    (finding,) = findings(plan, again)
    assert all(0 < optimum.error < 0.5 for optimum in finding.optima.values())
    assert finding.optima[128].error > finding.optima[64].error, "one seed against two"
    assert "?" not in format_findings(plan, [finding])


def test_edges_and_divergence():
    assert find_optimum(curve({x: (x,) for x in (0.0, 1.0, 2.0)})).edge == "low"
    assert find_optimum(curve({x: (-x,) for x in (0.0, 1.0, 2.0)})).edge == "high"
    bounded = find_optimum(curve({0.0: (3.0,), 1.0: (2.0,), 1.5: (1.9,), 2.0: (2.0, math.inf)}))
    assert bounded.edge is None
    assert 1.0 < bounded.place <= 1.5, "a point at which a seed diverged is none"
    few = find_optimum(curve({0.0: (3.0,), 1.0: (2.0,), 2.0: (math.inf,)}))
    assert (few.place, few.problem) == (1.0, "2 of at least 3 points")
    with pytest.raises(ValueError, match="diverged"):
        find_optimum(curve({0.0: (math.inf,)}))


def test_no_drift_where_a_size_has_no_optimum():
    """A single run, or the end of a grid, is no optimum; neither may make a drift."""
    plan = plan_of(sizes=((64, 2), (128, 2)), axis=axis(-2, 2))
    done, _ = answer(plan_of(sizes=((64, 2),), axis=axis(-2, 2)), lambda _: math.log2(1e-2))
    for more, why in (([-2], "1 of at least 3 points"), (range(-2, 3), "at the low edge of the grid")):
        lost = done | {plan.trial((128, 2), k, (), 0).key: 3.0 + 0.1 * k for k in more}
        (finding,) = findings(plan, lost)
        assert finding.drift is None
        text = format_findings(plan, [finding])
        assert why in text
        assert "no drift: width 128" in text
        assert "per doubling" not in text


def test_errors_cover_the_truth_and_flat_curves_have_no_bias():
    """Skewed curves that grow steeper with the size, with runs as noisy as a real text's at a third of their height."""
    generator = np.random.default_rng(3)
    best, heights, noise = -0.1, (0.03, 0.04, 0.05), 0.01
    places, covered, drifts, drift_covered = [], [], [], []
    for _ in range(60):
        curves: dict[tuple[int, int], dict[float, dict[int, float]]] = {}
        for width, height in zip((256, 512, 1024), heights, strict=True):
            level = generator.normal(0, 0.1, 3)
            curves[width, 4] = {
                x: {
                    seed: 2 * height * (math.exp(x - best) - (x - best) - 1) + level[seed] + generator.normal(0, noise)
                    for seed in range(3)
                }
                for x in (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0)
            }
        optima = find_optima(curves)
        places += [optimum.place - best for optimum in optima.values()]
        covered += [abs(optimum.place - best) <= optimum.error for optimum in optima.values()]
        drift = find_drift({size[0]: optimum for size, optimum in optima.items()}, 0.5)
        assert drift is not None
        drifts.append(drift.per_doubling)
        drift_covered.append(abs(drift.per_doubling) <= drift.error)
    assert abs(np.mean(places)) < 0.05
    assert abs(np.mean(drifts)) < 0.05
    # 68 % is what the error states; of 180 and of 60 cases.
    assert 0.5 < np.mean(covered) < 0.85
    assert 0.5 < np.mean(drift_covered) < 0.9


def test_drift_is_found_and_judged():
    plan = plan_of()
    for shift, verdict in ((0.0, "holds"), (0.1, "holds"), (-1.0, "drifts")):
        best = lambda t, s=shift: math.log2(1e-2) + s * (math.log2(t.hidden_size) - 7)  # noqa: E731
        done, _ = answer(plan_of(extend=3), best)
        (finding,) = findings(plan_of(extend=3), done)
        assert finding.axis == "width"
        assert finding.drift.per_doubling == pytest.approx(shift, abs=0.02)
        assert finding.drift.limit == pytest.approx(0.25)
        assert finding.drift.verdict == verdict
    draws = np.random.default_rng(0).standard_normal((2, 100)) / 2
    noisy = find_drift({w: Optimum(0.0, 2.0, None, 5, draws[w - 1]) for w in (1, 2)}, 0.5)
    assert noisy is not None
    assert noisy.verdict == "undecided"
    assert plan.axis.spacing == ROOT2


def test_rounds_grid_then_edge_then_seeds():
    plan = plan_of(sizes=((64, 2),), extend=2, seeds=3)
    edge = math.log2(1e-2) + 2 + 0.1  # beyond the highest point, 1.5
    done, rounds = answer(plan, lambda _: edge)
    assert [len(r) for r in rounds] == [7, 1, 1, 8], "grid; two points beyond; two more seeds at four points"
    (finding,) = findings(plan, done)
    assert finding.optima[64].edge is None
    assert finding.optima[64].place == pytest.approx(edge, abs=0.02)
    short = plan_of(sizes=((64, 2),))
    done, _ = answer(short, lambda _: edge)
    assert findings(short, done)[0].optima[64].edge == "high", "without --extend it says so"


def test_done_trials_are_not_run_again_and_workers_share():
    plan = plan_of()
    todo = wanted(plan, {})
    assert len(todo) == 21
    assert wanted(plan, {trial.key: 3.0 for trial in todo[:20]}) == todo[20:]
    shares = [share(todo, worker, 4) for worker in range(4)]
    assert sorted(t.key for part in shares for t in part) == sorted(t.key for t in todo)
    loads = [sum(t.hidden_size**2 for t in part) for part in shares]
    assert max(loads) < 1.5 * min(loads)
    assert shares[0][0].hidden_size <= shares[0][-1].hidden_size, "small ones first"


def test_other_axes_have_curves_of_their_own():
    plan = plan_of(sizes=((64, 2), (128, 2)), others=(GridAxis(("weight_decay",), (0.1,), 2, -1, 0),))
    done, _ = answer(plan, lambda t: math.log2(1e-2) + (0.5 if dict(t.values)["weight_decay"] == 0.1 else -0.5))
    found = findings(plan, done)
    assert [dict(f.others)["weight_decay"] for f in found] == [0.05, 0.1]
    assert found[0].optima[64].place == pytest.approx(math.log2(1e-2) - 0.5, abs=0.02)


def test_results_survive_a_torn_line_and_another_recipe(tmp_path):
    results = Results(tmp_path, "abc")
    results.append("a", {"trial": "x", "status": FINISHED, "loss": 1.0})
    with open(tmp_path / "trials" / "a.jsonl", "a") as file:
        file.write('{"trial": "y", "status": "fini')
    results.append("a", {"trial": "z", "status": DIVERGED, "loss": None})
    results.append("b", {"trial": "w", "status": FAILED, "loss": None})
    Results(tmp_path, "other").append("c", {"trial": "v", "status": FINISHED, "loss": 2.0})
    assert set(results.read()) == {"x", "z"}
    assert [json.loads(line)["trial"] for line in (tmp_path / "trials" / "b.jsonl").read_text().splitlines()] == ["w"]


def test_jobs_of_an_array_share_the_round_of_the_first(tmp_path):
    """The second job starts when the first has finished trials."""
    plan, results = plan_of(), Results(tmp_path, "abc")
    todo = wanted(plan, {})
    first = share(results.agreed("job 7", todo), 0, 2)
    later = wanted(plan, {trial.key: 3.0 for trial in first[:5]})
    second = share(Results(tmp_path, "abc").agreed("job 7", later), 1, 2)
    assert sorted([*first, *second]) == sorted(todo)
    assert Results(tmp_path, "abc").agreed("job 8", later) == later
    assert [path.suffix for path in (tmp_path / "rounds").iterdir()] == [".json", ".json"]


def test_the_digest_sees_what_matters():
    base = digest(recipe())
    assert base == digest(recipe("--log-interval 3 --metrics-file x --data-cache-path y"))
    assert base != digest(recipe("--weight-decay 0.2"))


def test_a_trial_sets_its_values():
    config = configured(pin_base(recipe()), Trial(1536, 24, (("lr", 0.5), ("weight_decay", 0.25)), 7))
    assert (config.model.hidden_size, config.model.num_layers, config.model.num_attention_heads) == (1536, 24, 24)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.training.seed) == (0.5, 0.25, 7)


@pytest.mark.parametrize("axes", [1, 2])
def test_telescope(axes):
    grids = (axis(-4, 3, 2.0), GridAxis(("weight_decay",), (0.1,), 2.0, -4, 3))[:axes]
    plan = TelescopePlan(widths=(64, 128, 256), num_layers=2, axes=grids)
    target, done, sizes = (0.1, -0.1), {}, []
    while True:
        levels, missing = telescope(plan, done)
        if not missing:
            break
        sizes.append(len(missing))
        for trial in missing:
            offsets = [math.log2(v / s) for (_, v), s in zip(trial.values, (1e-2, 0.1), strict=False)]
            done[trial.key] = sum((o - t) ** 2 for o, t in zip(offsets, target, strict=False))
    assert sizes == ([8, 3, 3] if axes == 1 else [64, 16, 9])
    assert [level.step for level in levels] == [1.0, 0.5, 0.25]
    winner = levels[-1].winner
    assert all(abs(w - t) <= 0.5 for w, t in zip(winner, target, strict=False))


def test_telescope_does_not_narrow_at_an_edge():
    plan = TelescopePlan(widths=(64, 128, 256), num_layers=2, axes=(axis(-2, 1, 2.0),))
    done = {}
    while True:
        levels, missing = telescope(plan, done)
        if not missing:
            break
        done |= {t.key: (math.log2(t.values[0][1] / 1e-2) - 3) ** 2 for t in missing}
    assert [level.widened for level in levels] == [True, True, False]
    assert [(level.points, level.step) for level in levels] == [(4, 1.0), (4, 1.0), (4, 1.0)]
    assert levels[-1].winner == pytest.approx((3.0,), abs=0.5)
    assert format_levels(plan, levels).count("so the next level is as wide") == 2


def test_a_telescope_that_ends_at_an_edge_says_so():
    plan = TelescopePlan(widths=(64,), num_layers=2, axes=(axis(-2, 1, 2.0),))
    done = {trial.key: -trial.values[0][1] for trial in telescope(plan, {})[1]}
    assert format_levels(plan, telescope(plan, done)[0]).endswith("on the edge of the grid, the optimum lies beyond")


BIG = (
    "--num-layers 24 --hidden-size 2048 --ffn-hidden-size 5504 --num-attention-heads 16 --num-query-groups 4 --swiglu "
    "--optimizer muon --tensor-model-parallel-size 2"
)


def test_a_proxy_keeps_proportions_and_is_its_own_base():
    big = recipe(BIG)
    proxy = make_proxy(big, 4, 4)
    model, rules = proxy.model, proxy.parametrization
    assert (model.num_layers, model.hidden_size, model.ffn_size) == (6, 512, 1376)
    assert (model.num_attention_heads, model.query_groups, model.head_dim) == (4, 1, 128)
    assert rules.parametrization == "completep"
    assert rules.base_num_layers == 6
    base = BaseSizes.of(proxy)
    assert (base.hidden, base.ffn, base.heads, base.head_dim) == (512, 1376, 4, 128)
    assert proxy.parallel.tensor_model_parallel_size == 1
    assert proxy.optimizer == big.optimizer
    told = {claim.what.split()[0].rstrip(","): claim.holds for claim in claims(proxy, big)}
    assert told["muon_lr"] is True
    assert told["train_iters"] is False


@pytest.mark.parametrize(
    ("width", "depth", "flags", "says"),
    [
        (3, 1, "", "--hidden-size 2048: does not divide by 3"),
        (1, 5, "", "--num-layers 24: does not divide by 5"),
        (8, 1, "", "--num-query-groups 4: 4 key/value heads don't divide by 8"),
        (16, 1, "--num-query-groups 16 --ffn-hidden-size 5512", "344.5 is not a multiple of 8"),
    ],
)
def test_a_proxy_is_refused_where_something_does_not_divide(width, depth, flags, says):
    with pytest.raises(ConfigError) as caught:
        make_proxy(recipe(BIG, flags), width, depth)
    assert says in str(caught.value)


def test_a_proxy_may_have_key_value_heads_of_its_own():
    assert make_proxy(recipe(BIG), 8, 4, 2).model.query_groups == 2
    with pytest.raises(ConfigError, match="2 query heads don't divide"):
        make_proxy(recipe(BIG), 8, 4, 3)


def test_resize_leaves_the_base_where_it_is():
    pinned = pin_base(recipe("--parametrization mup --mup-base-hidden-size 384"))
    grown = resize(pinned, 3072, 12, "head-dim")
    assert (grown.model.num_attention_heads, grown.model.head_dim) == (12, 256)
    base = BaseSizes.of(grown)
    assert (base.hidden, base.head_dim, base.heads, base.ffn) == (384, 64, 6, 1536)


def test_a_scheme_without_a_rule_for_depth_has_no_base_depth():
    """munit scaling refuses one, in checks and sweeps too."""
    flags = "--parametrization munit --norm-position post-branch --residual-tau 0.3 --disable-bias-linear"
    pinned = pin_base(recipe(flags, "--untie-embeddings-and-output-weights"))
    validate(resize(pinned, 1536, 12), 1)
    assert pinned.parametrization.base_num_layers is None
    assert pin_base(recipe("--parametrization completep")).parametrization.base_num_layers == 12
