"""What `evidence.py` trains: the parts of the measurement, their recipes, and in which order.

Every part is a sweep (`megatron_mup.transfer.sweep`), of which some have a single point. Within a part all runs see the
same tokens in the same order of a seed; a run is at most an epoch of the corpus.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_mup.config import Config, ConfigError, parse_config, validate
from megatron_mup.transfer.optimum import find_optima
from megatron_mup.transfer.proxy import parameters
from megatron_mup.transfer.sizes import pin_base
from megatron_mup.transfer.sweep import GridAxis, SweepPlan, curves_of, wanted
from megatron_mup.transfer.trials import Trial, configured

SQRT2 = math.sqrt(2)
PROXY_PARAMETERS = 20e6
"""Of the largest model that the big one's rate may come from."""
COMPILE_SECONDS, FLOPS = 30.0, 400e12
"""What the guess at a trial's length counts with; the first trial of a size replaces it."""
THINNED = 10
"""Steps that a point of a kept curve is the mean of."""
Size = tuple[int, int]
Done = Mapping[str, float]

MODEL = """
--swiglu --disable-bias-linear --untie-embeddings-and-output-weights
--lr-decay-style linear --weight-decay 0.1 --num-workers 2 --eval-interval 1000000
"""
SPEED = "--bf16 --torch-compile --cuda-graph-impl local"
COMPLETEP = "--parametrization completep --qk-layernorm --init-method-std 0.05"
STANDARD = "--parametrization standard --qk-layernorm --init-method-std 0.05"
UMUP = "--parametrization umup --no-norm-affine --weight-decay 1.2e-4"
"""Its decay is a share of the weights in every step, whatever the rate."""
RATES = {
    "adam": ("lr", "--optimizer adam --lr 5.6e-3"),
    "muon": ("muon_lr,lr", "--optimizer muon --muon-lr 4e-2 --lr 1.6e-2"),
    "dion": ("muon_lr,lr", "--optimizer dion --dion-rank-fraction 0.25 --muon-lr 4e-2 --lr 1.6e-2"),
    "sso": ("muon_lr,lr", "--optimizer spectral_sphere --muon-lr 4e-2 --lr 1.6e-2"),
}
"""What each optimizer's axis moves, and the middle of its grid at the base width."""
COEFFICIENTS = ("quintic", "squaring", "polar_express")
"""Of Newton-Schulz, with which Muon is trained at the middle of its grid."""
TE = f"{COMPLETEP} --transformer-impl transformer_engine"
FP8 = {
    "umup-bf16": (UMUP, 2.0),
    "umup-static": (f"{UMUP} --fp8-format hybrid --fp8-recipe static", 2.0),
    "umup-static-critical": (f"{UMUP} --fp8-format hybrid --fp8-recipe static --fp8-critical-bf16", 2.0),
    "te-bf16": (TE, 5.6e-3),
    "te-delayed": (f"{TE} --fp8-format hybrid --fp8-recipe delayed", 5.6e-3),
    "te-tensorwise": (f"{TE} --fp8-format hybrid --fp8-recipe tensorwise", 5.6e-3),
    "te-blockwise": (f"{TE} --fp8-format e4m3 --fp8-recipe blockwise", 5.6e-3),
}
"""Flags and learning rate of the FP8 runs."""
ONE_SEED = "umup-static-critical"
"""The only one of them with one seed, and the last. What eight bits cost is less than what one seed tells."""


@dataclass(frozen=True)
class Scale:
    """Sizes and lengths of all parts.

    Attributes:
        base: the proxy: hidden size, layers, MLP width, heads.
        widths, depths: what grows, at the base's depth and width.
        target: hidden size and layers of the big model.
        big: hidden size and layers of the model on which optimizers, coefficients and FP8 are compared.
        sequence: tokens; of it the four lengths below, in steps of ``batch`` sequences, ``big_batch`` for
            optimizers, ``fp8_batch`` for FP8.
        low, high: grid of CompleteP's sweeps, which may grow by two points at an edge.
    """

    base: tuple[int, int, int, int]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    target: Size
    big: Size
    sequence: int
    batch: int
    big_batch: int
    fp8_batch: int
    steps: int
    optimizer_steps: int
    fp8_steps: int
    evaluations: int
    low: int
    high: int
    speed: str = SPEED


FULL = Scale(
    base=(256, 4, 768, 4),
    widths=(256, 512, 1024),
    depths=(4, 8, 16, 32),
    target=(1024, 22),
    big=(768, 13),
    sequence=512,
    batch=16,
    big_batch=32,
    fp8_batch=16,
    steps=800,
    optimizer_steps=600,
    fp8_steps=2000,
    evaluations=16,
    low=-2,
    high=2,
)
TOY = Scale(
    base=(32, 1, 64, 2),
    widths=(32, 64),
    depths=(1, 2),
    target=(64, 2),
    big=(64, 1),
    sequence=32,
    batch=2,
    big_batch=4,
    fp8_batch=2,
    steps=4,
    optimizer_steps=4,
    fp8_steps=4,
    evaluations=1,
    low=-1,
    high=1,
    speed="",
)


