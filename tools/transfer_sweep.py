"""Transfer sweep: where does the best learning rate lie at each size, and does it move?

    python tools/transfer_sweep.py --widths 256,512,1024 --axis lr --output sweep --config recipe.yaml [flags]
    python tools/transfer_sweep.py --widths 64,128,256 --telescope --axis lr --axis weight_decay ...

Trains a grid of short runs, the recipe at each size and each value, and keeps every result: started again it goes on,
after an interruption or with more seeds. --axis names one or several settings (lr,muon_lr move together); the grid is
the recipe's value times --spacing^k. Further --axis are whole grids of their own. --workers N trains so many at a time,
several on a GPU where models are too small to fill it; a worker stays, and takes the next trial when it is free. In a
batch array, --worker I --of N runs one share of a round.

Exit code: 0 complete, 1 trials are left, 2 a mistake in the flags.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_mup.config import Config, ConfigError, check_paths, parse_config, to_yaml, validate
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.training.trainer import vocabulary_size
from megatron_mup.transfer.sizes import pin_base, sizes_of
from megatron_mup.transfer.sweep import GridAxis, SweepPlan, curves_of, findings, format_findings, share, wanted
from megatron_mup.transfer.telescope import TelescopePlan, format_levels, telescope
from megatron_mup.transfer.trials import DIVERGED, Results, Trial, configured, digest, work
from megatron_mup.transfer.workers import Job, Workers, places_for, told, visible_gpus

Rounds = Callable[[Mapping[str, float]], list[Trial]]


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags of the tool, and the rest, which are those of `pretrain.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--widths", type=sizes_of, default=(), help="hidden sizes; default: the recipe's")
    parser.add_argument("--depths", type=sizes_of, default=(), help="numbers of layers; default: the recipe's")
    parser.add_argument(
        "--cross", action="store_true", help="widths at the first depth and depths at the first width, not every pair"
    )
    parser.add_argument(
        "--axis",
        action="append",
        metavar="NAMES[:LOW:HIGH[:SPACING]]",
        help="settings to sweep, and the grid points k = LOW..HIGH (default: lr:-3:3)",
    )
    parser.add_argument("--spacing", type=float, default=math.sqrt(2), help="of grids (default: sqrt 2)")
    parser.add_argument("--seeds", type=int, default=1, help="trials at each point around an optimum (default: 1)")
    parser.add_argument("--extend", type=int, default=0, help="points that may be added beyond an edge (default: 0)")
    parser.add_argument("--telescope", action="store_true", help="a smaller and finer grid at each width")
    parser.add_argument("--grow", choices=("heads", "head-dim"), default="heads", help="what grows with the width")
    parser.add_argument("--output", required=True, help="folder of the sweep")
    parser.add_argument("--workers", type=int, help="worker processes, dealt out over the GPUs (default: one per GPU)")
    parser.add_argument("--worker", type=int, help="run only this worker's share of one round (batch arrays)")
    parser.add_argument("--of", type=int, help="number of workers, with --worker")
    parser.add_argument("--minutes", type=float, help="begin no trial that would end later; keep what is done")
    parser.add_argument("--dry-run", action="store_true", help="print the trials of the next round, run none")
    arguments, rest = parser.parse_known_args(argv)
    if (arguments.worker is None) != (arguments.of is None):
        parser.error("--worker and --of go together")
    if arguments.worker is not None and not 0 <= arguments.worker < arguments.of:
        parser.error("--worker counts from 0 to below --of")
    if arguments.workers is not None and arguments.workers < 1:
        parser.error("--workers is at least 1")
    if arguments.spacing <= 1 or arguments.seeds < 1 or arguments.extend < 0:
        parser.error("--spacing must be above 1, --seeds at least 1, --extend at least 0")
    if arguments.telescope and (arguments.seeds > 1 or arguments.extend or len(arguments.depths) > 1):
        parser.error("--telescope takes one depth, one seed and no --extend")
    return arguments, rest


def _axis(recipe: Config, text: str, spacing: float) -> GridAxis:
    names, *grid = text.split(":")
    try:
        low, high = (int(grid[0]), int(grid[1])) if grid else (-3, 3)
        spacing = float(grid[2]) if len(grid) > 2 else spacing
    except (ValueError, IndexError):
        raise ConfigError(f"--axis {text}", "no grid", "write lr, lr:-3:3 or lr,muon_lr:-3:3:1.41") from None
    if low > high or spacing <= 1:
        raise ConfigError(f"--axis {text}", "an empty grid", "LOW is at most HIGH, SPACING above 1")
    return GridAxis.of(recipe, names.replace("-", "_").split(","), spacing, low, high)


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns its exit code."""
    arguments, rest = parse_arguments(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        recipe, plan = _prepare(arguments, rest)
        results = Results(arguments.output, digest(recipe))
        if isinstance(plan, TelescopePlan):
            return _run(arguments, argv, recipe, results, lambda done: telescope(plan, done)[1], _TelescopeReport(plan))
        return _run(arguments, argv, recipe, results, lambda done: wanted(plan, done), _SweepReport(plan))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _prepare(arguments: argparse.Namespace, rest: list[str]) -> tuple[Config, SweepPlan | TelescopePlan]:
    config = parse_config(rest).config
    config = replace(config, model=replace(config.model, vocab_size=vocabulary_size(config)))
    training = config.training
    if training.train_iters is None:
        raise ConfigError("--train-iters", "trials are as long as it says", "give --train-iters, not --train-samples")
    if training.eval_interval is not None:
        config = replace(config, training=replace(training, eval_interval=training.train_iters))
    recipe = pin_base(config)
    axes = [_axis(recipe, text, arguments.spacing) for text in arguments.axis or ["lr"]]
    widths = arguments.widths or (config.model.hidden_size,)
    depths = arguments.depths or (config.model.num_layers,)
    if arguments.telescope:
        plan: SweepPlan | TelescopePlan = TelescopePlan(
            widths=widths, num_layers=depths[0], axes=tuple(axes), seed=training.seed
        )
        sizes = [(width, depths[0]) for width in widths]
    else:
        sizes = [(w, d) for w in widths for d in depths if not arguments.cross or w == widths[0] or d == depths[0]]
        plan = SweepPlan(
            sizes=tuple(sizes),
            axis=axes[0],
            others=tuple(axes[1:]),
            first_seed=training.seed,
            seeds=arguments.seeds,
            extend=arguments.extend,
        )
    values = tuple(value for axis in axes for value in axis.at(axis.low))
    for size in sizes:
        validate(configured(recipe, Trial(*size, values, training.seed), arguments.grow), 1)
    check_paths(recipe)
    return recipe, plan


def _done(results: Results) -> dict[str, float]:
    return {key: math.inf if record["status"] == DIVERGED else record["loss"] for key, record in results.read().items()}


def _run(
    arguments: argparse.Namespace,
    argv: Sequence[str],
    recipe: Config,
    results: Results,
    rounds: Rounds,
    report: Callable[[argparse.Namespace, Mapping[str, float]], None],
) -> int:
    """Round after round until nothing is wanted, time is up, or a round brings nothing new."""
    todo = rounds(_done(results))
    if arguments.dry_run:
        print("\n".join(trial.key for trial in todo), f"{len(todo)} trials", sep="\n")
        return int(bool(todo))
    os.makedirs(arguments.output, exist_ok=True)
    with open(os.path.join(arguments.output, "recipe.yaml"), "w", encoding="utf-8") as file:
        file.write(to_yaml(recipe))
    local = _Local(recipe, results, arguments)
    if arguments.worker is not None:
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        local(share(results.agreed(array, todo) if array else todo, arguments.worker, arguments.of))
        return int(bool(rounds(_done(results))))
    workers = arguments.workers or max(1, len(visible_gpus()))
    if workers > 1:
        _share_out(recipe, results, rounds, arguments, workers)
    else:
        while todo:
            before = len(_done(results))
            left = local(todo)
            todo = rounds(_done(results))
            if left or len(_done(results)) == before:
                break
    report(arguments, _done(results))
    if todo := rounds(_done(results)):
        print(f"{len(todo)} trials of the next round are left; start again to go on")
    return int(bool(todo))


class _Local:
    """Runs trials in this process, which becomes a process group of its own when the first one comes."""

    def __init__(self, recipe: Config, results: Results, arguments: argparse.Namespace) -> None:
        self.recipe, self.results, self.arguments = recipe, results, arguments
        self.mesh: Mesh | None = None

    def __call__(self, trials: list[Trial]) -> int:
        """Runs them; returns how many are left."""
        if not trials:
            return 0
        recipe, arguments = self.recipe, self.arguments
        if self.mesh is None:
            self.mesh = Mesh.build(recipe, init_process_group(recipe, Launch(0, 0, 1)))
        vocab_size = recipe.model.vocab_size
        assert vocab_size is not None
        worker = "worker" if arguments.worker is None else f"worker-{arguments.worker}-of-{arguments.of}"
        return work(trials, recipe, vocab_size, self.mesh, self.results, worker, arguments.grow, arguments.minutes)


def _share_out(recipe: Config, results: Results, rounds: Rounds, arguments: argparse.Namespace, workers: int) -> None:
    """Keeps worker processes busy until nothing is left or time is up."""
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes

    def wanted() -> list[Job]:
        return [Job(recipe, trial, arguments.output, arguments.grow) for trial in rounds(_done(results))]

    def finished(job: Job, record: dict[str, Any]) -> None:
        results.append("workers", record)
        print(told(job, record), flush=True)

    with Workers(places_for(workers)) as pool:
        for record in results.read().values():
            pool.lasted[arguments.output, record["hidden_size"], record["num_layers"]] = record["seconds"]
        pool.run(wanted, finished, deadline)


class _SweepReport:
    """Prints and writes what a sweep found."""

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan

    def __call__(self, arguments: argparse.Namespace, done: Mapping[str, float]) -> None:
        from megatron_mup.transfer.plots import u_curves

        found = findings(self.plan, done)
        if not found:
            return
        text = format_findings(self.plan, found)
        print(text)
        with open(os.path.join(arguments.output, "findings.txt"), "w", encoding="utf-8") as file:
            file.write(text + "\n")
        curves = curves_of(self.plan, done)
        u_curves(
            self.plan, curves, found, os.path.join(arguments.output, "curves.png"), os.path.basename(arguments.output)
        )


class _TelescopeReport:
    """Prints and writes what a telescope found."""

    def __init__(self, plan: TelescopePlan) -> None:
        self.plan = plan

    def __call__(self, arguments: argparse.Namespace, done: Mapping[str, float]) -> None:
        levels, _ = telescope(self.plan, done)
        text = format_levels(self.plan, levels)
        print(text)
        with open(os.path.join(arguments.output, "levels.json"), "w", encoding="utf-8") as file:
            json.dump([vars(level) for level in levels], file, indent=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
