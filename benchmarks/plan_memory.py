"""The planner's memory beside the measured one: peak of the fullest rank, and what there is at each moment of a step.

    python benchmarks/plan_memory.py [--only TEXT] [--out FILE]                      # all cases, one after the other
    torchrun --nproc-per-node 2 benchmarks/plan_memory.py --one [--preset NAME] [any flag of pretrain.py]

Presets are those of ``train_step.py``. Peaks are of ``torch.cuda.max_memory_allocated`` since the process started, so
compilation and the first step count; the error is planned over measured. A case needs as many GPUs as its name says;
one that fails is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The folder of this program is on the path when it is started, the repository's when it is imported.
if __package__:
    from benchmarks.train_step import WARM_UP, prepare, preset
else:
    from train_step import WARM_UP, prepare, preset

from megatron_mup.config import Config, parse_config, validate
from megatron_mup.planning.cut import Cut
from megatron_mup.planning.hardware import GIB
from megatron_mup.planning.inventory import Inventory
from megatron_mup.planning.memory import Memory, stage_memory
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.training.trainer import vocabulary_size

FSDP = "--data-parallel-sharding-strategy optim_grads_params"
CASES = {
    "dense-1b, bf16": (1, "--preset dense-1b"),
    "dense-1b, fp32 main, selective, mb 4": (
        1,
        "--preset dense-1b --main-params-dtype fp32 --micro-batch-size 4 --recompute-granularity selective",
    ),
    "block-8b": (1, "--preset block-8b"),
    "dense-1b, fsdp 2": (2, f"--preset dense-1b {FSDP}"),
    "block-8b, tp 2, sp": (2, "--preset block-8b --tensor-model-parallel-size 2 --sequence-parallel"),
    "dense-1b, fp32 main": (1, "--preset dense-1b --main-params-dtype fp32"),
    "dense-1b, full recomputation, mb 4": (1, "--preset dense-1b --micro-batch-size 4 --recompute-granularity full"),
    "dense-1b, fused loss": (1, "--preset dense-1b --cross-entropy-fusion-impl linear"),
    "dense-1b, fsdp 2, fp32 main, 4 micro-batches": (
        2,
        f"--preset dense-1b {FSDP} --main-params-dtype fp32 --global-batch-size 16",
    ),
    "dense-1b, fsdp 2, Muon": (2, f"--preset dense-1b {FSDP} --optimizer muon"),
    "dense-1b, pp 2, 8 micro-batches": (
        2,
        "--preset dense-1b --pipeline-model-parallel-size 2 --global-batch-size 16",
    ),
}
"""GPUs and flags of each; the first five are those that the bar of 10 % is for."""


class PeakClock:
    """Most bytes of tensors in each phase of a step, and those that are there when forward is through."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.peaks: dict[str, int] = {"before": torch.cuda.memory_allocated()}
        model.register_forward_hook(lambda *_: self._forward_ends())

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measures the block as a phase; what forward took doesn't count as backward's."""
        torch.cuda.reset_peak_memory_stats()
        yield
        self._note("backward" if name == "forward-backward" else name, torch.cuda.max_memory_allocated())

    def _forward_ends(self) -> None:
        self._note("forward", torch.cuda.max_memory_allocated())
        self._note("after forward", torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    def _note(self, name: str, value: int) -> None:
        self.peaks[name] = max(value, self.peaks.get(name, 0))


def plan(config: Config, world_size: int) -> list[Memory]:
    """Of each pipeline rank."""
    vocab_size = vocabulary_size(config)
    inventory, cut = Inventory.of(config, vocab_size), Cut.of(config, world_size)
    return [stage_memory(config, inventory, cut, stage, vocab_size) for stage in range(cut.pp)]


def measure(config: Config, device: torch.device) -> list[tuple[int, dict[str, int]]]:
    """Pipeline rank and bytes of each rank: ``peak`` of all since the start, and those of `PeakClock`. Collective."""
    step, batch = prepare(config, device)
    for _ in range(WARM_UP):
        step(batch, 1.0)
    peak, clock = torch.cuda.max_memory_allocated(), PeakClock(step.model)
    step(batch, 1.0, timer=clock)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (step.mesh.rank("pp"), clock.peaks | {"peak": peak}))
    return everyone


def compare(planned: list[Memory], measured: list[tuple[int, dict[str, int]]]) -> dict[str, Any]:
    """Both in GiB: peaks of the fullest ranks and their error; and by pipeline rank what is behind them."""
    stages = []
    for number, memory in enumerate(planned):
        ranks = [found for stage, found in measured if stage == number]
        most = {name: round(max(found[name] for found in ranks) / GIB, 3) for name in ranks[0]}
        plans = {"peak": memory.peak, "static": memory.static, **memory.moments}
        stages.append({"planned": {name: round(v / GIB, 3) for name, v in plans.items()}, "measured": most})
    ours, theirs = (max(stage[kind]["peak"] for stage in stages) for kind in ("planned", "measured"))
    return {"planned": ours, "measured": theirs, "error": ours / theirs - 1, "stages": stages}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| configuration | GPUs | planned, GiB | measured, GiB | error |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if "failed" in row:
            cells = [f"failed: {row['failed']}", "", ""]
        else:
            cells = [f"{row['planned']:.2f}", f"{row['measured']:.2f}", f"{row['error']:+.1%}"]
        lines.append(f"| {' | '.join([name, str(CASES[name][0]), *cells])} |")
    return "\n".join(lines)


def run_one(argv: list[str]) -> None:
    """Measures one configuration on this process group; rank 0 prints a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", action="store_true")
    parser.add_argument("--preset")
    args, rest = parser.parse_known_args(argv)
    launch = Launch.from_environment()
    config = parse_config([*(preset(args.preset) if args.preset else []), *rest]).config
    validate(config, launch.world_size)
    planned = plan(config, launch.world_size)
    device = init_process_group(config, launch)
    found = compare(planned, measure(config, device))
    dist.destroy_process_group()
    if launch.rank == 0:
        print(json.dumps(found))


def run_case(name: str) -> dict[str, Any]:
    """A case in processes of its own."""
    gpus, flags = CASES[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    done = subprocess.run([*command, __file__, "--one", *flags.split()], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        return {"failed": f"exit code {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Runs all cases and prints the table."""
    if "--one" in sys.argv:
        return run_one(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep each case's JSON, one a line")
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for name in CASES:
        if args.only not in name:
            continue
        rows[name] = run_case(name)
        print(table({name: rows[name]}).splitlines()[-1], file=sys.stderr, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({"case": name} | rows[name]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
