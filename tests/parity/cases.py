"""What the parity tests train, and what they look at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.config.cli import parse_config
from megatron_mup.config.validate import validate
from megatron_mup.layers.loss import IGNORE
from megatron_mup.models.build import build_model
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.step import TrainStep

VOCAB_SIZE = 101
SAMPLES = 8
SEQ_LENGTH = 16
STEPS = 10

MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 64 --swiglu "
    f"--qk-layernorm --seq-length {SEQ_LENGTH} --vocab-size {VOCAB_SIZE} --make-vocab-size-divisible-by 8 "
    f"--micro-batch-size 1 --global-batch-size {SAMPLES} --train-iters 100 --mock-data --init-method-std 0.1 "
    "--lr 5e-3 --muon-lr 0.02 --lr-decay-style constant --muon-ns-dtype fp32"
)
"""Tied, RoPE, RMSNorm, grouped queries, SwiGLU, no dropout."""

FEATURES = (
    "--hidden-dropout 0.1 --attention-dropout 0.1 --normalization LayerNorm --no-swiglu --no-qk-layernorm "
    "--position-embedding-type learned_absolute --untie-embeddings-and-output-weights --cross-entropy-z-loss 1e-2 "
    "--reset-attention-mask --reset-position-ids --eod-token-id 0"
)
"""The other branch of every choice in the model: biases, learned positions, dropout, document masks."""

SCHEMES = {
    "standard": "",
    "mup": "--parametrization mup --mup-base-hidden-size 16 --mup-embedding-mult 2 --mup-output-mult 0.5",
    "completep": "--parametrization completep --mup-base-hidden-size 16 --base-num-layers 2",
}
UNIT_SCALED = {
    "umup": "--parametrization umup --disable-bias-linear --untie-embeddings-and-output-weights --lr 0.1",
    "munit": "--parametrization munit --norm-position post-branch --residual-tau 0.3 --disable-bias-linear",
}
"""Schemes with operations of their own; they run with AdamW, and dropout, over one layout of each axis."""
UNIT_SCALED_LAYOUTS = ("tp2", "tp2-sp", "pp2", "fsdp2")

OPTIMIZERS = {
    "adam": "",
    "muon": "--optimizer muon",
    "normuon": "--optimizer normuon --scalar-optimizer adam_atan2",
    "muonsphere": "--optimizer muonsphere --sphere-retraction dynamic",
    "spectral_sphere": "--optimizer spectral_sphere --scalar-optimizer ademamix",
    "scion": "--optimizer scion --scalar-optimizer lion --scion-radius 5 --scion-output-radius 30",
    "dion": "--optimizer dion --dion-rank-fraction 0.5",
    "switch": "--optimizer muon --optimizer-switch-at 4 --optimizer-switch-carry-state",
    "heads": "--optimizer muon --muon-split-heads --muon-scale-mode spectral",
}
IN_EVERY_SCHEME = ("adam", "muon")
"""The others run with the first scheme that takes them; Scion refuses all but the standard one."""


def combinations() -> list[tuple[str, str]]:
    """Schemes and optimizers, those of every scheme first."""
    every = [(scheme, optimizer) for scheme in SCHEMES for optimizer in IN_EVERY_SCHEME]
    return every + [("standard" if o == "scion" else "mup", o) for o in OPTIMIZERS if o not in IN_EVERY_SCHEME]


@dataclass(frozen=True)
class Case:
    """A layout: number of ranks and flags."""

    ranks: int
    flags: str


FSDP = "--data-parallel-sharding-strategy optim_grads_params"
LAYOUTS = {
    "dp2": Case(2, ""),
    "fsdp2": Case(2, FSDP),
    "hsdp2x2": Case(4, f"{FSDP} --num-distributed-optimizer-instances 2"),
    "tp2": Case(2, "--tensor-model-parallel-size 2"),
    "tp2-sp": Case(2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": Case(2, "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"),
    "tp2-pp2": Case(4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "tp2-fsdp2": Case(4, f"--tensor-model-parallel-size 2 --sequence-parallel {FSDP}"),
    "pp2-fsdp2": Case(4, f"--pipeline-model-parallel-size 2 {FSDP}"),
    "tp2-pp2-dp2": Case(8, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
}


def config_of(*flags: str) -> Config:
    """Configuration of the parity model with further flags."""
    return parse_config(" ".join([MODEL, *flags]).split()).config


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """All samples of a step, learnable, with uneven loss masks and documents that end anywhere."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, VOCAB_SIZE, (SAMPLES, 1), generator=generator)
    tokens = (first + 3 * torch.arange(SEQ_LENGTH + 1)) % VOCAB_SIZE
    labels = tokens[:, 1:].clone()
    for sample in range(SAMPLES):
        labels[sample, : (sample * 5 + step) % SEQ_LENGTH] = IGNORE
    ends = torch.rand(SAMPLES, SEQ_LENGTH, generator=generator) < 0.2
    documents = ends.cumsum(1)
    starts = torch.cat([torch.ones(SAMPLES, 1, dtype=torch.bool), documents[:, 1:] != documents[:, :-1]], 1)
    place = torch.arange(SEQ_LENGTH)
    positions = place - torch.where(starts, place, 0).cummax(1).values
    return {
        "tokens": tokens[:, :-1],
        "labels": labels,
        "document_ids": documents,
        "position_ids": positions,
        "sample_index": torch.arange(SAMPLES) + step * SAMPLES,
    }


