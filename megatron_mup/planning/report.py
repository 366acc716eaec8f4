"""An estimate as a page for people, and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from megatron_mup.config.schedules import SCHEDULES
from megatron_mup.optim.planner import Plan
from megatron_mup.planning.cut import Cut
from megatron_mup.planning.estimate import Estimate
from megatron_mup.planning.hardware import GIB
from megatron_mup.planning.inventory import Inventory, parameters
from megatron_mup.planning.memory import Memory, stage_plan
from megatron_mup.training.flops import flops_per_token

TERMS = {
    "weights": "weights",
    "main": "fp32 main copies",
    "gradients": "gradients",
    "unreduced": "gradients, not reduced yet",
    "state": "optimizer state",
    "activations": "activations",
    "loss": "logits and loss",
    "recomputed": "backward of a layer",
    "gathered": "gathered parameters",
    "reducing": "gradients being reduced",
    "pipeline": "pipeline buffers",
    "update": "optimizer's workspace",
    "libraries": "workspaces of cuBLAS",
}
SHOWN_STAGES = 8


def layout(estimate: Estimate) -> str:
    """A layout in one line, in flags' order."""
    cut, parallel, training = estimate.cut, estimate.config.parallel, estimate.config.training
    parts = [f"tp {cut.tp}", f"pp {cut.pp}", f"dp {cut.dp // cut.context}"]
    parts += [f"cp {cut.context}"] if cut.context > 1 else []
    parts += [f"ep {cut.experts}"] if cut.experts > 1 else []
    parts += [f"etp {cut.expert_tensor}"] if cut.expert_tensor > 1 else []
    if cut.schedule != "1F1B":
        parts.insert(2, f"{cut.schedule} x {len(cut.held[0])} stages")
    if cut.dp > 1:
        parts.append(parallel.sharding + (f" x {cut.replicate} replicas" if 1 < cut.replicate < cut.dp else ""))
    parts.append(f"micro-batch {training.micro_batch_size} x {cut.micro_batches}")
    budget = training.activation_memory_budget if training.torch_compile else 1.0
    parts.append(f"recompute {training.recompute}" if budget == 1 else f"activation memory budget {budget:g}")
    return ", ".join(parts)


def flags(estimate: Estimate) -> str:
    """The flags of a layout."""
    cut, parallel, training = estimate.cut, estimate.config.parallel, estimate.config.training
    words = [f"--tensor-model-parallel-size {cut.tp}"] if cut.tp > 1 else []
    words += ["--sequence-parallel"] if parallel.sequence_parallel else []
    words += [f"--pipeline-model-parallel-size {cut.pp}"] if cut.pp > 1 else []
    schedule, held = cut.schedule, len(cut.held[0])
    words += [f"--pipeline-schedule {schedule}"] if schedule != "1F1B" else []
    if SCHEDULES[schedule].usual != held:
        words.append(f"--num-virtual-stages-per-pipeline-rank {held}")
    words += [f"--data-parallel-sharding-strategy {parallel.sharding}"] if cut.dp > 1 else []
    if parallel.num_distributed_optimizer_instances > 1:
        words.append(f"--num-distributed-optimizer-instances {parallel.num_distributed_optimizer_instances}")
    words.append(f"--micro-batch-size {training.micro_batch_size}")
    words += [f"--recompute-granularity {training.recompute}"] if training.recompute != "none" else []
    return " ".join(words)


def page(estimate: Estimate, inventory: Inventory, vocab_size: int) -> str:
    """The whole estimate, without suggestions."""
    return "\n\n".join(
        [
            _model(estimate, inventory, vocab_size),
            _memory(estimate),
            _speed(estimate),
            _optimizer(estimate, inventory),
            _assumptions(estimate),
        ]
    )


def suggestions(found: Sequence[Estimate], tried: int) -> str:
    """Ranked layouts, with the flags that give them."""
    if not found:
        return f"no layout fits among {tried}: use more GPUs, a smaller model, or --recompute-granularity full"
    lines = [f"layouts that fit, fastest first (of {tried} looked at)"]
    for place, one in enumerate(found, 1):
        lines.append(
            f"{place:>3}. {one.speed.tokens_per_second:>9,.0f} tokens/s/GPU  MFU {one.speed.mfu:5.1%}  "
            f"bubble {one.speed.bubble:5.1%}  {one.reserved / GIB:6.1f} GiB  {layout(one)}"
        )
        lines.append(f"     {flags(one)}")
    return "\n".join(lines)


def as_data(estimate: Estimate, inventory: Inventory) -> dict[str, Any]:
    """The estimate in JSON's types; bytes and seconds."""
    speed = estimate.speed
    return {
        "layout": layout(estimate),
        "flags": flags(estimate),
        "world_size": estimate.cut.world,
        "parameters": parameters(inventory.whole()),
        "memory": {
            str(stage): {name: getattr(memory, name) for name in TERMS} | {"peak": memory.peak}
            for stage, memory in estimate.memory.items()
        },
        "reserved": estimate.reserved,
        "fits": estimate.fits,
        "bubble": speed.bubble,
        "sent": {name: axis.sent for name, axis in speed.axes.items()},
        "seconds_per_step": speed.step,
        "tokens_per_second_per_gpu": speed.tokens_per_second,
        "flops_per_token": speed.flops_per_token,
        "mfu": speed.mfu,
    }


