"""Memory of a rank, term by term, at the moments when it is fullest."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mup.config import Config
from megatron_mup.optim.matrix import BATCH_NUMEL
from megatron_mup.optim.planner import CHUNK_ELEMENTS, Plan, make_plan
from megatron_mup.parallel.chunks import shard_bounds
from megatron_mup.parametrization.meta import ParamMeta
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

    @property
    def static(self) -> float:
        """What is there between steps."""
        return self.weights + self.main + self.state + self.pipeline

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


def local_elements(meta: ParamMeta, cut: Cut, place: Place) -> int:
    """Elements of a rank's shard of a parameter."""
    rows, *rest = shard_bounds(meta, cut.tp, place[0], cut.shard, place[2])[1]
    for length in rest:
        rows *= length
    return rows


def model_parallel_elements(meta: ParamMeta, cut: Cut) -> int:
    """Elements of the largest tensor-parallel shard of a parameter, before data-parallel ranks cut it."""
    rows, *rest = shard_bounds(meta, cut.tp, 0, 1, 0)[1]
    for length in rest:
        rows *= length
    return rows


def stage_plan(inventory: Inventory, cut: Cut, stage: int) -> Plan:
    """Where each matrix of a stage is orthonormalized (`optim.planner`)."""
    matrices = _matrices(inventory, cut, stage).values()
    return make_plan([meta for meta, _ in matrices], [h.cost or 0.0 for _, h in matrices], cut.tp * cut.dp)


def place_of(cut: Cut, rank: int) -> Place:
    """Coordinates of a rank of a stage: tensor ranks are neighbours, replicas farthest apart."""
    rest, tensor = divmod(rank, cut.tp)
    return (tensor, *divmod(rest, cut.shard))