def local_batch(config: Config, mesh: Mesh, step: int) -> dict[str, torch.Tensor]:
    """This rank's share of a step, in the loader's order, with the inputs that the flags ask for."""
    size = config.training.micro_batch_size
    mine = torch.arange(SAMPLES).view(-1, size)[mesh.dp_rank :: mesh.dp_size].flatten()
    batch = {name: value[mine] for name, value in global_batch(step).items()}
    if not config.data.reset_attention_mask:
        del batch["document_ids"]
    if not config.data.reset_position_ids:
        del batch["position_ids"]
    return batch


def _whole(step: TrainStep, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Global tensors by name, gathered over ranks and stages; copies of a tied embedding are checked and dropped."""
    mine = {}
    for main in step.main.params:
        mine[main.meta.name] = main.layout.gather(tensors[main.meta.name]).clone()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (mine, {m.meta.name: m.meta.tied_to for m in step.main.params if m.meta.tied_to}))
    whole = {name: value for part, _ in parts for name, value in part.items()}
    for _, tied in parts:
        for copy, original in tied.items():
            torch.testing.assert_close(whole[copy], whole[original], rtol=0, atol=0)
    copies = {copy for _, tied in parts for copy in tied}
    return {name: value for name, value in whole.items() if name not in copies}


def observe(config: Config, steps: int = STEPS) -> dict[str, Any] | None:
    """Trains the parity model on the ranks of the process group.

    Returns:
        On rank 0: ``weights`` (initial) and ``grads`` (first step) by name, ``grad_norm``, ``losses`` of all steps and
        ``eval`` loss after them; in a model with experts ``routing`` of all steps, ``[steps, layers, Tally.size]``.
    """
    validate(config, dist.get_world_size())
    mesh = Mesh.build(config, torch.device("cpu"))
    step = TrainStep(build_model(config, VOCAB_SIZE, mesh), config, mesh)
    step.initialise()
    seen: dict[str, Any] = {"weights": _whole(step, {m.meta.name: m.value for m in step.main.params})}
    batch = local_batch(config, mesh, 0)
    tokens = (global_batch(0)["labels"] != IGNORE).sum().float()
    step.balancing.begin(SAMPLES // config.training.micro_batch_size)
    step.forward_backward(batch, tokens)
    step.main.collect_grads()
    seen["grads"] = _whole(step, {m.meta.name: m.grad for m in step.main.params})
    step.main.zero_grad()
    for router in step.model.routers().values():
        router.reset()
    results = []
    for index in range(steps):
        step.optimizer.advance(index)
        results.append(step(local_batch(config, mesh, index), 1.0))
    seen["losses"] = torch.stack([r.loss for r in results])
    seen["grad_norm"] = results[0].grad_norm
    if results[0].routing is not None:
        seen["routing"] = torch.stack([r.routing for r in results])
    loss, count = step.evaluate(local_batch(config, mesh, steps))
    seen["eval"] = loss / count
    return seen if dist.get_rank() == 0 else None


def with_layout(config: Config, case: Case) -> Config:
    """The configuration in another layout."""
    parallel = parse_config(case.flags.split()).config.parallel
    return replace(config, parallel=parallel)