@dataclass(frozen=True)
class Run:
    """Length of a part's runs, and its grid."""

    steps: int
    batch: int
    low: int
    high: int
    spacing: float = SQRT2
    seeds: int = 1
    extend: int = 0


@dataclass(frozen=True)
class Part:
    """A part of the measurement.

    Attributes:
        name: also its folder's.
        recipe: base sizes written out, vocabulary size given.
        plan: sizes, grid, seeds.
        urgency: of the grid; further seeds come 20 later, the neighbours of a proxy's rate 10. The least is done first.
        alone: whether its times count, so that it has a GPU to itself.
        proxy: part whose models of at most ``PROXY_PARAMETERS`` say where the middle of this one's grid is.
        repeats: seeds at the best point alone, and with a proxy at its rate.
    """

    name: str
    recipe: Config
    plan: SweepPlan
    urgency: int
    alone: bool = False
    proxy: Part | None = None
    repeats: int = 1

    def todo(self, results: Mapping[str, Done]) -> list[tuple[int, Trial]]:
        """Trials that are left, with their urgency; none while the proxy's result is open.

        Args:
            results: losses by trial, by part.
        """
        done = results[self.name]
        if self.proxy is not None:
            middle = self.proxy.best_of_proxies(results[self.proxy.name])
            return [] if middle is None else self._around(middle, done)
        trials = wanted(self.plan, done) or self._again(self.plan.reach(), done)
        return [(self._urgency(trial), trial) for trial in trials]

    def _around(self, middle: int, done: Done) -> list[tuple[int, Trial]]:
        """The target's trials: the proxy's rate, its neighbours, then seeds at the proxy's rate and at the best one."""
        (size,), grid = self.plan.sizes, range(middle + self.plan.axis.low, middle + self.plan.axis.high + 1)
        # The farther ones tell more about whether there is a better rate than the nearer ones.
        away = sorted(grid, key=lambda k: -abs(k - middle) if k != middle else -math.inf)
        first = [self.plan.trial(size, k, (), 0) for k in away]
        missing = [(self.urgency + 10 * (n > 0), trial) for n, trial in enumerate(first) if trial.key not in done]
        seeds = self._again(range(middle, middle + 1), done) + ([] if missing else self._again(grid, done))
        return missing + [(self.urgency + 20, trial) for trial in dict.fromkeys(seeds)]

    def _again(self, grid: range, done: Done) -> list[Trial]:
        """Further seeds at the point of a single curve that was best with the first one."""
        if self.repeats == 1:
            return []
        (size,) = self.plan.sizes
        best = min(grid, key=lambda k: done.get(self.plan.trial(size, k, (), 0).key, math.inf))
        trials = [self.plan.trial(size, best, (), seed) for seed in range(1, self.repeats)]
        return [trial for trial in trials if trial.key not in done]

    def _urgency(self, trial: Trial) -> int:
        """The grid at the base size comes first, since others wait for it.

        Further seeds come late, first those of the smallest and the largest sizes, which weigh most in a drift.
        """
        size = (trial.hidden_size, trial.num_layers)
        if trial.seed != self.plan.first_seed:
            ends = [self.base_size, *(max(self.plan.sizes, key=lambda s, i=i: s[i]) for i in (0, 1))]
            return self.urgency + 20 + 2 * (size not in ends)
        return self.urgency - 5 * (size == self.base_size)

    @property
    def base_size(self) -> Size:
        """Hidden size and layers of the recipe."""
        return self.recipe.model.hidden_size, self.recipe.model.num_layers

    def seconds(self, trial: Trial, workers: int) -> float:
        """Guess at how long a trial takes, with what it compiles, on a GPU that so many share."""
        model, training = configured(self.recipe, trial).model, self.recipe.training
        assert model.vocab_size is not None
        assert training.train_iters is not None
        tokens = training.train_iters * training.micro_batch_size * training.seq_length
        return COMPILE_SECONDS + 6 * parameters(model, model.vocab_size) * tokens * workers / FLOPS

    @cached_property
    def proxies(self) -> tuple[Size, ...]:
        """Sizes of at most ``PROXY_PARAMETERS``, the smallest first."""

        def count(size: Size) -> int:
            model = configured(self.recipe, self.plan.trial(size, 0, (), 0)).model
            assert model.vocab_size is not None
            return parameters(model, model.vocab_size)

        return tuple(sorted((size for size in self.plan.sizes if count(size) <= PROXY_PARAMETERS), key=count))

    def best_of_proxies(self, done: Done) -> int | None:
        """Grid point nearest to the optimum of the largest proxy, by a fit to the runs of all proxies and nothing else.

        None while a run of a proxy is missing, of whatever seed, and where the optimum is at the edge of the grid.
        """
        own = replace(self.plan, sizes=self.proxies)
        if wanted(own, done):
            return None
        curves = {size: points for (size, _), points in curves_of(own, done).items()}
        optima = find_optima(
            {size: {own.axis.place(k): losses for k, losses in points.items()} for size, points in curves.items()}
        )
        best = optima[self.proxies[-1]]
        return None if best.problem else own.axis.nearest(best.place)