def state_bytes(inventory: Inventory, cut: Cut, stage: int, rank: int, plan: Plan) -> float:
    """Bytes of optimizer state on one rank of a stage.

    Momentum of a matrix is in the replica of its home alone, and what the home keeps is on that rank alone.

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
            held += count * holding.on_shards * local_elements(holding.meta, cut, place)
    matrices = _matrices(inventory, cut, stage)
    for assignment in plan.assignments:
        meta, holding = matrices[assignment.meta.name]
        if place_of(cut, assignment.home)[1] == place[1]:
            held += holding.on_shards * local_elements(meta, cut, place)
        if assignment.home == rank:
            held += holding.at_home
    return held


def stage_holdings(inventory: Inventory, cut: Cut, stage: int) -> list[tuple[Holding, int]]:
    """Parameters of a pipeline rank, alike ones of a stage once with their number."""
    last = len(cut.stages) - 1
    stages = [inventory.stage(*cut.stages[n], first=n == 0, last=n == last) for n in cut.held[stage]]
    return [counted for held in stages for counted in held]


def _matrices(inventory: Inventory, cut: Cut, stage: int) -> dict[str, tuple[ParamMeta, Holding]]:
    """Matrices of a pipeline rank that are orthonormalized, by name."""
    return {name: held for part in cut.parts(stage) for name, held in inventory.matrices(*part).items()}


def fullest_state(inventory: Inventory, cut: Cut, stage: int) -> float:
    """Bytes of optimizer state on the rank of a stage that has most.

    By the plan, where that is small; else as if homes shared evenly what they hold, at least one matrix.
    """
    number = sum(count for holding, count in stage_holdings(inventory, cut, stage) if holding.cost is not None)
    if number == 0 or number * cut.tp * cut.dp <= SMALL_PLAN:
        plan = stage_plan(inventory, cut, stage)
        # The first shards are the largest; what homes keep may be anywhere.
        ranks = range(cut.tp * cut.dp) if number else [0]
        return max(state_bytes(inventory, cut, stage, rank, plan) for rank in ranks)
    return _even_state(inventory, cut, stage)


def _even_state(inventory: Inventory, cut: Cut, stage: int) -> float:
    ranks, held = cut.tp * cut.dp, 0.0
    first: Place = (0, 0, 0)
    whole, largest = 0.0, 0.0
    momentum, largest_momentum = 0.0, 0.0
    for holding, count in stage_holdings(inventory, cut, stage):
        shards = holding.on_shards * local_elements(holding.meta, cut, first)
        if holding.cost is None:
            held += count * shards
            continue
        momentum += count * shards
        largest_momentum = max(largest_momentum, shards)
        whole += count * holding.at_home
        largest = max(largest, holding.at_home)
    if cut.replicate > 1 and momentum:
        momentum = min(momentum, momentum / cut.replicate + largest_momentum)
    at_home = whole if ranks == 1 else min(whole, max(largest, whole / ranks))
    return held + momentum + at_home


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
    own = sum(count * local_elements(h.meta, cut, (0, 0, 0)) for h, count in holdings)
    whole = sum(count * model_parallel_elements(h.meta, cut) for h, count in holdings)
    outside = sum(c * model_parallel_elements(h.meta, cut) for h, c in holdings if h.meta.layer is None)
    layer = (whole - outside) / max(1, cut.layers(stage))
    compute, main = cut.compute.itemsize, cut.main.itemsize
    copies = cut.dp == 1 and compute != main
    reduce = 2 if config.parallel.grad_reduce_in_bf16 else FP32
    in_flight = cut.in_flight(stage)
    activations, recomputed = _activations(config, cut, stage)
    unreduced = whole * (reduce if compute != reduce else compute) if cut.dp > 1 and cut.micro_batches > 1 else 0.0
    return Memory(
        weights=own * (compute if cut.dp == 1 else main),
        main=own * main if copies else 0.0,
        state=fullest_state(inventory, cut, stage),
        gradients=own * (FP32 if copies else compute if cut.dp == 1 else main),
        unreduced=unreduced,
        accumulated=cut.micro_batches > in_flight,
        activations=activations,
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
    layers, everything = cut.layers(stage), layer_bytes(config, cut, "all")
    kept: dict[Kept, float] = {kind: layer_bytes(config, cut, kind) for kind in ("all", "products", "input")}
    work = layer_workspace(config, cut)
    if training.recompute == "none":
        held = layers * everything
    elif training.recompute == "selective":
        held, work = layers * kept["products"], work + max(0.0, everything - kept["products"])
    elif training.recompute_method == "block":
        chosen = min(layers, training.recompute_num_layers)
        held, work = chosen * kept["input"] + (layers - chosen) * everything, work + everything
    else:
        chunk = min(layers, training.recompute_num_layers)
        held, work = -(-layers // chunk) * kept["input"], work + chunk * everything
    stages, first, last = len(cut.held[stage]), cut.has_first(stage), cut.has_last(stage)
    held += stages * token_info_bytes(config, cut)
    if first:
        held += embedding_bytes(config, cut)
    if last:
        held += head_bytes(config, cut)
    # A stage's output the schedule holds until its gradient comes; its input is one of the pipeline's buffers.
    held += kept["input"] * ((stages - last) - (stages - first))
    return held * cut.in_flight(stage), work


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
    """What the optimizer's step takes: updates of the chunks in work, whole at home, and Newton-Schulz's operands."""
    matrices = [(h.meta, count) for h, count in stage_holdings(inventory, cut, stage) if h.cost is not None]
    if not matrices:
        return 0.0
    ranks, total = cut.tp * cut.dp, sum(meta.numel * count for meta, count in matrices)
    travels = FP32 if config.optimizer.muon_ns_dtype == "fp32" else 2
    largest, block = max(meta.numel for meta, _ in matrices), max(_largest_block(meta) for meta, _ in matrices)
    iterates = 4 * travels * max(min(BATCH_NUMEL, total // ranks), block)
    if ranks == 1:
        # One chunk: all updates, in the optimizer's precision and as Newton-Schulz takes them, and all results.
        return total * (cut.main.itemsize + 2 * travels) + iterates
    at_home = max(largest, min(total / ranks, CHUNK_ELEMENTS))
    chunks = 1 if total / ranks < 1.5 * CHUNK_ELEMENTS else 2
    on_shards = min(total / ranks, 2 * CHUNK_ELEMENTS) * (cut.main.itemsize + travels)
    # The whole matrices, their results, and these in the order in which they travel.
    return on_shards + chunks * at_home * 3 * travels + iterates


def _largest_block(meta: ParamMeta) -> int:
    """Elements of the largest logical matrix of a tensor."""
    rows, columns = meta.shape
    return columns * max((block.matrices(rows)[1] for block in meta.blocks), default=rows)
