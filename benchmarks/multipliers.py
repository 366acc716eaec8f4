"""What muP's factors cost: steps of several parametrizations in turn, in one process, on one device.

    python benchmarks/multipliers.py [--preset dense-1b] [--width-ratio 8] [--rounds 30] [--json] [any flag]

The models are of one shape and lie side by side; each round takes a few steps of every one in a random order, and again
in the reverse one, so that a clock that drifts meets all alike. On a GPU the device's own clock is read between turns,
and nothing waits until the round is over. A row is the median over rounds of a parametrization's time over that of the
standard in the same round, less one, with an interval that holds this median with 95 % (order statistics,
distribution-free). Further flags are `pretrain.py`'s, for all models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from train_step import PRESETS, WARM_UP, prepare, preset

from megatron_mup.config.cli import parse_config
from megatron_mup.config.validate import validate
from megatron_mup.training.launch import Launch, init_process_group

STANDARD = "standard"


def variants(hidden_size: int, num_layers: int, ratio: int) -> dict[str, str]:
    """Flags of each parametrization, of a model ``ratio`` times as wide, and as deep, as its base."""
    width = f"--mup-base-hidden-size {hidden_size // ratio}"
    return {
        STANDARD: "",
        "standard again": "",
        "mup": f"--parametrization mup {width}",
        "completep": f"--parametrization completep {width} --base-num-layers {max(1, num_layers // ratio)}",
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Bounds between which the median of what ``values`` are drawn from lies with 95 %."""
    rank = max(0, math.floor(len(values) / 2 - 0.98 * math.sqrt(len(values))) - 1)
    ordered = sorted(values)
    return ordered[rank], ordered[-1 - rank]


class Timed:
    """One model's step."""

    def __init__(self, flags: list[str], device: torch.device) -> None:
        config = parse_config(flags).config
        validate(config, 1)
        self.step, self.batch = prepare(config, device)

    def take(self, count: int) -> None:
        """Takes so many steps."""
        for _ in range(count):
            self.step(self.batch, 1.0)


def turns(models: dict[str, Timed], order: list[str], steps: int, on_gpu: bool) -> list[float]:
    """Seconds of a step in each turn of ``order``, after one that isn't counted: device time on a GPU, else wall."""

    def now() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    models[order[0]].take(1)
    marks = [now()]
    for name in order:
        models[name].take(steps)
        marks.append(now())
    if not on_gpu:
        return [(after - before) / steps for before, after in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 / steps for before, after in itertools.pairwise(marks)]


def rounds(
    models: dict[str, Timed], count: int, steps: int, on_gpu: bool, deadline: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of a step in each round, by name: mean of its two turns. No round begins after ``deadline``."""
    times: dict[str, list[float]] = {name: [] for name in models}
    draw = random.Random(0)
    for done in range(count):
        if done and time.monotonic() > deadline:
            break
        order = draw.sample(list(models), len(models))
        seconds = turns(models, [*order, *reversed(order)], steps, on_gpu)
        for name, first, second in zip(order, seconds, reversed(seconds), strict=False):
            times[name].append((first + second) / 2)
    return times


def rows(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Costs against the standard, round by round."""
    found = []
    for name, seconds in times.items():
        costs = [mine / theirs - 1 for mine, theirs in zip(seconds, times[STANDARD], strict=True)]
        low, high = interval(costs)
        found.append(
            {
                "parametrization": name,
                "ms_per_step": round(statistics.median(seconds) * 1e3, 3),
                "cost_percent": round(100 * statistics.median(costs), 3),
                "interval_95_percent": [round(100 * low, 3), round(100 * high, 3)],
                "rounds": len(seconds),
                "cost_percent_by_round": [round(100 * cost, 3) for cost in costs],
            }
        )
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dense-1b", choices=PRESETS)
    parser.add_argument("--width-ratio", type=int, default=8)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="beside the standard, e.g. completep; default: all")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=math.inf, help="since the start, after which no round begins")
    parser.add_argument("--steps-per-turn", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    args, rest = parser.parse_known_args()
    deadline = time.monotonic() + args.seconds
    # Each model compiles as it would alone: its factors are constants, though an earlier one had others.
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.automatic_dynamic_shapes = False
    common = [*preset(args.preset), *rest]
    config = parse_config(common).config
    device = init_process_group(config, Launch.from_environment())
    models = {
        name: Timed([*common, *flags.split()], device)
        for name, flags in variants(config.model.hidden_size, config.model.num_layers, args.width_ratio).items()
        if args.only is None or name == STANDARD or name in args.only
    }
    for model in models.values():
        model.take(WARM_UP)
    for row in rows(rounds(models, args.rounds, args.steps_per_turn, device.type == "cuda", deadline)):
        print(json.dumps(row) if args.json else "; ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
