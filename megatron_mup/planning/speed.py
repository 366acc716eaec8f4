"""Time of a step: arithmetic, memory traffic and messages, by a simple model whose assumptions are `Hardware`'s."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_mup.config import Config
from megatron_mup.optim.dion import rank_of
from megatron_mup.planning.activations import layer_bytes
from megatron_mup.planning.cut import Cut
from megatron_mup.planning.hardware import Hardware
from megatron_mup.planning.inventory import Inventory
from megatron_mup.planning.memory import (
    budgeted_bytes,
    bytes_by_layer,
    is_budgeted,
    local_elements,
    model_parallel_elements,
    stage_holdings,
)
from megatron_mup.training.flops import active_width, flops_per_token

FP32 = 4
BLOCKING = ("tensor", "context", "experts", "expert tensor", "pipeline")
"""Axes whose messages belong to each micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Messages of one rank along one axis in a step.

    Attributes:
        sent: bytes that a rank sends.
        rate: bytes/s that it sends them at.
        messages: collectives or transfers.
        hidden: seconds of arithmetic that they can run beside.
    """

    sent: float
    rate: float
    messages: float
    hidden: float

    def seconds(self, latency: float) -> float:
        """Time on the link."""
        return self.sent / self.rate + self.messages * latency if self.sent else 0.0

    def exposed(self, latency: float) -> float:
        """Time that nothing else runs beside."""
        return max(0.0, self.seconds(latency) - self.hidden)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A step of the slowest stage.

    Attributes:
        forward_backward: seconds of arithmetic of one micro-batch there.
        update: seconds of the optimizer.
        bubble: share of forward and backward that a stage waits in.
        axes: messages by axis.
        step: seconds of the step.
        tokens_per_second: of one GPU.
        flops_per_token: as published tables count, causal half of attention.
        mfu: share of the peak, of those FLOPs.
    """

    forward_backward: float
    update: float
    bubble: float
    axes: dict[str, Axis]
    step: float
    tokens_per_second: float
    flops_per_token: float
    mfu: float


def stage_seconds(config: Config, cut: Cut, stage: int, vocab_size: int, hardware: Hardware) -> float:
    """Seconds of arithmetic that a stage takes for forward and backward of one micro-batch."""
    model = config.model
    layers, last = cut.layers(stage), cut.has_last(stage)
    weights = [_layer_weights(config, layer) for part in cut.parts(stage) for layer in range(*part)]
    products = 3 * 2 * (sum(weights) + last * model.hidden_size * vocab_size)
    # Half of the pairs count. Of products as wide as a query forward takes one, backward three; as a value one and two.
    widths = 4 * model.head_dim + 3 * model.value_dim
    pairs = 2 / 2 * model.num_attention_heads * widths * config.training.seq_length * layers
    again = _recomputed_share(config, cut, stage)
    products += 2 * sum(weight * share for weight, share in zip(weights, again, strict=True))
    pairs *= 1 + 2 / 7 * sum(again) / max(1, layers)
    peak = hardware.peak(cut.compute)
    matmul = products * cut.tokens / cut.tp / (peak * hardware.matmul_share)
    attention = pairs * cut.tokens / cut.tp / (peak * hardware.attention_share)
    # Elementwise work writes what it keeps and reads it again, in both directions.
    elementwise_again = config.training.recompute == "selective" or is_budgeted(config)
    passes = (3 if config.training.torch_compile else 6) + elementwise_again
    moved = passes * sum(bytes_by_layer(config, cut, stage, "all"))
    if last:
        moved += cut.tokens * vocab_size / cut.tp * (3 * FP32 + 4 * cut.compute.itemsize)
    return matmul + attention + moved / (hardware.memory_rate * hardware.memory_share)


def _layer_weights(config: Config, layer: int) -> float:
    """Elements of a layer's matrices, whole; of experts, those that a token passes."""
    model, moe = config.model, config.moe
    width = (3 if model.swiglu else 2) * model.ffn_size
    if moe.layers(model.num_layers)[layer]:
        width = active_width(model, moe)
    return model.attention_weights + model.hidden_size * width


