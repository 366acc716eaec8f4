"""Diagnostics of a run's steady state (``--diagnostics-interval``): updates, weights, activations and epsilon.

What they tell about hyperparameter transfer: docs/transfer.md. Every number is a sum or a maximum over ranks, so that
no layout changes it; nothing waits for the device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_mup.config import Config
from megatron_mup.kernels.fp8 import saturated
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.optimizer import learning_rate_class
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import Block, Role
from megatron_mup.parametrization.table import forward_multipliers
from megatron_mup.training.forward_backward import Batch
from megatron_mup.training.observe import class_of, watch, watch_attention, watch_fp8
from megatron_mup.training.step import StepResult, TrainStep

POWER_ITERATIONS = 16
"""Products with each matrix and its transpose. Every diagnosis starts anew, so that a resumed run finds the same."""

SHARES = ("second moments", "fp8 ")
"""Names of quotients that are shares; all others are mean squares."""

Scalars = tuple[list[str], torch.Tensor]
"""Names, and their values on the device, equal on all ranks."""


class _Pairs:
    """Quotients of sums over ranks, and maxima over ranks, by name; every rank asks for the same names."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64, device=device))
        self.tops: dict[str, torch.Tensor] = {}

    def add(self, name: str, top: torch.Tensor, bottom: torch.Tensor | float) -> None:
        """Adds to numerator and denominator."""
        pair = self.sums[name]
        pair[0] += top
        pair[1] += bottom

    def raise_to(self, name: str, value: torch.Tensor) -> None:
        """Takes the maximum."""
        value = value.double()
        self.tops[name] = torch.maximum(self.tops[name], value) if name in self.tops else value


