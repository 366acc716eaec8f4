"""Milliseconds of the optimizer's phase in the trainer's step, for several optimizers in one run on one machine.

    python benchmarks/optimizer_step.py [--preset dense-1b] [--optimizers adam,muon,...] [--json OUT] [any flag]

Any flag of `pretrain.py` changes the preset. Started with ``torchrun``, the optimizers run in whatever layout the flags
say. The model takes one short sequence, for the phase doesn't depend on how many there are. Per optimizer:

- ``device ms``: between events on the device, which is kept busy before the phase so that the host runs ahead;
- ``host ms``: what the host needs to launch the phase;
- ``build s``: making model, communicators and optimizer, which compiles the kernels of Newton-Schulz;
- ``start s``: the phase in the first two steps, in which other kernels are compiled and CUDA graphs recorded;
- ``floor ms``: for those that orthonormalize by Newton-Schulz once a step: the FLOPs of the Gram form with symmetric
  products, at 700 TFLOP/s, of one rank's share;
- ``aim ms``: 1.5 times the device time of AdamW for everything, and the floor;
- ``overhead``: more than the first optimizer's device time, as a share of a step of 64 k and of 0.5 M tokens per
  device; the rest of the step is taken as 6 FLOPs per parameter and token at half of the device's peak.

The row ``torch.optim.AdamW`` is PyTorch's fused one on copies of the first optimizer's parameters, in the same process;
``aim by PyTorch ms`` takes its time in the place of ``adam``'s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
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

OPTIMIZERS = "adam,muon,normuon,muonsphere,spectral_sphere,scion,dion"
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


def measure(config: Config, steps: int, device: torch.device) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Builds the trainer's step, warms it up and times the phase; also gives this rank's parameters."""
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
    clock = OptimizerClock(device)
    for _ in range(steps):
        step(batch, 1.0, timer=clock)
    result = clock.medians() | {"build s": built, "start s": sum(start.host)}
    if config.optimizer.optimizer in ONE_ORTHONORMALIZATION:
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


def add_overheads(rows: dict[str, dict[str, float]], config: Config, device: torch.device) -> None:
    """Adds what each optimizer costs over the first one, as a share of whole steps."""
    peak = peak_flops(torch.cuda.get_device_name(device), torch.bfloat16)
    if peak is None:
        return
    params = sum(meta.numel for meta in parameter_metas(config, VOCAB_SIZE) if len(meta.shape) == 2)
    base = next(iter(rows.values()))["device ms"]
    for tokens, name in ((1 << 16, "overhead 64 k"), (1 << 19, "overhead 0.5 M")):
        rest = 6 * params * tokens / (0.5 * peak) * 1e3
        for row in rows.values():
            row[name] = (row["device ms"] - base) / (rest + base)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dense-1b", choices=PRESETS)
    parser.add_argument("--optimizers", default=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", metavar="OUT", help="file to write")
    args, rest = parser.parse_known_args()
    launch = Launch.from_environment()
    flags = [*preset(args.preset), "--no-torch-compile", "--micro-batch-size", "1", "--seq-length", "128", *rest]
    configs = {name: parse_config([*flags, "--optimizer", name]).config for name in args.optimizers.split(",")}
    for config in configs.values():
        validate(config, launch.world_size)
    first = next(iter(configs.values()))
    device = init_process_group(first, launch)
    rows: dict[str, dict[str, float]] = {}
    for name, config in configs.items():
        rows[name], values = measure(config, args.steps, device)
        if name == "adam":
            rows[PYTORCH] = measure_pytorch(values, args.steps, device)
        del values
        if launch.rank == 0:
            print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
    add_aims(rows)
    if device.type == "cuda":
        add_overheads(rows, first, device)
    dist.destroy_process_group()
    if launch.rank == 0:
        report = {
            "command": " ".join(sys.argv),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "rows": rows,
        }
        print(json.dumps(report))
        if args.json:
            with open(args.json, "w") as file:
                json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