def _model(estimate: Estimate, inventory: Inventory, vocab_size: int) -> str:
    cut, config = estimate.cut, estimate.config
    holdings = inventory.whole()
    total = parameters(holdings)
    embeddings = parameters([(h, 1) for h in inventory.first])
    half, full = (
        flops_per_token(config.model, config.training.seq_length, vocab_size, causal, config.moe)
        for causal in ("half", "full")
    )
    batch = config.global_batch_size(cut.world)
    return "\n".join(
        [
            f"{cut.world:,} x {estimate.hardware.name}: {layout(estimate)}",
            f"parameters      {total:,} ({embeddings:,} of them in embeddings)",
            f"batch           {batch:,} sequences, {batch * config.training.seq_length:,} tokens per step",
            f"FLOP per token  {half:.4g} (causal half of attention), {full:.4g} (all of it)",
        ]
    )


def _memory(estimate: Estimate) -> str:
    stages = _shown(estimate)
    width = max(len(text) for text in TERMS.values())
    lines = [f"memory of the fullest rank of {'each stage' if estimate.cut.pp > 1 else 'all'}, GiB"]
    if estimate.cut.pp > 1:
        lines.append(f"  {'pipeline rank':{width}}" + "".join(f"{stage:>9}" for stage in stages))
    for name, text in TERMS.items():
        values = [getattr(estimate.memory[stage], name) for stage in stages]
        if any(values):
            lines.append(f"  {text:{width}}" + "".join(f"{value / GIB:>9.2f}" for value in values))
    lines.append(f"  {'peak':{width}}" + "".join(f"{estimate.memory[s].peak / GIB:>9.2f}" for s in stages))
    lines.append(f"  {'reached at':{width}}" + "".join(f"{_moment(estimate.memory[s]):>9}"[:10] for s in stages))
    verdict = "fits" if estimate.fits else "DOES NOT FIT"
    lines.append(
        f"  with fragmentation and libraries {estimate.reserved / GIB:.1f} of {estimate.hardware.memory / GIB:.1f} GiB:"
        f" {verdict}"
    )
    return "\n".join(lines)


def _shown(estimate: Estimate) -> list[int]:
    """Stages with a column: all, or the first and last and the fullest of many."""
    stages = sorted(estimate.memory)
    if len(stages) <= SHOWN_STAGES:
        return stages
    half = SHOWN_STAGES // 2
    return sorted({*stages[:half], *stages[-half:], estimate.fullest})


def _moment(memory: Memory) -> str:
    moments = memory.moments
    short = {"reduction": "reduce", "optimizer": "update"}
    name = max(moments, key=moments.__getitem__)
    return short.get(name, name)


def _speed(estimate: Estimate) -> str:
    speed, hardware = estimate.speed, estimate.hardware
    lines = [
        f"expected step   {speed.step:.3g} s, {speed.tokens_per_second:,.0f} tokens/s per GPU, MFU {speed.mfu:.1%}",
        f"micro-batch     {speed.forward_backward * 1e3:.3g} ms of arithmetic, forward and backward, slowest stage",
        f"optimizer       {speed.update * 1e3:.3g} ms",
        f"pipeline bubble {speed.bubble:.1%}" + _bubble_of(estimate.cut),
        "messages of a rank in a step",
    ]
    for name, axis in speed.axes.items():
        taken, exposed = 1e3 * axis.seconds(hardware.latency), 1e3 * axis.exposed(hardware.latency)
        lines.append(
            f"  {name:15} {axis.sent / 1e9:>10.3g} GB at {axis.rate / 1e9:>5.0f} GB/s: "
            f"{taken:>8.4g} ms, {exposed:>8.4g} ms of it exposed"
        )
    if not speed.axes:
        lines.append("  none")
    return "\n".join(lines)


def _bubble_of(cut: Cut) -> str:
    """What the number of the bubble rests on."""
    split = SCHEDULES[cut.schedule].splits_backward
    return ", if forward and either half of backward take equally long" if split else ""


def _optimizer(estimate: Estimate, inventory: Inventory) -> str:
    cut: Cut = estimate.cut
    plans: list[Plan] = [stage_plan(inventory, cut, stage) for stage in sorted({0, cut.pp - 1})]
    lines = [f"optimizer {estimate.config.optimizer.optimizer}"]
    for stage, plan in zip(sorted({0, cut.pp - 1}), plans, strict=True):
        if not plan.assignments:
            return lines[0] + ": elementwise, on shards; nothing is exchanged"
        loads = plan.loads()
        lines.append(
            f"  stage {stage}: {len(plan.assignments)} matrices over {plan.ranks} ranks in {len(plan.chunks)} chunks, "
            f"{2e-12 * sum(loads):.3g} TFLOP; the busiest rank has {2e-12 * max(loads):.3g}, "
            f"{max(loads) * plan.ranks / sum(loads):.3f} times the mean; {sum(x == 0 for x in loads)} ranks are idle"
        )
    return "\n".join(lines)


def _assumptions(estimate: Estimate) -> str:
    hardware = estimate.hardware
    shown = {
        field.name: getattr(hardware, field.name)
        for field in fields(hardware)
        if field.name.endswith("_share") or field.name == "slack"
    }
    return (
        "assumed: "
        + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in shown.items())
        + f"; links {hardware.node_rate / 1e9:g} GB/s in nodes of {hardware.gpus_per_node}, "
        + f"{hardware.network_rate / 1e9:g} GB/s per GPU between them; {hardware.latency * 1e6:g} us per message; "
        + f"{hardware.reserved / GIB:g} GiB for CUDA, NCCL and libraries"
    )
