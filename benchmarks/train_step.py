"""Speed of the trainer's own step on one machine: tokens/s, MFU, memory, and the split over phases.

    python benchmarks/train_step.py [--preset NAME] [--beside PROGRAM] [--trace FILE] [--json] [any flag]

Presets: dense-1b, dense-1b-hd128, block-8b, moe-small; ``none`` has no flags of its own, for ``--config recipe.yaml``.
Any flag of `pretrain.py` changes the preset, e.g. ``--micro-batch-size 4 --main-params-dtype fp32 --optimizer muon``.
``--trace`` profiles one more step; open the file in https://ui.perfetto.dev or chrome://tracing.
With ``--beside`` another program is run before and after on the same machine with the same preset; it must take
``--preset``, ``--micro-batch-size`` and ``--json`` and print one JSON object with ``tokens_per_s``. Started with
``torchrun``, the step runs in whatever layout the flags say.

FLOPs per token: 6 x (parameters in matrices, output layer included, embedding not) + attention, once with the causal
half (6 x layers x width x seq) and once in full (12 x ...). MFU is against 989 TFLOP/s unless the GPU says otherwise,
in FP8 too. ``ms_per_step`` is the median of steps that are each waited for, ``ms_in_a_row`` the mean of as many that
follow each other as in a run. Phases are a step's: ``forward`` and ``backward`` are the two parts of
``forward-backward`` in device time (without a pipeline), ``gradients`` is what comes between backward and the
optimizer. On several GPUs ``communication_ms`` is the first rank's time of messages in one more step, ``all`` and
``alone``, while nothing else ran on its GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.config.cli import parse_config
from megatron_mup.config.validate import validate
from megatron_mup.models.build import build_model
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.flops import flops_per_token, peak_flops
from megatron_mup.training.forward_backward import Batch
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.training.precision import settle_attention, settle_fp8
from megatron_mup.training.step import TrainStep
from megatron_mup.training.trainer import vocabulary_size

# The folder of this program is on the path when it is started, the repository's when it is imported.
if __package__:
    from benchmarks.messages import of_a_step
else:
    from messages import of_a_step

VOCAB_SIZE = 32768
DOCUMENT = 4096
"""Mean length of documents, whose ends are random, under ``--reset-attention-mask``."""
WARM_UP = 4
"""Steps that aren't measured: compilers, kernels and communicators start."""
PRESETS = {  # hidden, layers, heads, kv heads, ffn, micro-batch
    "dense-1b": (2048, 16, 32, 8, 8192, 2),
    "dense-1b-hd128": (2048, 16, 16, 8, 8192, 4),
    "block-8b": (4096, 4, 32, 8, 14336, 2),
    "moe-small": (1024, 12, 16, 8, 4096, 4),
    "toy": (256, 2, 4, 2, 704, 2),
}
EXPERTS = {
    "moe-small": (
        "--num-experts 32 --moe-router-topk 4 --moe-ffn-hidden-size 512 --moe-shared-expert-intermediate-size 512"
    )
}
"""What a preset has beside its dense sizes: 0.7 B parameters, of which a token passes 0.2 B."""


def preset(name: str) -> list[str]:
    """Flags of a preset: an untied Llama, sequence 4096, bf16 everywhere, each layer compiled."""
    hidden, layers, heads, groups, ffn, micro_batch = PRESETS[name]
    return (
        f"{EXPERTS.get(name, '')} "
        f"--hidden-size {hidden} --num-layers {layers} --num-attention-heads {heads} --num-query-groups {groups} "
        f"--ffn-hidden-size {ffn} --micro-batch-size {micro_batch} --seq-length 4096 --vocab-size {VOCAB_SIZE} "
        "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --bf16 --main-params-dtype bf16 "
        "--torch-compile --clip-grad 0 --mock-data --train-iters 1000 --lr 1e-4 --lr-decay-style constant"
    ).split()


class PhaseClock:
    """Time of each phase of a step: device time on a GPU, else wall time.

    Args:
        steps: how many steps are measured; a phase may run several times in each.
        device: where they run.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps, self.device = steps, device
        self.marks: dict[str, list[Any]] = {}

    @contextmanager
    def __call__(self, name: str):
        """Measures what runs inside."""
        self.mark(name)
        yield
        self.mark(name)

    def watch(self, model: torch.nn.Module) -> None:
        """Measures the model's own forward as a phase."""
        model.register_forward_pre_hook(lambda *_: self.mark("forward"))
        model.register_forward_hook(lambda *_: self.mark("forward"))

    def mark(self, name: str) -> None:
        """A phase begins, or ends."""
        now: Any = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.setdefault(name, []).append(now)

    def medians(self) -> dict[str, float]:
        """Median milliseconds of a step by phase; waits for the device."""
        on_gpu = self.device.type == "cuda"
        torch.cuda.synchronize() if on_gpu else None
        times = {}
        for name, marks in self.marks.items():
            pairs = zip(marks[::2], marks[1::2], strict=True)
            each = [start.elapsed_time(end) if on_gpu else (end - start) * 1e3 for start, end in pairs]
            count = len(each) // self.steps
            times[name] = statistics.median(sum(each[n : n + count]) for n in range(0, len(each), count))
        if "forward" in times:  # not in a pipeline, which calls its stages by itself
            times["backward"] = times["forward-backward"] - times["forward"]
        return {name: round(value, 2) for name, value in times.items()}