class Diagnostics:
    """Measures around one step. Collective over all ranks.

    Activations and attention logits are those of a forward pass of its own over the step's batch, without dropout and
    uncompiled, so a diagnosis costs about a third of a step more, and a copy of this rank's main parameters. FP8's take
    a backward pass too, so they cost a step.

    Args:
        step: the run's step.
        config: its configuration.
        mesh: its mesh.
    """

    def __init__(self, step: TrainStep, config: Config, mesh: Mesh) -> None:
        self.step, self.config, self.mesh = step, config, mesh
        self._names: dict[frozenset[str], tuple[list[str], list[str]]] = {}
        self._params = [
            main
            for main in step.main.params
            if main.meta.tied_to is None and (main.meta.cut_dim is not None or mesh.rank("tp") == 0)
        ]

    @torch.no_grad()
    def around(self, batch: Batch, take_step: Callable[[], StepResult]) -> tuple[StepResult, Scalars]:
        """Takes the step and measures before and after it.

        Args:
            batch: this rank's samples of the step.
            take_step: takes it.
        """
        pairs = _Pairs(self.mesh.device)
        self._activations(batch, pairs)
        if self.config.fp8.fp8_format is not None:
            self._fp8(batch, pairs)
        before = [main.value.clone() for main in self._params]
        with torch.enable_grad():
            result = take_step()
        self._updates(before, pairs)
        del before
        self._epsilon(pairs)
        self._spectral(pairs)
        self._head(pairs)
        return result, self._reduced(pairs)

    def _activations(self, batch: Batch, pairs: _Pairs) -> None:
        """RMS of what each class of modules puts out, and the largest attention logit."""

        def seen(name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            norm = torch.linalg.vector_norm(output, dtype=torch.float32).double()
            pairs.add(f"activation rms/{class_of(name)}", norm.square(), output.numel())

        def logits(_name: str, values: torch.Tensor) -> None:
            pairs.raise_to("attention logit max", values.max())

        with watch(self.step.model, seen), watch_attention(self.step.model, logits):
            self.step.evaluate(batch)

    def _fp8(self, batch: Batch, pairs: _Pairs) -> None:
        """What each layer casts: largest value, shares that become 0 and that are cut to the end of the range."""

        def seen(layer: str, kind: str, values: torch.Tensor, scaled: torch.Tensor, dtype: torch.dtype) -> None:
            place, size = f"{kind}/{layer.removeprefix('decoder.layers.')}", scaled.detach().abs()
            lost = (values.detach() != 0) & (saturated(size, dtype).float() == 0)
            pairs.raise_to(f"fp8 amax/{place}", values.detach().abs().max())
            pairs.add(f"fp8 underflow/{place}", lost.sum(), size.numel())
            pairs.add(f"fp8 saturation/{place}", (size > torch.finfo(dtype).max).sum(), size.numel())

        tokens, _ = self.step._agree(batch, 0)
        with torch.enable_grad(), watch_fp8(self.step.model, self.config.fp8, seen):
            self.step.forward_backward(batch, torch.ones_like(tokens) if self.step.sums_tokens else tokens)
        self.step.main.zero_grad()

    def _updates(self, before: list[torch.Tensor], pairs: _Pairs) -> None:
        """RMS of the step over RMS of the weights, by class."""
        for main, old in zip(self._params, before, strict=True):
            pairs.add(f"update to weight/{learning_rate_class(main.meta)}", _square(main.value - old), _square(old))

    def _epsilon(self, pairs: _Pairs) -> None:
        """Share of second moments below the square of AdamW's epsilon."""
        states = self.step.optimizer.state_tensors()
        steps = self.step.optimizer.state_scalars()["step"]
        unbias = 1 - self.config.optimizer.adam_beta2**steps
        numbers = {row.name: row for row in self.step.optimizer.routing_table()}
        for main in self._params:
            state, eps = states.get(f"exp_avg_sq/{main.meta.name}"), numbers[main.meta.name].eps
            if state is not None and eps:
                below = (state[1] < eps**2 * unbias).sum()
                pairs.add(f"second moments below eps/{learning_rate_class(main.meta)}", below, state[1].numel())

    def _head(self, pairs: _Pairs) -> None:
        """Operator norm of the head from root mean square to maximum, multiplier included: its longest row."""
        factor = forward_multipliers(self.config).logits * math.sqrt(self.config.model.hidden_size)
        tied = not self.config.model.untie_embeddings_and_output_weights
        for main in self._params:
            if main.meta.role is (Role.EMBEDDING if tied else Role.READOUT) and main.value.numel():
                rows = torch.linalg.vector_norm(main.value, dim=-1, dtype=torch.float32)
                pairs.raise_to("head norm", rows.max() * factor)

    def _spectral(self, pairs: _Pairs) -> None:
        """Largest singular value over ``sqrt(out/in)``, mean and largest of each class of logical matrices."""
        first = self.mesh.rank("tp") == 0
        matrices = [_Sharded(main, block, first) for main in self._hidden() for block in _blocks(main)]
        if not matrices:
            return
        values = top_singular_values(matrices, self.mesh)
        for matrix, value in zip(matrices, values, strict=True):
            scaled = value * math.sqrt(matrix.columns / matrix.rows)
            name = matrix.block.name
            pairs.add(f"singular value over target/{name}", scaled.square(), 1.0)
            pairs.raise_to(f"singular value over target, largest/{name}", scaled)

    def _hidden(self) -> list[MainParam]:
        """Hidden matrices of this stage that are no stacks of experts: those are many, and differ by rank."""
        return [m for m in self.step.main.params if m.meta.role.is_orthonormalized and not m.meta.role.is_expert]

    def _reduced(self, pairs: _Pairs) -> Scalars:
        """Brings all ranks together: one sum, one maximum."""
        # What is measured changes with the optimizers only, for all ranks at once.
        optimizers = frozenset(row.optimizer for row in self.step.optimizer.routing_table())
        if optimizers not in self._names:
            self._names[optimizers] = self._agree(pairs)
        means, tops = self._names[optimizers]
        zero = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        lowest = torch.full((), -torch.inf, dtype=torch.float64, device=self.mesh.device)
        sums = torch.stack([pairs.sums.get(name, zero) for name in means])
        most = torch.stack([pairs.tops.get(name, lowest) for name in tops])
        dist.all_reduce(sums)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        quotients = sums[:, 0] / sums[:, 1]
        shares = torch.tensor([name.startswith(SHARES) for name in means], device=self.mesh.device)
        return [*means, *tops], torch.cat([torch.where(shares, quotients, quotients.sqrt()), most])

    def _agree(self, pairs: _Pairs) -> tuple[list[str], list[str]]:
        """Names over all stages."""
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (list(pairs.sums), list(pairs.tops)))
        return _union(means for means, _ in parts), _union(tops for _, tops in parts)


