"""Memory of a rank, term by term, at the moments when it is fullest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mup.config import Config
from megatron_mup.optim.batches import BATCH_BYTES, lanes_of
from megatron_mup.optim.planner import CHUNK_ELEMENTS, Plan, make_plan
from megatron_mup.parallel.chunks import shard_bounds
from megatron_mup.parametrization.meta import ParamMeta, Role
from megatron_mup.parametrization.operations import scales_gradients
from megatron_mup.planning.activations import (
    Kept,
    embedding_bytes,
    head_bytes,
    layer_bytes,
    layer_workspace,
    loss_bytes,
    token_info_bytes,
)
from megatron_mup.planning.cut import Cut
from megatron_mup.planning.inventory import Holding, Inventory

FP32 = 4
CUBLAS = 2 * 32 * 2**20
"""Bytes of the workspaces that PyTorch's allocator gives cuBLAS and cuBLASLt on Hopper."""
UNITS_AT_ONCE = 2
"""FSDP2 units whose gathered parameters, or gradients on their way, are there together: the one in use and the next."""

SMALL_PLAN = 256
"""Matrices x ranks up to which the plan is made to see what homes hold."""

Place = tuple[int, int, int]
"""Tensor, replica and shard coordinate of a rank in its stage."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a rank by term. What lives through the whole step, and what comes and goes.

    Attributes:
        weights: parameters as the module holds them.
        main: fp32 copies beside bf16 parameters.
        state: of the optimizer.
        gradients: sums that the optimizer reads, at the end of the step.
        unreduced: gradients of earlier micro-batches that data-parallel ranks haven't summed yet.
        accumulated: whether gradients of earlier micro-batches are there while activations are at their most.
        activations: of all micro-batches in flight.
        loss: logits and loss.
        recomputed: activations that backward makes anew, and its own workspace.
        gathered: parameters gathered by FSDP2.
        reducing: gradients of the units that are being reduced.
        pipeline: buffers of what comes from other stages.
        update: what the optimizer's step takes.
        libraries: workspaces of cuBLAS.
    """

    weights: float
    main: float
    state: float
    gradients: float
    unreduced: float
    accumulated: bool
    activations: float
    loss: float
    recomputed: float
    gathered: float
    reducing: float
    pipeline: float
    update: float
    libraries: float = CUBLAS

    @property
    def static(self) -> float:
        """What is there between steps."""
        return self.weights + self.main + self.state + self.pipeline + self.libraries

    @property
    def moments(self) -> dict[str, float]:
        """Bytes at each moment that can be the fullest."""
        summed = self.gradients if self.accumulated and not self.unreduced else 0.0
        before = self.static + self.gathered + self.unreduced * self.accumulated + summed
        return {
            "loss": before + self.activations + self.loss,
            "backward": before + self.activations + self.recomputed,
            "reduction": self.static + self.gathered + max(self.gradients, self.unreduced) + self.reducing,
            "optimizer": self.static + self.gradients + self.update,
        }

    @property
    def peak(self) -> float:
        """Most bytes of tensors at once, as ``torch.cuda.max_memory_allocated`` counts them."""
        return max(self.moments.values())


def local_elements(meta: ParamMeta, cut: Cut, rank: int = 0) -> int:
    """Elements of a parameter's shard on a rank of a stage; the first has most."""
    place, cuts, shards = place_of(cut, rank), cut.tp, cut.shard
    if meta.experts is not None:
        place, cuts, shards = expert_place_of(cut, rank), cut.experts, cut.expert_shard
    # Expert tensor ranks share evenly: any has as much as the first.
    return math.prod(shard_bounds(meta, cuts, place[0], shards, place[2], cut.expert_tensor)[1])


def model_parallel_elements(meta: ParamMeta, cut: Cut) -> int:
    """Elements of the largest shard of a parameter before data-parallel ranks cut it."""
    cuts = cut.tp if meta.experts is None else cut.experts
    return math.prod(shard_bounds(meta, cuts, 0, 1, 0, cut.expert_tensor)[1])


def stage_plan(inventory: Inventory, cut: Cut, stage: int) -> Plan:
    """Where each matrix of a stage is orthonormalized (`optim.planner`), those of experts left out."""
    matrices = _matrices(inventory, cut, stage).values()
    return make_plan([meta for meta, _ in matrices], [h.cost or 0.0 for _, h in matrices], cut.homes)