def _recomputed_share(config: Config, cut: Cut, stage: int) -> list[float]:
    """Of each layer's products and attention, how much backward takes again; under a memory budget as if each byte cost
    the same time."""
    training, layers = config.training, cut.layers(stage)
    if training.recompute == "full":
        again = min(layers, training.recompute_num_layers) if training.recompute_method == "block" else layers
        return [1.0] * again + [0.0] * (layers - again)
    if not is_budgeted(config):
        return [0.0] * layers
    everything, products = (bytes_by_layer(config, cut, stage, kind) for kind in ("all", "products"))
    through, budget = layer_bytes(config, cut, "input"), training.activation_memory_budget
    return [
        (few - budgeted_bytes(budget, whole, few, through)) / (few - through)
        for whole, few in zip(everything, products, strict=True)
    ]


def update_seconds(config: Config, inventory: Inventory, cut: Cut, hardware: Hardware) -> float:
    """Seconds of the optimizer's step on the first stage: memory traffic of state, and orthonormalization."""
    moved, cost = 0.0, 0.0
    copies = cut.dp == 1 and cut.compute != cut.main
    costliest = 0.0
    for holding, count in stage_holdings(inventory, cut, 0):
        own = count * local_elements(holding.meta, cut)
        # Weight and state are read and written, the gradient is read, for its norm too; then the copy is written.
        moved += own * (2 * cut.main.itemsize + 2 * holding.on_shards + 2 * (FP32 if copies else cut.main.itemsize))
        moved += own * (cut.main.itemsize + cut.compute.itemsize) if copies else 0
        if holding.cost is not None:
            cost += count * holding.cost
            costliest = max(costliest, holding.cost / (holding.meta.experts or 1))
    busiest = max(costliest, cost / cut.homes)
    precision = torch.float32 if config.optimizer.muon_ns_dtype == "fp32" else torch.bfloat16
    return moved / (hardware.memory_rate * hardware.memory_share) + 2 * busiest / (
        hardware.peak(precision) * hardware.matmul_share
    )


