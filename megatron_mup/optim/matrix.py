"""What all optimizers of matrices share: momentum on shards, whole matrices at a home rank, updates on shards again."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from typing import ClassVar, Generic, TypeVar

import torch

from megatron_mup.optim.clip import gradients
from megatron_mup.optim.exchange import Exchange
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.optim.planner import Assignment, make_plan, newton_schulz_cost
from megatron_mup.parallel.layout import Layout
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import Block, ParamMeta, Role
from megatron_mup.parametrization.table import Scaling

BATCH_NUMEL = 1 << 25
"""Elements of equal-shape matrices that are orthonormalized at once; a larger matrix goes alone. Bounds the memory of
a step to a small multiple of 2^25 elements (128 MiB in fp32), or of the largest matrix."""


@dataclass(frozen=True, kw_only=True)
class MatrixSettings:
    """Settings that all matrices of an optimizer share; the fields follow the ``--muon-*`` flags."""

    momentum: float = 0.95
    momentum_style: str = "ema"
    nesterov: bool = True
    num_ns_steps: int = 5
    coefficients: str = "quintic"
    split_qkv: bool = True
    split_fc1: bool = True
    ns_dtype: torch.dtype = torch.float32


SettingsT = TypeVar("SettingsT", bound=MatrixSettings)


class Kept(Enum):
    """Shape of a small state that stays at a matrix's home."""

    ROWS = auto()
    """One number per row of the matrix: ``[rows, 1]``."""
    INPUTS = auto()
    """One vector over the columns for each logical block: ``[blocks, columns]``."""


@dataclass(frozen=True)
class Whole:
    """Logical matrices of one shape, whole, at their home.

    Attributes:
        update: ``[batch, out, in]``, what is to be made orthonormal.
        weight: ``[batch, out, in]`` in the optimizer's precision, if the rule asks for it.
        kept: small states by kind: ``[batch, out, 1]`` (rows) or ``[batch, in]`` (inputs). Written in place.
    """

    update: torch.Tensor
    weight: torch.Tensor | None
    kept: Mapping[str, torch.Tensor]


def logical_blocks(meta: ParamMeta, settings: MatrixSettings) -> tuple[Block, ...]:
    """The matrices that are orthonormalized apart; the whole tensor is one block where it isn't split.

    Raises:
        ValueError: not a matrix, or blocks that don't cover each row once.
    """
    if len(meta.shape) != 2:
        raise ValueError(f"{meta.name} has shape {meta.shape}; only matrices can be orthonormalized")
    rows = meta.shape[0]
    unsplit = (meta.role is Role.QKV and not settings.split_qkv) or (
        meta.role is Role.MLP_IN and not settings.split_fc1
    )
    if unsplit or not meta.blocks:
        return (Block("whole", 0, rows, rows),)
    blocks = tuple(sorted(meta.blocks, key=lambda block: block.start))
    period, end = blocks[0].period, 0
    for block in blocks:
        if block.start != end or block.period != period:
            break
        end += block.size
    if end != period or rows % period:
        raise ValueError(f"the blocks of {meta.name} don't cover each of its {rows} rows once: {blocks}")
    return blocks


def block_shape(meta: ParamMeta, block: Block) -> tuple[int, int]:
    """``[out, in]`` of a logical matrix."""
    rows, columns = meta.shape
    return rows // block.period * block.size, columns