def place_of(cut: Cut, rank: int) -> Place:
    """Coordinates of a rank of a stage: tensor ranks are neighbours, replicas farthest apart."""
    rest, tensor = divmod(rank, cut.tp)
    return (tensor, *divmod(rest, cut.shard))


def expert_place_of(cut: Cut, rank: int) -> Place:
    """The same among the ranks of experts: those that share each of them are neighbours, then expert ranks."""
    rest, expert = divmod(rank // cut.expert_tensor, cut.experts)
    return (expert, *divmod(rest, cut.expert_shard))


def state_bytes(inventory: Inventory, cut: Cut, stage: int, rank: int, plan: Plan) -> float:
    """Bytes of optimizer state on one rank of a stage.

    Momentum of a matrix is in the replica of its home alone, and what the home keeps is on that rank alone; homes of
    experts are taken to share it evenly.

    Args:
        inventory: the model.
        cut: how ranks share it.
        stage: pipeline rank.
        rank: number in the stage, see `place_of`.
        plan: of the stage.
    """
    place = place_of(cut, rank)
    held = 0.0
    for holding, count in stage_holdings(inventory, cut, stage):
        if holding.cost is None:
            held += count * holding.on_shards * local_elements(holding.meta, cut, rank)
    held += _even_state(inventory, cut, stage, experts=True)
    matrices = _matrices(inventory, cut, stage)
    for assignment in plan.assignments:
        meta, holding = matrices[assignment.meta.name]
        if place_of(cut, assignment.home)[1] == place[1]:
            held += holding.on_shards * local_elements(meta, cut, rank)
        if assignment.home == rank % cut.homes:
            held += holding.at_home
    return held


def stage_holdings(inventory: Inventory, cut: Cut, stage: int) -> list[tuple[Holding, int]]:
    """Parameters of a pipeline rank, alike ones of a stage once with their number."""
    last = len(cut.stages) - 1
    stages = [inventory.stage(*cut.stages[n], first=n == 0, last=n == last) for n in cut.held[stage]]
    return [counted for held in stages for counted in held]


def _matrices(inventory: Inventory, cut: Cut, stage: int) -> dict[str, tuple[ParamMeta, Holding]]:
    """Matrices of a pipeline rank that are orthonormalized, experts left out, by name."""
    found = {name: held for part in cut.parts(stage) for name, held in inventory.matrices(*part).items()}
    return {name: held for name, held in found.items() if held[0].experts is None}


def fullest_state(inventory: Inventory, cut: Cut, stage: int) -> float:
    """Bytes of optimizer state on the rank of a stage that has most.

    By the plan, where that is small; else as if homes shared evenly what they hold, at least one matrix.
    """
    number = len(_matrices(inventory, cut, stage))
    ranks = cut.homes
    if number * ranks <= SMALL_PLAN:
        plan = stage_plan(inventory, cut, stage)
        # The first shards are the largest; what homes keep may be anywhere.
        return max(state_bytes(inventory, cut, stage, rank, plan) for rank in range(ranks if number else 1))
    elementwise = sum(
        count * holding.on_shards * local_elements(holding.meta, cut)
        for holding, count in stage_holdings(inventory, cut, stage)
        if holding.cost is None
    )
    return elementwise + sum(_even_state(inventory, cut, stage, experts) for experts in (False, True))


def _even_state(inventory: Inventory, cut: Cut, stage: int, experts: bool) -> float:
    """State of matrices, experts' or others, where homes share it evenly."""
    ranks, replicate = cut.homes, cut.replicate
    if experts:
        ranks, replicate = cut.expert_replicate * cut.expert_shard * cut.expert_tensor, cut.expert_replicate
    whole, largest, momentum, largest_momentum = 0.0, 0.0, 0.0, 0.0
    for holding, count in stage_holdings(inventory, cut, stage):
        if holding.cost is None or (holding.meta.experts is not None) != experts:
            continue
        shards = holding.on_shards * local_elements(holding.meta, cut)
        momentum += count * shards
        largest_momentum = max(largest_momentum, shards)
        # Experts have homes among the ranks that hold them, and are as many tensors as they are.
        at_home = holding.at_home / (cut.experts if experts else 1)
        whole += count * at_home
        largest = max(largest, at_home * cut.experts / holding.meta.experts if holding.meta.experts else at_home)
    if replicate > 1 and momentum:
        momentum = min(momentum, momentum / replicate + largest_momentum)
    return momentum + (whole if ranks == 1 else min(whole, max(largest, whole / ranks)))


def stage_memory(config: Config, inventory: Inventory, cut: Cut, stage: int, vocab_size: int) -> Memory:
    """Memory of the fullest of the ranks at one place of the pipeline.

    Args:
        config: the run's configuration.
        inventory: the model.
        cut: how ranks share it.
        stage: pipeline rank, from 0.
        vocab_size: number of token ids.
    """
    holdings = stage_holdings(inventory, cut, stage)
    own = sum(count * local_elements(h.meta, cut) for h, count in holdings)
    whole = sum(count * model_parallel_elements(h.meta, cut) for h, count in holdings)
    outside = sum(c * model_parallel_elements(h.meta, cut) for h, c in holdings if h.meta.layer is None)
    layer = (whole - outside) / max(1, cut.layers(stage))
    compute, main = cut.compute.itemsize, cut.main.itemsize
    copies = cut.dp == 1 and compute != main
    # Sums, scaling and clipping work in the precision of the copies; AdamW's own kernel scales as it reads.
    optimizer = config.optimizer
    scaled = scales_gradients(config) or config.fp8.fp8_format is not None or optimizer.clip_grad > 0
    folded = optimizer.optimizer == "adam" and optimizer.adam_impl == "native"
    widened = cut.micro_batches > 1 or (scaled and not folded)
    reduce = 2 if config.parallel.grad_reduce_in_bf16 else FP32
    in_flight = cut.in_flight(stage)
    activations, recomputed = _activations(config, cut, stage)
    unreduced = whole * (reduce if compute != reduce else compute) if cut.dp > 1 and cut.micro_batches > 1 else 0.0
    return Memory(
        weights=own * (compute if cut.dp == 1 else main),
        main=own * main if copies else 0.0,
        state=fullest_state(inventory, cut, stage),
        gradients=own * (FP32 if copies and widened else compute if cut.dp == 1 else main),
        unreduced=unreduced,
        accumulated=cut.micro_batches > in_flight,
        activations=activations + _kept_casts(config, inventory, cut),
        loss=loss_bytes(config, cut, vocab_size) if cut.has_last(stage) else 0.0,
        recomputed=recomputed,
        gathered=_gathered(cut, whole, outside, layer) if cut.dp > 1 else 0.0,
        reducing=max(layer * UNITS_AT_ONCE, outside) * (compute + reduce) if cut.dp > 1 else compute * outside / 2,
        pipeline=_pipeline_buffers(config, cut, stage),
        update=_update(config, inventory, cut, stage),
    )


def _activations(config: Config, cut: Cut, stage: int) -> tuple[float, float]:
    """Bytes held for backward by all micro-batches in flight, and those that backward of a part of them takes."""
    training = config.training
    everything, products = (bytes_by_layer(config, cut, stage, kind) for kind in ("all", "products"))
    layers, through = len(everything), layer_bytes(config, cut, "input")
    work = max((layer_workspace(config, cut, kind) for kind in set(_has_experts(config, cut, stage))), default=0.0)
    if is_budgeted(config):
        kept = [
            budgeted_bytes(training.activation_memory_budget, *sizes)
            for sizes in zip(everything, products, [through] * layers, strict=True)
        ]
        again = (a - k for a, k in zip(everything, kept, strict=True))
        held, work = sum(kept), work + max(0.0, *again)
    elif training.recompute == "none":
        held = sum(everything)
    elif training.recompute == "selective":
        again = (a - p for a, p in zip(everything, products, strict=True))
        held, work = sum(products), work + max(0.0, *again)
    elif training.recompute_method == "block":
        chosen = min(layers, training.recompute_num_layers)
        held, work = chosen * through + sum(everything[chosen:]), work + max(everything, default=0.0)
    else:
        chunk = min(layers, training.recompute_num_layers)
        held, work = -(-layers // chunk) * through, work + chunk * max(everything, default=0.0)
    stages, first, last = len(cut.held[stage]), cut.has_first(stage), cut.has_last(stage)
    held += stages * token_info_bytes(config, cut)
    if first:
        held += embedding_bytes(config, cut)
    if last:
        held += head_bytes(config, cut)
    # A stage's output the schedule holds until its gradient comes; its input is one of the pipeline's buffers.
    held += through * ((stages - last) - (stages - first))
    return held * cut.in_flight(stage), work


def _kept_casts(config: Config, inventory: Inventory, cut: Cut) -> float:
    """Bytes of weights in FP8 that layers of recipe static keep until backward (`training.precision`)."""
    fp8 = config.fp8
    if fp8.fp8_format is None or fp8.fp8_recipe != "static" or cut.dp > 1 or cut.pp > 1:
        return 0.0
    critical = (Role.ATTENTION_OUTPUT, Role.MLP_OUT) if fp8.fp8_critical_bf16 else ()
    metas = [h.meta for n in fp8.layers(config.model.num_layers) for h in inventory.kinds[inventory.layers[n]]]
    cast = [m for m in metas if m.role.is_hidden_matrix and not m.role.is_expert and m.role not in critical]
    return sum(local_elements(meta, cut) for meta in cast)


def is_budgeted(config: Config) -> bool:
    """Whether the compiler chooses what to recompute, under ``--activation-memory-budget``."""
    training = config.training
    return training.recompute == "none" and training.torch_compile and training.activation_memory_budget < 1


def budgeted_bytes(budget: float, everything: float, products: float, through: float) -> float:
    """Bytes that a compiled layer keeps under ``--activation-memory-budget``.

    The compiler gives up elementwise work first, as a whole, and only then the products that save most for their time,
    up to its share of what lies between all and the input; in steps as large as what it gives up, so this is near.

    Args:
        budget: the share, less than 1.
        everything, products, through: bytes by what is kept, as `layer_bytes` has them.
    """
    return min(products, through + budget * (everything - through))


def _has_experts(config: Config, cut: Cut, stage: int) -> list[bool]:
    """Of each layer of a pipeline rank."""
    every = config.moe.layers(config.model.num_layers)
    return [every[layer] for part in cut.parts(stage) for layer in range(*part)]


def bytes_by_layer(config: Config, cut: Cut, stage: int, kept: Kept) -> list[float]:
    """`layer_bytes` of each layer of a pipeline rank."""
    sizes = {kind: layer_bytes(config, cut, kept, kind) for kind in set(_has_experts(config, cut, stage))}
    return [sizes[kind] for kind in _has_experts(config, cut, stage)]


def _gathered(cut: Cut, whole: float, outside: float, layer: float) -> float:
    """Parameters gathered at once: all, or what is outside the layers and the layers in use.

    PyTorch's pipeline schedules leave gathered what backward of a micro-batch has gathered.
    """
    stays = cut.keeps_gathered or (cut.pp > 1 and cut.micro_batches > 1)
    return cut.compute.itemsize * (whole if stays else outside + UNITS_AT_ONCE * layer)


def _pipeline_buffers(config: Config, cut: Cut, stage: int) -> float:
    """PyTorch's schedule has a buffer for each micro-batch, on both sides of a stage that has a neighbour there."""
    sides = 2 * len(cut.held[stage]) - cut.has_first(stage) - cut.has_last(stage)
    return sides * cut.micro_batches * layer_bytes(config, cut, "input")


def _update(config: Config, inventory: Inventory, cut: Cut, stage: int) -> float:
    """What the optimizer's step takes: Newton-Schulz's operands, and the buffers in which chunks travel."""
    matrices = [(h.meta, count) for h, count in stage_holdings(inventory, cut, stage) if h.cost is not None]
    if not matrices:
        return 0.0
    ranks, total = cut.homes, sum(meta.numel * count for meta, count in matrices)
    travels = FP32 if config.optimizer.muon_ns_dtype == "fp32" else 2
    largest = max(meta.numel // (meta.experts or 1) for meta, _ in matrices)
    block = max(_largest_block(meta) for meta, _ in matrices)
    side_by_side = min(max(BATCH_BYTES, lanes_of(ranks) * travels * block), travels * total // ranks)
    iterates = 5 * max(side_by_side, travels * block)
    if ranks == 1:
        return iterates
    at_home = max(largest, min(total / ranks, CHUNK_ELEMENTS))
    on_shards = min(total / ranks, CHUNK_ELEMENTS)
    # Two sets of buffers for shards and whole matrices, either way, and a chunk's whole matrices and results in work.
    others = (ranks - 1) / ranks
    return travels * (2 * (2 * on_shards + 2 * at_home) * others + 2 * at_home) + iterates


def _largest_block(meta: ParamMeta) -> int:
    """Elements of the largest logical matrix of a tensor."""
    rows, columns = meta.shape
    return columns * max((block.matrices(rows)[1] for block in meta.blocks), default=rows)