def _union(parts: Iterable[list[str]]) -> list[str]:
    return sorted({name for part in parts for name in part})


def _square(values: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.float32)
    return norm.double().square()


def _blocks(main: MainParam) -> tuple[Block, ...]:
    rows = main.meta.shape[0]
    return main.meta.blocks or (Block(main.meta.role.value, 0, rows, rows),)


class _Sharded:
    """This rank's shard of one logical matrix ``[rows, columns]``: some of its rows, or of its columns.

    Args:
        main: the fused parameter.
        block: the matrix in it.
        first: whether this is the tensor rank that counts where all hold copies.
    """

    def __init__(self, main: MainParam, block: Block, first: bool) -> None:
        self.block = block
        self.rows, self.columns = main.meta.shape[0] // block.period * block.size, main.meta.shape[1]
        (start, self.first_column), (count, width) = main.layout.offsets, main.layout.local_shape
        place = torch.arange(start, start + count, device=main.value.device)
        inside = place % block.period - block.start
        counts = first or main.meta.cut_dim is not None
        mine = ((inside >= 0) & (inside < block.size) & counts).nonzero()[:, 0]
        self.place = place[mine] // block.period * block.size + inside[mine]
        self.width, self._value, self._mine = width, main.value, mine

    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """This shard's part of ``W v``, ``[rows]``."""
        part = self._value.float() @ vector[self.first_column : self.first_column + self.width]
        return vector.new_zeros(self.rows).index_add(0, self.place, part[self._mine])

    def back(self, vector: torch.Tensor) -> torch.Tensor:
        """This shard's part of ``W^T u``, ``[columns]``."""
        spread = vector.new_zeros(self._value.shape[0]).index_add(0, self._mine, vector[self.place])
        result = vector.new_zeros(self.columns)
        result[self.first_column : self.first_column + self.width] = self._value.float().t() @ spread
        return result


def top_singular_values(matrices: list[_Sharded], mesh: Mesh) -> list[torch.Tensor]:
    """Largest singular value of each matrix of a stage, by power iteration on shards; from below, to about a percent.

    Two sums per iteration, of all vectors together, over the ranks that share the matrices. Replicas hold the same, so
    sums leave them out.

    Args:
        matrices: the same on every rank of the stage.
        mesh: the run's mesh.
    """
    device = mesh.device
    vectors = []
    for matrix in matrices:
        index = torch.arange(matrix.columns, device=device, dtype=torch.float32)
        # A fixed chirp: no plausible singular vector is orthogonal to it.
        vectors.append(torch.cos(0.618034 * index * (index % 1024) + index))
    values: list[torch.Tensor] = []
    for _ in range(POWER_ITERATIONS):
        vectors = [v / torch.linalg.vector_norm(v).clamp(min=1e-30) for v in vectors]
        lefts = _summed([m.times(v) for m, v in zip(matrices, vectors, strict=True)], mesh)
        values = [torch.linalg.vector_norm(left) for left in lefts]
        vectors = _summed([m.back(u) for m, u in zip(matrices, lefts, strict=True)], mesh)
    return values


def _summed(parts: list[torch.Tensor], mesh: Mesh) -> list[torch.Tensor]:
    flat = torch.cat(parts)
    for axis in ("tp", "dp_shard"):
        if mesh.size(axis) > 1:
            dist.all_reduce(flat, group=mesh.group(axis))
    return list(flat.split([len(part) for part in parts]))