def take_block(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """View of a block's rows, ``[rows / period, size, columns]``, in ``[rows, columns]``."""
    rows, columns = tensor.shape
    return tensor.view(rows // block.period, block.period, columns)[:, block.start : block.start + block.size]


def matrices_at_once(numel: int, device: torch.device) -> int:
    """Matrices of ``numel`` elements that go through a home's arithmetic together.

    On a CPU one: results must not depend on which matrices share a home, and so on the layout, by as much as a bit.
    """
    return 1 if device.type == "cpu" else max(1, BATCH_NUMEL // numel)


class MatrixOptimizer(ABC, Generic[SettingsT]):
    """Base of the orthonormalizing optimizers. A subclass holds its update rule and nothing more.

    Each matrix has a home rank (`optim.planner`). Momentum lives on the shard, and in one replica only: the one that
    the home is in. A step advances it and sends shards of the update (and, if the rule asks, of the weight) home,
    where :meth:`compute` sees whole logical blocks; what it returns travels back, in Newton-Schulz's precision
    (`optim.exchange`), and :meth:`apply` changes the shards. So no layout changes the result.

    Args:
        params: this rank's shards and their numbers.
        settings: what all matrices share.
        mesh: the run's mesh; None for a rank alone. Collective over its stage's ranks.
    """

    weight_travels: ClassVar[bool] = False
    """Whether :meth:`compute` needs the weight."""
    home_state: ClassVar[Mapping[str, Kept]] = {}
    """Small states that :meth:`compute` keeps, by kind; they begin at zero."""
    numbers: ClassVar[int] = 0
    """How many fp32 numbers per logical block :meth:`compute` returns beside its matrix."""

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: SettingsT, mesh: Mesh | None) -> None:
        self.settings = settings
        self._params = {param.meta.name: (param, scaling) for param, scaling in params}
        self._blocks = {param.meta.name: logical_blocks(param.meta, settings) for param, _ in params}
        device = params[0][0].value.device if params else torch.device("cpu")
        self._exchange = Exchange(mesh, device, settings.ns_dtype)
        self._weights = Exchange(mesh, device, params[0][0].value.dtype if params else torch.float32)
        metas = [param.meta for param, _ in params]
        costs = [newton_schulz_cost(m.shape, self._blocks[m.name]) for m in metas]
        self.plan = make_plan(metas, costs, self._exchange.ranks)
        self._exchange.check(self.plan)
        self._momentum = {
            a.meta.name: torch.zeros_like(self._params[a.meta.name][0].value)
            for a in self.plan.assignments
            if self._exchange.holds(a.home)
        }
        self._kept = {
            a.meta.name: {kind: self._empty_kept(a.meta, kept, device) for kind, kept in self.home_state.items()}
            for a in self.plan.assignments
            if a.home == self._exchange.rank
        }

    def _empty_kept(self, meta: ParamMeta, kept: Kept, device: torch.device) -> torch.Tensor:
        shape = (meta.shape[0], 1) if kept is Kept.ROWS else (len(self._blocks[meta.name]), meta.shape[1])
        return torch.zeros(shape, device=device)

    @abstractmethod
    def compute(self, whole: Whole) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is computed at home: a matrix like ``update``, and ``[batch, numbers]`` in fp32 or None."""

    @abstractmethod
    def apply(
        self, param: MainParam, scaling: Scaling, result: torch.Tensor, numbers: torch.Tensor, rate: float
    ) -> None:
        """Updates a shard, each value rounded once.

        Args:
            param: the shard.
            scaling: its numbers.
            result: this shard's part of what :meth:`compute` gave.
            numbers: ``[blocks, numbers]``, of all blocks of this matrix.
            rate: learning rate of this step.
        """

    def orthonormal(self, update: torch.Tensor) -> torch.Tensor:
        """Newton-Schulz with these settings, ``[batch, out, in]``."""
        settings = self.settings
        return orthonormalize(update, settings.num_ns_steps, settings.coefficients, settings.ns_dtype)

    def per_row(self, param: MainParam, values: torch.Tensor) -> torch.Tensor:
        """A value per block, ``[blocks]``, as a factor on a shard: 0-d, or ``[rows, 1]`` where there are several."""
        blocks = self._blocks[param.meta.name]
        if len(blocks) == 1:
            return values[0]
        first, count = param.layout.offsets[0], param.layout.local_shape[0]
        place = torch.arange(first, first + count, device=values.device) % blocks[0].period
        ends = torch.arange(blocks[0].period, device=values.device)
        block_of = sum((ends >= block.start).long() for block in blocks[1:])
        return values[block_of[place]][:, None]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at ``factor`` times the peak learning rates. Collective over the ranks that share matrices.

        The exchange of the next chunk and of the last one's results runs beside the arithmetic of this one.
        """
        chunks = self.plan.chunks
        arriving = self._send(chunks[0]) if chunks else None
        returning: Callable[[], None] | None = None
        for number, chunk in enumerate(chunks):
            updates, weights = arriving()
            if number + 1 < len(chunks):
                arriving = self._send(chunks[number + 1])
            results, numbers = self._at_home(updates, weights)
            back = self._exchange.from_homes(chunk, results)
            sizes = {a.meta.name: len(self._blocks[a.meta.name]) * self.numbers for a in chunk}
            told = self._exchange.tell(chunk, sizes, numbers)
            if returning is not None:
                returning()
            returning = partial(self._apply_all, back, told, factor)
        if returning is not None:
            returning()

    def _send(self, chunk: Sequence[Assignment]) -> Callable[[], tuple[dict[str, torch.Tensor], ...]]:
        """Advances the momenta of a chunk and starts updates and weights on their way."""
        names = [a.meta.name for a in chunk if self._exchange.holds(a.home)]
        updates: dict[str, torch.Tensor] = {}
        if names:
            momenta = [self._momentum[name] for name in names]
            grads = gradients([self._params[name][0] for name in names])
            grads = [grad.to(momentum.dtype) for grad, momentum in zip(grads, momenta, strict=True)]
            updates = dict(zip(names, self._advance(momenta, grads), strict=True))
        waits = [self._exchange.to_homes(chunk, updates)]
        if self.weight_travels:
            waits.append(self._weights.to_homes(chunk, {name: self._params[name][0].value for name in names}))
        else:
            waits.append(dict)
        return lambda: tuple(wait() for wait in waits)

    def _advance(self, momenta: list[torch.Tensor], grads: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Adds gradients to momenta, in place, and gives the updates."""
        beta, nesterov = self.settings.momentum, self.settings.nesterov
        if self.settings.momentum_style == "ema":
            torch._foreach_lerp_(momenta, grads, 1 - beta)
            return torch._foreach_lerp(grads, momenta, beta) if nesterov else momenta
        torch._foreach_mul_(momenta, beta)
        torch._foreach_add_(momenta, grads)
        return torch._foreach_add(grads, momenta, alpha=beta) if nesterov else momenta

    def _apply_all(
        self,
        results: Callable[[], dict[str, torch.Tensor]],
        numbers: Callable[[], dict[str, torch.Tensor]],
        factor: float,
    ) -> None:
        """Waits for results and updates the shards."""
        told = numbers()
        for name, result in results().items():
            param, scaling = self._params[name]
            self.apply(param, scaling, result, told[name].view(len(self._blocks[name]), -1), scaling.lr * factor)

    def _at_home(
        self, updates: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Results and numbers of the matrices at home here, by name; logical blocks of one shape go together."""
        alike: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for name in sorted(updates):
            for place, block in enumerate(self._blocks[name]):
                alike.setdefault(block_shape(self._params[name][0].meta, block), []).append((name, place))
        # In the precision that travels, on a rank alone too.
        results = {name: torch.empty_like(update) for name, update in updates.items() if len(self._blocks[name]) > 1}
        numbers = {
            name: torch.zeros(len(self._blocks[name]), self.numbers, device=update.device)
            for name, update in updates.items()
        }
        for shape, places in alike.items():
            at_once = matrices_at_once(math.prod(shape), self._exchange.device)
            for start in range(0, len(places), at_once):
                chosen = places[start : start + at_once]
                kept = {kind: self._stack_kept(chosen, kind) for kind in self.home_state}
                weight = self._stack(weights, chosen, shape) if self.weight_travels else None
                result, said = self.compute(Whole(self._stack(updates, chosen, shape), weight, kept))
                for i, (name, place) in enumerate(chosen):
                    if name in results:
                        target = take_block(results[name], self._blocks[name][place])
                        target.copy_(result[i].view(target.shape))
                    else:
                        results[name] = result[i].to(updates[name].dtype)
                    if said is not None:
                        numbers[name][place] = said[i]
                    for kind, values in kept.items():
                        state = self._kept_part(name, place, kind)
                        state.copy_(values[i].view(state.shape))
        return results, numbers

    def _stack(
        self, whole: dict[str, torch.Tensor], places: list[tuple[str, int]], shape: tuple[int, int]
    ) -> torch.Tensor:
        # Contiguous, for sums over strided memory round otherwise.
        parts = [
            take_block(whole[name], self._blocks[name][place]).reshape(shape).contiguous() for name, place in places
        ]
        return parts[0][None] if len(parts) == 1 else torch.stack(parts)

    def _stack_kept(self, places: list[tuple[str, int]], kind: str) -> torch.Tensor:
        parts = [self._kept_part(name, place, kind) for name, place in places]
        flat = (-1, 1) if self.home_state[kind] is Kept.ROWS else (-1,)
        return torch.stack([part.reshape(flat) for part in parts])

    def _kept_part(self, name: str, place: int, kind: str) -> torch.Tensor:
        """View of a block's share of a small state."""
        state = self._kept[name][kind]
        return take_block(state, self._blocks[name][place]) if self.home_state[kind] is Kept.ROWS else state[place]

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """Live tensors, as ``momentum/<name>`` and ``<kind>/<name>``, each with the place it has in a global tensor.

        Momentum is in storage layout, on the ranks of one replica. A small state is whole, on the home alone; it is
        saved by its parameter's name, so another layout, with another home, loads it there.
        """
        state = {f"momentum/{name}": (self._params[name][0], value) for name, value in self._momentum.items()}
        for name, kinds in self._kept.items():
            for kind, value in kinds.items():
                meta = replace(self._params[name][0].meta, shape=tuple(value.shape), tp_dim=None)
                state[f"{kind}/{name}"] = (MainParam(meta, Layout.alone(meta), value), value)
        return state