def prepare(config: Config, device: torch.device) -> tuple[TrainStep, Batch]:
    """The trainer's step on this process group, its weights initialised, and this rank's part of a batch for it."""
    mesh, vocab_size = Mesh.build(config, device), vocabulary_size(config)
    step = TrainStep(build_model(config, vocab_size, mesh), config, mesh)
    step.initialise()
    samples = config.global_batch_size(dist.get_world_size()) // mesh.dp_size
    # Ranks that share sequences see the same ones.
    generator, shape = torch.Generator(device).manual_seed(mesh.dp_rank), (samples, config.training.seq_length)
    tokens = torch.randint(0, vocab_size, shape, generator=generator, device=device)
    batch = {"tokens": tokens, "labels": tokens}
    if config.data.reset_attention_mask:
        batch["document_ids"] = (torch.rand(shape, generator=generator, device=device) * DOCUMENT < 1).cumsum(1)
    return step, batch


def measure(config: Config, steps: int, device: torch.device, trace: str | None = None) -> dict[str, object]:
    """Builds the trainer's step on this process group, warms it up and times it; profiles one more into ``trace``."""
    step, batch = prepare(config, device)
    training, vocab_size, samples = config.training, step.model.vocab_size, len(batch["tokens"])
    for _ in range(WARM_UP):
        step(batch, 1.0)
    on_gpu, clock = device.type == "cuda", PhaseClock(steps, device)
    clock.watch(step.model)
    times = []
    for _ in range(steps):
        torch.cuda.synchronize() if on_gpu else None
        start = time.perf_counter()
        step(batch, 1.0, timer=clock)
        torch.cuda.synchronize() if on_gpu else None
        times.append(time.perf_counter() - start)
    phases, start = clock.medians(), time.perf_counter()
    for _ in range(steps):
        step(batch, 1.0)
    torch.cuda.synchronize() if on_gpu else None
    in_a_row = (time.perf_counter() - start) / steps
    talks = on_gpu and dist.get_world_size() > 1
    messages = {"communication_ms": of_a_step(lambda: step(batch, 1.0))} if talks else {}
    if trace:
        with torch.profiler.profile() as profile:
            step(batch, 1.0)
        profile.export_chrome_trace(f"{trace}.{dist.get_rank()}" if dist.get_rank() else trace)
    step.close()
    seconds = statistics.median(times)
    per_device = samples * step.mesh.dp_size * training.seq_length / seconds / dist.get_world_size()
    half, full = (
        flops_per_token(config.model, training.seq_length, vocab_size, c, config.moe) for c in ("half", "full")
    )
    peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16) if on_gpu else None
    result: dict[str, object] = {
        "micro_batch_size": training.micro_batch_size,
        "main_params_dtype": training.main_params_dtype,
        "optimizer": config.optimizer.optimizer,
        "ms_per_step": round(seconds * 1e3, 2),
        "ms_in_a_row": round(in_a_row * 1e3, 2),
        "tokens_per_s": round(per_device),
        "tflops_causal_half": round(half * per_device / 1e12, 1),
        "tflops_full": round(full * per_device / 1e12, 1),
        "phases_ms": phases,
        **messages,
    }
    if peak:
        result |= {
            "mfu_causal_half": round(half * per_device / peak, 4),
            "mfu_full": round(full * per_device / peak, 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
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
    parser.add_argument("--preset", default="dense-1b", choices=[*PRESETS, "none"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--beside", help="program to measure on the same machine, before and after")
    parser.add_argument("--trace", metavar="FILE", help="profile of one more step")
    parser.add_argument("--json", action="store_true")
    args, rest = parser.parse_known_args()
    launch = Launch.from_environment()
    config = parse_config([*([] if args.preset == "none" else preset(args.preset)), *rest]).config
    validate(config, launch.world_size)
    config, _ = settle_fp8(settle_attention(config))
    beside = [run_beside(args.beside, args.preset, config)] if args.beside else []
    device = init_process_group(config, launch)
    result = {"preset": args.preset} | measure(config, args.steps, device, args.trace)
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
