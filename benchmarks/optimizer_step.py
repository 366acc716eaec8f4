"""Milliseconds of the optimizer's phase in the trainer's step, for several optimizers in one run on one machine.

    python benchmarks/optimizer_step.py [--preset dense-1b] [--optimizers adam,muon,...] [--measured-step MS TOKENS]
        [--plan] [--json OUT] [any flag]

`muon:squaring` is Muon with another coefficient set. Any flag of `pretrain.py` changes the preset. Started with
``torchrun``, the optimizers run in whatever layout the flags say. The model takes one short sequence, for the phase
doesn't depend on how many there are. Per optimizer:

- ``device ms``: between events on the device, which is kept busy before the phase so that the host runs ahead;
- ``host ms``: what the host needs to launch the phase;
- ``build s``: making model, communicators and optimizer, which compiles the kernels of Newton-Schulz;
- ``start s``: the phase in the first two steps, in which other kernels are compiled and CUDA graphs recorded;
- ``plan s``: with --plan, what measuring the costs of all shapes takes that ranks balance their work by, none known;
- ``GiB``: the most that was allocated on the device, with the model, after the first three steps;
- ``floor ms``: for those that orthonormalize once a step, by steps of low degree: the FLOPs of the Gram form with
  symmetric products, at 700 TFLOP/s, of one rank's share;
- ``aim ms``: 1.5 times the device time of AdamW for everything, and the floor;
- ``times muon``: device time over Muon's;
- ``overhead``: more than the device time of AdamW (or of the first optimizer), as a share of a step of 64 k and of
  0.5 M tokens per device. The rest of that step follows from --measured-step, the milliseconds of a whole step of
  AdamW's and its tokens (`train_step.py`), and is else taken as 6 FLOPs per parameter and token at half of the
  device's peak.

The row ``torch.optim.AdamW`` is PyTorch's fused one on copies of ``adam``'s parameters, in the same process;
``aim by PyTorch ms`` takes its time in the place of ``adam``'s.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from train_step import PRESETS, VOCAB_SIZE, preset

from megatron_mup.config import Config
from megatron_mup.config.cli import parse_config
from megatron_mup.config.validate import validate
from megatron_mup.models.build import build_model
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.optim.gram import block_lengths
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.flops import peak_flops
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.training.step import TrainStep

OPTIMIZERS = "adam,muon,muon:squaring,normuon,muonsphere,spectral_sphere,scion,dion"
ONE_ORTHONORMALIZATION = ("muon", "normuon", "muonsphere", "scion")
PYTORCH = "torch.optim.AdamW"
FLOOR_RATE = 700e12
BUSY_CYCLES = 100_000_000  # some 50 ms, more than any host needs to launch a step


class OptimizerClock:
    """Device and host time of the phase ``optimizer``, with the device busy before it; all ranks begin together.

    With ``waits`` the device is idle before it, and the host's time includes the device's.
    """

    def __init__(self, device: torch.device, waits: bool = False) -> None:
        self.gpu, self.waits = device.type == "cuda", waits
        self.host: list[float] = []
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.meeting = torch.zeros(1, device=device)

    @contextmanager
    def __call__(self, phase: str):
        """Measures what runs inside."""
        if phase != "optimizer":
            yield
            return
        if self.gpu and self.waits:
            torch.cuda.synchronize()
        elif self.gpu:
            torch.cuda._sleep(BUSY_CYCLES)
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(self.meeting)  # or a rank's time has its waiting for others in it
            events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            events[0].record()
        start = time.perf_counter()
        yield
        if self.gpu and self.waits:
            torch.cuda.synchronize()
        self.host.append(time.perf_counter() - start)
        if self.gpu and not self.waits:
            events[1].record()
            self.events.append(events)

    def medians(self) -> dict[str, float]:
        """Milliseconds; waits for the device."""
        result = {"host ms": statistics.median(self.host) * 1e3}
        if self.gpu:
            torch.cuda.synchronize()
            result["device ms"] = statistics.median(a.elapsed_time(b) for a, b in self.events)
        return result


def gram_flops(step: TrainStep, ranks: int) -> float:
    """FLOPs of orthonormalizing a stage's matrices in Gram space, symmetric products counted half; one rank's share."""
    matrix = step.optimizer._matrix
    settings, total = matrix.settings, 0.0
    lengths = block_lengths(settings.coefficients, settings.num_ns_steps)
    for assignment in matrix.plan.assignments:
        rows, columns = assignment.meta.shape
        for block in matrix._blocks[assignment.meta.name]:
            count, height = block.matrices(rows)
            short, long = sorted((height, columns))
            # Per block of steps R and its application; per step four products, but in the last two less, in the
            # first one less.
            total += count * sum(3 * short**2 * long + (4 * n - 3) * short**3 for n in lengths)
    return total / ranks


def planning(step: TrainStep) -> float:
    """Seconds of measuring what a step on each shape costs, with no file that knows of it."""
    matrix, known = step.optimizer._matrix, os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        dist.all_reduce(torch.zeros(1, device=matrix._exchange.device))  # all ranks begin together, with communicators
        begin = time.perf_counter()
        matrix._measured([assignment.meta for assignment in matrix.plan.assignments])
        seconds = time.perf_counter() - begin
    del os.environ["XDG_CACHE_HOME"]
    os.environ |= {} if known is None else {"XDG_CACHE_HOME": known}
    return seconds


def measure(
    config: Config, steps: int, device: torch.device, plan: bool = False
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Builds the trainer's step, warms it up and times the phase; also gives this rank's parameters.

    Args:
        config: with the optimizer.
        steps: timed ones.
        device: where.
        plan: whether to time the measuring of costs as well.
    """
    gc.collect()  # what the one before has left
    if device.type == "cuda":
        torch.cuda.empty_cache()
    begin = time.perf_counter()
    mesh = Mesh.build(config, device)
    step = TrainStep(build_model(config, VOCAB_SIZE, mesh), config, mesh)
    built = time.perf_counter() - begin
    step.initialise()
    samples = config.global_batch_size(dist.get_world_size()) // mesh.dp_size
    tokens = torch.randint(0, VOCAB_SIZE, (samples, config.training.seq_length), device=device)
    batch = {"tokens": tokens, "labels": tokens}
    start = OptimizerClock(device, waits=True)
    for _ in range(2):
        step(batch, 1.0, timer=start)
    step(batch, 1.0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = OptimizerClock(device)
    for _ in range(steps):
        step(batch, 1.0, timer=clock)
    result = clock.medians() | {"build s": built, "start s": sum(start.host)}
    if device.type == "cuda":
        result["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        if plan and step.optimizer.matrix_plan.assignments:
            result["plan s"] = planning(step)
    if config.optimizer.optimizer in ONE_ORTHONORMALIZATION and config.optimizer.coefficient_type != "squaring":
        result["floor ms"] = gram_flops(step, dist.get_world_size(mesh.matrix_group)) / FLOOR_RATE * 1e3
    return result, [param.value for param in step.main.params]


def measure_pytorch(values: Iterable[torch.Tensor], steps: int, device: torch.device) -> dict[str, float]:
    """Times PyTorch's fused AdamW on copies of these tensors."""
    params = [torch.nn.Parameter(value.detach().clone()) for value in values]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW(params, fused=True)
    for _ in range(2):
        optimizer.step()
    clock = OptimizerClock(device)
    for _ in range(steps):
        with clock("optimizer"):
            optimizer.step()
    return clock.medians()


def add_aims(rows: dict[str, dict[str, float]]) -> None:
    """Adds what a step may take, by either AdamW, where there are a floor and device times."""
    for base, name in (("adam", "aim ms"), (PYTORCH, "aim by PyTorch ms")):
        time = rows.get(base, {}).get("device ms")
        for row in rows.values():
            if time is not None and "floor ms" in row:
                row[name] = 1.5 * time + row["floor ms"]


def ms_per_token(config: Config, device: torch.device) -> float | None:
    """Guess at the rest of a step, per token."""
    peak = peak_flops(torch.cuda.get_device_name(device), torch.bfloat16)
    params = sum(meta.numel for meta in parameter_metas(config, VOCAB_SIZE) if len(meta.shape) == 2)
    return 6 * params / (0.5 * peak) * 1e3 if peak else None


def add_ratios(rows: dict[str, dict[str, float]], measured: tuple[float, float] | None, guess: float | None) -> None:
    """Adds what each optimizer costs over AdamW or else the first one, as a share of whole steps, and over Muon.

    Args:
        rows: with device times.
        measured: milliseconds of a whole step with the base's optimizer, and its tokens.
        guess: milliseconds per token of all but the optimizer, where no step was measured.
    """
    base = rows.get("adam", next(iter(rows.values())))["device ms"]
    rest = (measured[0] - base) / measured[1] if measured else guess
    for row in rows.values():
        if "muon" in rows:
            row["times muon"] = row["device ms"] / rows["muon"]["device ms"]
        if rest is not None:
            for tokens, name in ((1 << 16, "overhead 64 k"), (1 << 19, "overhead 0.5 M")):
                row[name] = (row["device ms"] - base) / (rest * tokens + base)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dense-1b", choices=PRESETS)
    parser.add_argument("--optimizers", default=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--measured-step", type=float, nargs=2, metavar=("MS", "TOKENS"), help="of AdamW's, whole")
    parser.add_argument("--plan", action="store_true", help="time the measuring of the plan's costs, too")
    parser.add_argument("--json", metavar="OUT", help="file to write")
    args, rest = parser.parse_known_args()
    launch = Launch.from_environment()
    flags = [*preset(args.preset), "--no-torch-compile", "--micro-batch-size", "1", "--seq-length", "128", *rest]
    configs = {}
    for entry in args.optimizers.split(","):
        name, _, coefficients = entry.partition(":")
        kind = ["--muon-coefficient-type", coefficients] if coefficients else []
        configs[entry] = parse_config([*flags, "--optimizer", name, *kind]).config
        validate(configs[entry], launch.world_size)
    first = next(iter(configs.values()))
    device = init_process_group(first, launch)
    report: dict[str, object] = {
        "command": " ".join(sys.argv),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    rows: dict[str, dict[str, float]] = {}
    for name, config in configs.items():
        rows[name], values = measure(config, args.steps, device, args.plan)
        if name == "adam":
            rows[PYTORCH] = measure_pytorch(values, args.steps, device)
        del values
        add_aims(rows)
        if device.type == "cuda":
            add_ratios(rows, args.measured_step, ms_per_token(first, device))
        if launch.rank == 0:
            print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
            if args.json:  # as far as it got
                with open(args.json, "w") as file:
                    json.dump(report | {"rows": rows}, file, indent=1)
    dist.destroy_process_group()
    if launch.rank == 0:
        print(json.dumps(report | {"rows": rows}))


if __name__ == "__main__":
    main()
