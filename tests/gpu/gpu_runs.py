"""What the GPU tests train: a model large enough for the kernels of a real run, small enough for minutes."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.parallel.mesh import Mesh
from tests.runs import config_of, step_of, words

SAMPLES = 8

MODEL = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 512 --swiglu "
    f"--seq-length 128 --global-batch-size {SAMPLES} --micro-batch-size 2 --init-method-std 0.05 --qk-layernorm "
    "--untie-embeddings-and-output-weights --disable-bias-linear --lr 2e-3"
)
COMPLETEP = "--parametrization completep --mup-base-hidden-size 128 --base-num-layers 1"
UMUP = "--parametrization umup --lr 0.1"
MUNIT = "--parametrization munit --norm-position post-branch --residual-tau 0.3 --lr 0.02"
FEATURES = (
    "--hidden-dropout 0.1 --attention-dropout 0.1 --normalization LayerNorm --no-swiglu --no-disable-bias-linear "
    "--position-embedding-type learned_absolute --no-untie-embeddings-and-output-weights --cross-entropy-z-loss 1e-2"
)
EXPERTS = (
    f"{COMPLETEP} --num-experts 4 --moe-ffn-hidden-size 128 --moe-shared-expert-intermediate-size 64 "
    "--moe-aux-loss-coeff 0.01"
)
BF16 = "--bf16 --torch-compile"


def gpu_config(*flags: str, scheme: str = COMPLETEP) -> Config:
    """The GPU tests' model with further flags."""
    return config_of(MODEL, scheme, *flags)


def gpu_words(*flags: str) -> list[str]:
    """The same as a command line."""
    return words(MODEL, COMPLETEP, *flags)


def share(config: Config, mesh: Mesh, number: int) -> dict[str, torch.Tensor]:
    """This rank's samples of a step, in the loader's order, on its device."""
    generator = torch.Generator().manual_seed(number)
    seq, size = config.training.seq_length, config.training.micro_batch_size
    first = torch.randint(0, 101, (SAMPLES, 1), generator=generator)
    tokens = (first + 3 * torch.arange(seq + 1)) % 101
    labels = tokens[:, 1:].clone()
    for sample in range(SAMPLES):
        labels[sample, : (sample * 11 + number) % seq] = -100
    batch = {"tokens": tokens[:, :-1], "labels": labels, "sample_index": torch.arange(SAMPLES) + SAMPLES * number}
    if config.data.reset_attention_mask:
        batch["document_ids"] = (torch.rand(SAMPLES, seq, generator=generator) < 0.05).cumsum(1)
    mine = torch.arange(SAMPLES).view(-1, size)[mesh.dp_rank :: mesh.dp_size].flatten()
    return {name: value[mine].to(mesh.device) for name, value in batch.items()}


def train(config: Config, mesh: Mesh, steps: int = 3) -> dict[str, Any]:
    """Losses and gradient norms of a few steps, and the weights before and after them, on the CPU."""
    step = step_of(config, mesh)
    initial = {main.meta.name: main.value.clone().cpu() for main in step.main.params}
    results = [step(share(config, mesh, number), 1.0) for number in range(steps)]
    step.close()
    return {
        "initial": initial,
        "losses": torch.stack([r.loss for r in results]).cpu(),
        "norms": torch.stack([r.grad_norm for r in results]).cpu(),
        "weights": {main.meta.name: main.value.cpu() for main in step.main.params},
    }


def first_step(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Loss, gradient norm, and gradients of the parameters that this rank's stages have, but for a common factor."""
    step, grads = step_of(config, mesh), {}

    def look(_loss: torch.Tensor, _norm: torch.Tensor) -> bool:
        for main in step.main.params:
            grads[main.meta.name] = main.layout.gather(main.grad.float()).to("cpu", copy=True)
        return True

    found = step(share(config, mesh, 0), 1.0, gate=look)
    return {"loss": found.loss.cpu(), "norm": found.grad_norm.cpu(), "grads": grads}


def train_on_rank(config: Config) -> dict[str, Any]:
    """The same on a rank of a pool of GPUs; without the weights."""
    # Each model compiles anew, or the limit of recompilations would silently make later ones eager.
    torch._dynamo.reset()
    seen = train(config, Mesh.build(config, torch.device("cuda", torch.cuda.current_device())))
    return {name: seen[name] for name in ("losses", "norms")}


def nothing() -> dict[str, Any]:
    """Nothing more to tell of a run."""
    return {}


def meshes_on(place: torch.device) -> Callable[[Config], Mesh]:
    """The mesh of a configuration; one for each layout, since PyTorch 2.11 dies of splitting groups over and over."""
    found: dict[str, Mesh] = {}

    def mesh_of(config: Config) -> Mesh:
        layout = f"{config.parallel} {config.moe.num_experts} {config.optimizer.muon_distributed_mode}"
        if layout not in found:
            found[layout] = Mesh.build(config, place)
        return found[layout]

    return mesh_of


def attempted(name: object, function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns on a rank of a pool, or its error's traceback.

    For several runs in one process group: starting one takes longer than most of them. Where all ends in a hang, stderr
    says which was the last to begin.
    """
    print(f"rank {dist.get_rank()}: {name}", file=sys.stderr, flush=True)
    torch._dynamo.reset()
    try:
        return function(*args)
    except Exception:
        return traceback.format_exc()
    finally:
        gc.collect()


def train_many_on_rank(
    configs: dict[str, Config], device: str = "cuda", more: Callable[[], dict[str, Any]] = nothing
) -> dict[str, dict[str, Any] | str]:
    """Losses and gradient norms of several configurations by name, or an error's text; with what ``more`` finds behind
    each.
    """
    mesh_of = meshes_on(torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device))

    def seen(config: Config) -> dict[str, Any]:
        found = train(config, mesh_of(config))
        return {part: found[part] for part in ("losses", "norms")} | more()

    return {name: attempted(name, seen, config) for name, config in configs.items()}