def recipe_of(scale: Scale, data: list[str], flags: str, steps: int, batch: int) -> Config:
    """A recipe at the base size."""
    hidden, layers, ffn, heads = scale.base
    sizes = f"--hidden-size {hidden} --num-layers {layers} --ffn-hidden-size {ffn} --num-attention-heads {heads}"
    length = f"--train-iters {steps} --lr-warmup-iters {max(1, steps // 10)} --eval-iters {scale.evaluations}"
    batches = f"--seq-length {scale.sequence} --micro-batch-size {batch} --global-batch-size {batch}"
    words = shlex.split(f"{MODEL} {sizes} {length} {batches} {flags} {scale.speed}")
    config = parse_config([*words, *data]).config
    # The one evaluation is at the end.
    return pin_base(replace(config, training=replace(config.training, eval_interval=steps)))


def parts_of(scale: Scale, data: list[str], seeds: int = 3) -> tuple[list[Part], list[str]]:
    """All parts that this version can run, and why others can't.

    Args:
        scale: sizes.
        data: flags that say where the data is, ``--vocab-size`` among them.
        seeds: around each optimum of CompleteP's sweeps, around the proxy's rate, of each optimizer's best rate, of
            each coefficient set, and of the FP8 runs but ``ONE_SEED``.
    """
    base = scale.base[:2]
    widths = [(width, base[1]) for width in scale.widths]
    depths = [(base[0], depth) for depth in scale.depths if depth != base[1]]
    parts: list[Part] = []
    problems: list[str] = []

    def add(name: str, flags: str, axis: str, sizes: list[Size], urgency: int, run: Run, **more: Any) -> None:
        try:
            recipe = recipe_of(scale, data, flags, run.steps, run.batch)
            grid = GridAxis.of(recipe, axis.split(","), run.spacing, run.low, run.high)
            plan = SweepPlan(
                sizes=tuple(sizes), axis=grid, seeds=run.seeds, extend=run.extend, first_seed=recipe.training.seed
            )
            for size in sizes:
                validate(configured(recipe, plan.trial(size, 0, (), 0)), 1)
        except (ConfigError, SystemExit) as error:  # a flag or a choice that this version doesn't have
            problems.append(f"{name}: {str(error)[:200]}")
            return
        parts.append(Part(name, recipe, plan, urgency, **more))

    grid = Run(scale.steps, scale.batch, scale.low, scale.high, seeds=seeds, extend=2)
    for optimizer, urgency in (("adam", 10), ("muon", 11)):
        axis, flags = RATES[optimizer]
        # AdamW's curves are flat, and need more of them.
        run = replace(grid, low=scale.low - 1) if optimizer == "adam" else grid
        add(f"completep-{optimizer}", f"{COMPLETEP} {flags}", axis, widths + depths, urgency, run)
    proxies = {part.name.removeprefix("completep-"): part for part in parts}
    for optimizer, urgency in (("adam", 9), ("muon", 25)):
        axis, flags = RATES[optimizer]
        run, more = Run(scale.steps, scale.batch, -2, 2), {"proxy": proxies[optimizer], "repeats": seeds}
        add(f"target-{optimizer}", f"{COMPLETEP} {flags}", axis, [scale.target], urgency, run, **more)
    for optimizer, urgency in (("adam", 14), ("muon", 50)):
        axis, flags = RATES[optimizer]
        # Its optimum is expected to fall with the width.
        run = replace(grid, low=scale.low - 3, high=scale.high - 1, seeds=1, extend=1)
        add(f"standard-{optimizer}", f"{STANDARD} {flags}", axis, widths, urgency, run)
    for name, (flags, rate) in FP8.items():
        run = Run(scale.fp8_steps, scale.fp8_batch, 0, 0, seeds=1 if name == ONE_SEED else seeds)
        add(f"fp8-{name}", f"{flags} --lr {rate}", "lr", [scale.big], 60 if name == ONE_SEED else 30, run)
    axis, flags = RATES["muon"]
    for name in COEFFICIENTS:
        run = Run(scale.optimizer_steps, scale.big_batch, 0, 0, seeds=seeds)
        add(f"coefficients-{name}", f"{COMPLETEP} {flags} --muon-coefficient-type {name}", axis, [scale.big], 70, run)
    # Whose best rate is at an end of its grid gets more of them.
    three = Run(scale.optimizer_steps, scale.big_batch, -1, 1, spacing=2.0, extend=2)
    for optimizer, (axis, flags) in RATES.items():
        add(f"optimizer-{optimizer}", f"{COMPLETEP} {flags}", axis, [scale.big], 0, three, alone=True, repeats=seeds)
    return parts, problems
