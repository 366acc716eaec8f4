"""Speed of the trainer's own step on one machine: tokens/s, MFU, memory, and the split over phases.

    python benchmarks/train_step.py [--preset dense-1b|dense-1b-hd128|block-8b] [--beside PROGRAM] [--json] [any flag]

Any flag of `pretrain.py` changes the preset, e.g. ``--micro-batch-size 4 --main-params-dtype fp32 --optimizer muon``.
With ``--beside`` another program is run before and after on the same machine with the same preset; it must take
``--preset``, ``--micro-batch-size`` and ``--json`` and print one JSON object with ``tokens_per_s``. Started with
``torchrun``, the step runs in whatever layout the flags say.

FLOPs per token: 6 x (parameters in matrices, output layer included, embedding not) + attention, once with the causal
half (6 x layers x width x seq) and once in full (12 x ...). MFU is against 989 TFLOP/s unless the GPU says otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.config.cli import parse_config
from megatron_mup.config.validate import validate
from megatron_mup.models.build import build_model
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.flops import flops_per_token, peak_flops
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.training.step import TrainStep, untimed

VOCAB_SIZE = 32768
PRESETS = {  # hidden, layers, heads, kv heads, ffn, micro-batch
    "dense-1b": (2048, 16, 32, 8, 8192, 2),
    "dense-1b-hd128": (2048, 16, 16, 8, 8192, 4),
    "block-8b": (4096, 4, 32, 8, 14336, 2),
    "toy": (256, 2, 4, 2, 704, 2),
}


def preset(name: str) -> list[str]:
    """Flags of a preset: an untied Llama, sequence 4096, bf16 everywhere, each layer compiled."""
    hidden, layers, heads, groups, ffn, micro_batch = PRESETS[name]
    return (
        f"--hidden-size {hidden} --num-layers {layers} --num-attention-heads {heads} --num-query-groups {groups} "
        f"--ffn-hidden-size {ffn} --micro-batch-size {micro_batch} --seq-length 4096 --vocab-size {VOCAB_SIZE} "
        "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --bf16 --main-params-dtype bf16 "
        "--torch-compile --clip-grad 0 --mock-data --train-iters 1000 --lr 1e-4 --lr-decay-style constant"
    ).split()


class PhaseClock:
    """Device time of each phase of a step."""

    def __init__(self) -> None:
        self.marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    @contextmanager
    def __call__(self, name: str):
        """Measures what runs inside."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.marks.setdefault(name, []).append((start, end))

    def medians(self) -> dict[str, float]:
        """Median milliseconds by phase; waits for the device."""
        torch.cuda.synchronize()
        return {
            name: round(statistics.median(a.elapsed_time(b) for a, b in pairs), 2) for name, pairs in self.marks.items()
        }


def measure(config: Config, steps: int, device: torch.device) -> dict[str, object]:
    """Builds the trainer's step on this process group, warms it up and times it."""
    mesh = Mesh.build(config, device)
    model = build_model(config, VOCAB_SIZE, mesh)
    step = TrainStep(model, config, mesh)
    step.initialise()
    training = config.training
    samples = config.global_batch_size(dist.get_world_size()) // mesh.dp_size
    tokens = torch.randint(0, VOCAB_SIZE, (samples, training.seq_length), device=device)
    batch = {"tokens": tokens, "labels": tokens}
    for _ in range(4):
        step(batch, 1.0)
    clock = PhaseClock() if device.type == "cuda" else None
    times = []
    for _ in range(steps):
        torch.cuda.synchronize() if clock else None
        start = time.perf_counter()
        step(batch, 1.0, timer=clock or untimed)
        torch.cuda.synchronize() if clock else None
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    per_device = samples * mesh.dp_size * training.seq_length / seconds / dist.get_world_size()
    half, full = (
        flops_per_token(config.model, training.seq_length, VOCAB_SIZE, c, config.moe) for c in ("half", "full")
    )
    peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16) if clock else None
    result: dict[str, object] = {
        "micro_batch_size": training.micro_batch_size,
        "main_params_dtype": training.main_params_dtype,
        "optimizer": config.optimizer.optimizer,
        "ms_per_step": round(seconds * 1e3, 2),
        "tokens_per_s": round(per_device),
        "tflops_causal_half": round(half * per_device / 1e12, 1),
        "tflops_full": round(full * per_device / 1e12, 1),
    }
    if clock and peak:
        result |= {
            "mfu_causal_half": round(half * per_device / peak, 4),
            "mfu_full": round(full * per_device / peak, 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "phases_ms": clock.medians(),
        }
    return result


def run_beside(program: str, name: str, config: Config) -> float:
    """Tokens/s of another program on the same preset and the same optimizer precision."""
    command = [sys.executable, program, "--preset", name, "--micro-batch-size", str(config.training.micro_batch_size)]
    command += ["--json"] + (["--fp32-master"] if config.training.main_params_dtype == "fp32" else [])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_s"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dense-1b", choices=PRESETS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--beside", help="program to measure on the same machine, before and after")
    parser.add_argument("--json", action="store_true")
    args, rest = parser.parse_known_args()
    launch = Launch.from_environment()
    config = parse_config([*preset(args.preset), *rest]).config
    validate(config, launch.world_size)
    beside = [run_beside(args.beside, args.preset, config)] if args.beside else []
    device = init_process_group(config, launch)
    result = {"preset": args.preset} | measure(config, args.steps, device)
    dist.destroy_process_group()
    if args.beside:
        torch.cuda.empty_cache()
        beside.append(run_beside(args.beside, args.preset, config))
        result["beside_tokens_per_s"] = beside
        result["ratio"] = round(result["tokens_per_s"] / max(beside), 4)
    if launch.rank == 0:
        print(json.dumps(result) if args.json else "\n".join(f"{k:20} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