def link_rate(hardware: Hardware, size: int, stride: int) -> float:
    """Bytes/s at which each of ``size`` ranks, ``stride`` apart, sends around a ring.

    A ring that leaves a node goes through the network ports of all its members there.
    """
    node = hardware.gpus_per_node
    if size * stride <= node:
        return hardware.node_rate * hardware.link_share
    members = max(1, node // stride)
    return min(hardware.node_rate, hardware.network_rate * members) * hardware.link_share


def traffic(config: Config, inventory: Inventory, cut: Cut, hardware: Hardware, compute: float) -> dict[str, Axis]:
    """Messages of a rank of the first stage along each axis that has several ranks.

    Args:
        config: the run's configuration.
        inventory: the model.
        cut: how ranks share it.
        hardware: links.
        compute: seconds of forward and backward of one micro-batch.
    """
    size, layers = cut.compute.itemsize, cut.layers(0)
    stream = cut.tokens * config.model.hidden_size * size
    holdings = stage_holdings(inventory, cut, 0)
    # Experts', and all others, with the ranks that share each.
    shared = [
        (
            sum(c * model_parallel_elements(h.meta, cut) for h, c in holdings if (h.meta.experts is not None) == kind),
            *by,
        )
        for kind, by in ((False, (cut.shard, cut.replicate)), (True, (cut.expert_shard, cut.expert_replicate)))
    ]
    reduce = 2 if config.parallel.grad_reduce_in_bf16 else FP32
    found: dict[str, Axis] = {}
    if cut.tp > 1:
        # Each branch gathers and scatters once in each direction: with sequence parallelism as such, else as a sum.
        collectives = (8 + 4 * (config.training.recompute == "full")) * layers + 2
        found["tensor"] = Axis(
            sent=collectives * stream * (cut.tp - 1) / cut.tp * cut.micro_batches,
            rate=link_rate(hardware, cut.tp, 1),
            messages=collectives * cut.micro_batches,
            hidden=0.0,
        )
    if cut.context > 1:
        found["context"] = _context_traffic(config, cut, hardware)
    if cut.experts > 1:
        found["experts"] = _expert_traffic(config, cut, hardware, cut.experts, cut.expert_tensor)
    if cut.expert_tensor > 1:
        # Each rank's rows go to all others, not to one of them.
        part = _expert_traffic(config, cut, hardware, cut.expert_tensor, 1)
        found["expert tensor"] = replace(part, sent=part.sent * cut.expert_tensor)
    if cut.shard > 1:
        gathers = 1 if cut.keeps_gathered else 2 * cut.micro_batches
        if cut.pp > 1 and not cut.keeps_gathered:
            gathers = cut.micro_batches + 1
        others = sum(elements * (shard - 1) / shard for elements, shard, _ in shared)
        # What a step's last backward reduces, and gathers, runs beside arithmetic.
        beside = compute * (cut.micro_batches if gathers > 1 else 1)
        found["data, sharded"] = Axis(
            sent=others * (gathers * size + reduce),
            rate=link_rate(hardware, cut.shard, cut.tp),
            messages=(gathers + 1) * (layers + 1),
            hidden=0.8 * beside,
        )
    if max(cut.replicate, cut.expert_replicate) > 1:
        summed = sum(elements / shard * (copies - 1) / copies for elements, shard, copies in shared)
        if cut.homes < cut.tp * cut.dp:
            # The gradients of matrices stay where they are; in their place go factors, see below.
            summed -= _orthonormalized(inventory, cut) / cut.homes * (cut.replicate - 1) / cut.replicate
        found["data, replicas"] = Axis(
            sent=2 * summed * reduce,
            rate=link_rate(hardware, cut.replicate, cut.tp * cut.shard),
            messages=layers + 1,
            hidden=0.8 * compute * 2 / 3,
        )
    if cut.pp > 1:
        found["pipeline"] = Axis(
            sent=2 * len(cut.held[0]) * cut.micro_batches * stream / cut.sequence,
            rate=link_rate(hardware, 2, cut.tp * cut.dp) if cut.world > hardware.gpus_per_node else hardware.node_rate,
            messages=2 * len(cut.held[0]) * cut.micro_batches,
            hidden=0.0,
        )
    travels = FP32 if config.optimizer.muon_ns_dtype == "fp32" else 2
    moved, ranks = 2 * _orthonormalized(inventory, cut) * travels, cut.homes
    if ranks < cut.tp * cut.dp:
        factors = _factors(config, inventory, cut) / ranks * travels
        found["factors"] = Axis(
            sent=2 * factors * (cut.replicate - 1) / cut.replicate,
            rate=link_rate(hardware, cut.replicate, cut.tp * cut.shard),
            messages=2,
            hidden=0.0,
        )
    if moved and ranks > 1:
        found["optimizer"] = Axis(
            sent=moved / ranks * (ranks - 1) / ranks, rate=link_rate(hardware, ranks, 1), messages=2, hidden=0.0
        )
    return found


def _context_traffic(config: Config, cut: Cut, hardware: Hardware) -> Axis:
    """Keys and values of the others, and their gradients on the way home."""
    model, training, size = config.model, config.training, cut.compute.itemsize
    keys = model.num_attention_heads if model.multi_latent_attention else model.query_groups
    pair = cut.tokens * keys // cut.tp * (model.head_dim + model.value_dim)
    forwards, layers = 1 + (training.recompute == "full"), cut.layers(0)
    if config.parallel.cp_comm_type == "all_gather":
        # Gathered; and what comes back is a reduce-scatter of as much.
        sent, messages, hidden = pair * size * (cut.context - 1) * (forwards + 1), forwards + 1, 0.0
    else:
        # Backward they go around once more, and then gradients in fp32, once more than that to be home.
        sent = pair * (size * (cut.context - 1) * (forwards + 1) + FP32 * cut.context)
        messages = (cut.context - 1) * (forwards + 1) + cut.context
        pairs = model.num_attention_heads * (4 * model.head_dim + 3 * model.value_dim) * training.seq_length
        peak = hardware.peak(cut.compute) * hardware.attention_share
        # A rank's own part runs beside the first message, and nothing beside the last.
        beside = (cut.context - 1) / cut.context
        hidden = beside * pairs * cut.tokens / cut.tp / peak * layers * cut.micro_batches
    passes = layers * cut.micro_batches
    # Context ranks are neighbours but for tensor ranks.
    rate = link_rate(hardware, cut.context, cut.tp)
    return Axis(sent=sent * passes, rate=rate, messages=messages * passes, hidden=hidden)


def _expert_traffic(config: Config, cut: Cut, hardware: Hardware, ranks: int, stride: int) -> Axis:
    """Tokens to their experts and back, in both directions, if all of ``ranks``, ``stride`` apart, get as many."""
    rows = cut.tokens // cut.sequence * config.moe.moe_router_topk
    layers = sum(config.moe.layers(config.model.num_layers)[layer] for part in cut.parts(0) for layer in range(*part))
    passes = layers * cut.micro_batches * (4 + 2 * (config.training.recompute == "full"))
    sent = rows * config.model.hidden_size * cut.compute.itemsize * (ranks - 1) / ranks
    return Axis(sent=sent * passes, rate=link_rate(hardware, ranks, stride), messages=passes, hidden=0.0)


def _factors(config: Config, inventory: Inventory, cut: Cut) -> float:
    """Elements of Dion's factors of all matrices of the first stage."""
    fraction, total = config.optimizer.dion_rank_fraction, 0
    for holding, count in stage_holdings(inventory, cut, 0):
        if holding.cost is not None:
            rows, columns = holding.meta.shape
            blocks = [block.matrices(rows) for block in holding.meta.blocks] or [(1, rows)]
            total += count * sum(many * (out + columns) * rank_of(fraction, out, columns) for many, out in blocks)
    return float(total)


def _orthonormalized(inventory: Inventory, cut: Cut) -> float:
    return float(sum(h.meta.numel * count for h, count in stage_holdings(inventory, cut, 0) if h.cost is not None))


def estimate_speed(config: Config, inventory: Inventory, cut: Cut, vocab_size: int, hardware: Hardware) -> Speed:
    """Time of a step.

    Args:
        config: the run's configuration.
        inventory: the model.
        cut: how ranks share it.
        vocab_size: number of token ids.
        hardware: what it runs on.
    """
    # Stages in between are alike but for their number of layers.
    compute = max(stage_seconds(config, cut, stage, vocab_size, hardware) for stage in _different(cut))
    axes = traffic(config, inventory, cut, hardware, compute)
    update = update_seconds(config, inventory, cut, hardware)
    blocking = sum(axes[name].exposed(hardware.latency) for name in BLOCKING if name in axes)
    micro_batch = compute + blocking / cut.micro_batches
    rest = sum(axis.exposed(hardware.latency) for name, axis in axes.items() if name not in BLOCKING)
    step = (cut.micro_batches + cut.idle) * micro_batch + update + rest
    tokens = cut.tokens * cut.micro_batches * cut.dp / cut.world / step
    counted = flops_per_token(config.model, config.training.seq_length, vocab_size, "half", config.moe)
    return Speed(
        forward_backward=compute,
        update=update,
        bubble=cut.idle / (cut.micro_batches + cut.idle),
        axes=axes,
        step=step,
        tokens_per_second=tokens,
        flops_per_token=counted,
        mfu=tokens * counted / hardware.peak(cut.compute),
    )


def _different(cut: Cut) -> list[int]:
    """First pipeline rank, last one, and the one with most layers."""
    counts = [cut.layers(rank) for rank in range(cut.pp)]
    return sorted({0, cut.pp - 1, counts.index(max(counts))})
