"""What all optimizers of matrices share: momentum on shards, whole matrices at a home rank, updates on shards again."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from itertools import pairwise
from typing import ClassVar, Generic, TypeVar

import torch

from megatron_mup.optim.clip import gradients
from megatron_mup.optim.exchange import Exchange, MatrixRanks
from megatron_mup.optim.experts import ExpertPart, ExpertRanks
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.optim.planner import Assignment, make_plan, newton_schulz_cost
from megatron_mup.parallel.layout import Layout
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
    split_heads: bool = False
    split_fc1: bool = True
    ns_dtype: torch.dtype = torch.float32


SettingsT = TypeVar("SettingsT", bound=MatrixSettings)


class Kept(Enum):
    """Shape of a state that stays at a matrix's home."""

    ROWS = auto()
    """One number per row of the matrix: ``[rows, 1]``."""
    INPUTS = auto()
    """One vector over the columns for each logical matrix: ``[matrices, columns]``."""
    MATRIX = auto()
    """As the matrix: ``[rows, columns]``."""
    BASIS = auto()
    """A factor for each logical matrix, `MatrixOptimizer.basis_shape`: flat, one after the other."""


@dataclass(frozen=True)
class Whole:
    """Logical matrices of one shape, whole, at their home.

    Attributes:
        update: ``[batch, out, in]``, what is to be made orthonormal.
        weight: ``[batch, out, in]`` in the optimizer's precision, if the rule asks for it.
        kept: states by kind, written in place: ``[batch, out, 1]`` (rows), ``[batch, in]`` (inputs),
            ``[batch, out, in]`` (matrix) or ``[batch, *basis_shape]`` (basis).
    """

    update: torch.Tensor
    weight: torch.Tensor | None
    kept: Mapping[str, torch.Tensor]


def logical_blocks(meta: ParamMeta, settings: MatrixSettings) -> tuple[Block, ...]:
    """The matrices that are orthonormalized apart; the whole tensor is one block where it isn't split.

    With ``split_heads`` each head of query, key and value is a matrix.

    Raises:
        ValueError: not a matrix, or blocks that don't cover each row once.
    """
    if len(meta.shape) != 2:
        raise ValueError(f"{meta.name} has shape {meta.shape}; only matrices can be orthonormalized")
    rows = meta.shape[0]
    unsplit = (meta.role is Role.QKV and not settings.split_qkv) or (
        meta.role is Role.MLP_IN and not settings.split_fc1
    )
    if meta.role is Role.EXPERT_IN and not settings.split_fc1:
        return (Block("whole", 0, meta.fan_out, meta.fan_out, apart=True),)
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
    if meta.role is Role.QKV and settings.split_heads:
        return tuple(head for block in blocks for head in _heads(block))
    return blocks


def _heads(block: Block) -> list[Block]:
    """Each head of a period apart."""
    size = block.size // block.heads
    return [
        replace(block, name=f"{block.name}.{i}", start=block.start + i * size, size=size, apart=True, heads=1)
        for i in range(block.heads)
    ]


def block_shape(meta: ParamMeta, block: Block) -> tuple[int, int]:
    """``[out, in]`` of a block's logical matrices."""
    rows, columns = meta.shape
    return block.matrices(rows)[1], columns


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
        mesh: the ranks that share the matrices: the run's mesh, or `ExpertRanks`; None for a rank alone. Collective
            over them.
    """

    mode: ClassVar[str] = "owner"
    """How cut matrices come together, see `planner.Assignment`."""
    momentum_on_shards: ClassVar[bool] = True
    """Whether shards hold the momentum and send the update home; otherwise they send the gradient."""
    batch_growth: ClassVar[int] = 1
    """How many times as many matrices go through :meth:`compute` at once as through Newton-Schulz alone."""
    places_weights: ClassVar[bool] = False
    """Whether a step moves weights to where the rule keeps them, even at rate 0 and with gradients of zero."""
    weight_travels: ClassVar[bool] = False
    """Whether :meth:`compute` needs the weight."""
    home_state: ClassVar[Mapping[str, Kept]] = {}
    """States that :meth:`compute` keeps, by kind, in fp32; they begin at zero."""
    numbers: ClassVar[int] = 0
    """How many fp32 numbers per logical matrix :meth:`compute` returns beside it."""

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: SettingsT, mesh: MatrixRanks | None) -> None:
        self.settings = settings
        self._params = {param.meta.name: (param, scaling) for param, scaling in params}
        self._blocks = {param.meta.name: logical_blocks(param.meta, settings) for param, _ in params}
        self._ranges = {param.meta.name: self._number(param.meta) for param, _ in params}
        self._matrix_of_row = {param.meta.name: self._find_rows(param) for param, _ in params}
        device = params[0][0].value.device if params else torch.device("cpu")
        self._exchange = Exchange(mesh, device, settings.ns_dtype)
        self._weights = Exchange(mesh, device, params[0][0].value.dtype if params else torch.float32)
        metas = [param.meta for param, _ in params]
        homes = [mesh.homes(meta) for meta in metas] if isinstance(mesh, ExpertRanks) else None
        costs, ranks = [self.cost(meta) for meta in metas], self._exchange.ranks
        mode = self.mode if self._exchange.is_cut or ranks == 1 else "replica"
        self.plan = make_plan(metas, costs, ranks, homes, mode)
        self._exchange.check(self.plan)
        self._momentum = {
            a.meta.name: torch.zeros_like(self._params[a.meta.name][0].value)
            for a in self.plan.assignments
            if self.momentum_on_shards and self._exchange.holds(a.home)
        }
        self._kept = {
            a.meta.name: {kind: self._empty_kept(a.meta, kept, device) for kind, kept in self.home_state.items()}
            for a in self.plan.assignments
            if a.home == self._exchange.rank
        }

    def _number(self, meta: ParamMeta) -> list[range]:
        """The logical matrices of a tensor are numbered through; here are those of each block."""
        ranges, end = [], 0
        for block in self._blocks[meta.name]:
            ranges.append(range(end, end + block.matrices(meta.shape[0])[0]))
            end = ranges[-1].stop
        return ranges

    def _matrices(self, name: str) -> int:
        return self._ranges[name][-1].stop

    def _find_rows(self, param: MainParam) -> torch.Tensor | None:
        """Number of the logical matrix that each row of a shard belongs to; None where there is but one."""
        name = param.meta.name
        if self._matrices(name) == 1:
            return None
        first, count = param.layout.offsets[0], param.layout.local_shape[0]
        rows = torch.arange(first, first + count, device=param.value.device)
        number = torch.zeros_like(rows)
        for block, numbers in zip(self._blocks[name], self._ranges[name], strict=True):
            place = rows % block.period
            own = numbers.start + (rows // block.period if block.apart else 0)
            number = torch.where((place >= block.start) & (place < block.start + block.size), own, number)
        return number

    def _empty_kept(self, meta: ParamMeta, kept: Kept, device: torch.device) -> torch.Tensor:
        rows, columns = meta.shape
        match kept:
            case Kept.ROWS:
                return torch.zeros(rows, 1, device=device)
            case Kept.INPUTS:
                return torch.zeros(self._matrices(meta.name), columns, device=device)
            case Kept.MATRIX:
                return torch.zeros(rows, columns, device=device)
        return torch.zeros(self._basis_starts(meta)[-1], device=device)

    def basis_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the `Kept.BASIS` state of a logical ``[rows, columns]`` matrix."""
        raise NotImplementedError

    def _basis_starts(self, meta: ParamMeta) -> list[int]:
        """Where each block's factors begin in the flat state, and where the last ones end."""
        starts = [0]
        for block, numbers in zip(self._blocks[meta.name], self._ranges[meta.name], strict=True):
            starts.append(starts[-1] + len(numbers) * math.prod(self.basis_shape(*block_shape(meta, block))))
        return starts

    def cost(self, meta: ParamMeta) -> float:
        """Multiply-adds of one step over a tensor's logical matrices."""
        return self.settings.num_ns_steps * newton_schulz_cost(meta.shape, self._blocks[meta.name])

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
            numbers: ``[matrices, numbers]``, of all logical matrices of this parameter.
            rate: learning rate of this step.
        """

    def orthonormal(self, update: torch.Tensor) -> torch.Tensor:
        """Newton-Schulz with these settings, ``[batch, out, in]``."""
        settings = self.settings
        return orthonormalize(update, settings.num_ns_steps, settings.coefficients, settings.ns_dtype)

    def per_row(self, param: MainParam, values: torch.Tensor) -> torch.Tensor:
        """A value per logical matrix, as a factor on a shard: 0-d, or ``[rows, 1]`` where there are several."""
        number = self._matrix_of_row[param.meta.name]
        return values[0] if number is None else values[number][:, None]

    def per_matrix(self, meta: ParamMeta, value: Callable[[int, int], float]) -> list[float]:
        """A function of ``[out, in]`` for each logical matrix."""
        blocks = zip(self._blocks[meta.name], self._ranges[meta.name], strict=True)
        return [value(*block_shape(meta, block)) for block, numbers in blocks for _ in numbers]

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
            sizes = {a.meta.name: self._matrices(a.meta.name) * self.numbers for a in chunk}
            told = self._exchange.tell(chunk, sizes, numbers)
            if returning is not None:
                returning()
            returning = partial(self._apply_all, back, told, factor)
        if returning is not None:
            returning()

    def _send(self, chunk: Sequence[Assignment]) -> Callable[[], tuple[dict[str, torch.Tensor], ...]]:
        """Advances the momenta of a chunk and starts updates and weights on their way."""
        names = [a.meta.name for a in chunk if self._exchange.holds(a.home)]
        updates: Sequence[torch.Tensor] = gradients([self._params[name][0] for name in names])
        if names and self.momentum_on_shards:
            momenta = [self._momentum[name] for name in names]
            grads = [grad.to(momentum.dtype) for grad, momentum in zip(updates, momenta, strict=True)]
            updates = self._advance(momenta, grads)
        waits = [self._exchange.to_homes(chunk, dict(zip(names, updates, strict=True)))]
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
            self.apply(param, scaling, result, told[name].view(self._matrices(name), -1), scaling.lr * factor)

    def _at_home(
        self, updates: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Results and numbers of the matrices at home here, by name; logical matrices of one shape go together."""
        alike: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for name in sorted(updates):
            for place, block in enumerate(self._blocks[name]):
                alike.setdefault(block_shape(self._params[name][0].meta, block), []).append((name, place))
        # In the precision that travels, on a rank alone too.
        results = {name: torch.empty_like(update) for name, update in updates.items() if len(self._blocks[name]) > 1}
        numbers = {
            name: torch.zeros(self._matrices(name), self.numbers, device=update.device)
            for name, update in updates.items()
        }
        for shape, places in alike.items():
            for chosen in self._batches(shape, places):
                kept = {kind: torch.cat([self._kept_part(*p, kind) for p in chosen]) for kind in self.home_state}
                weight = self._stack(weights, chosen, shape) if self.weight_travels else None
                result, said = self.compute(Whole(self._stack(updates, chosen, shape), weight, kept))
                end = 0
                for name, place in chosen:
                    own = self._ranges[name][place]
                    mine, end = slice(end, end + len(own)), end + len(own)
                    if name in results:
                        target = take_block(results[name], self._blocks[name][place])
                        target.copy_(result[mine].reshape(target.shape))
                    else:
                        results[name] = result[mine].reshape(updates[name].shape).to(updates[name].dtype)
                    if said is not None:
                        numbers[name][own.start : own.stop] = said[mine]
                    for kind, values in kept.items():
                        self._kept_part(name, place, kind, values[mine])
        return results, numbers

    def _batches(self, shape: tuple[int, int], places: list[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
        """Blocks whose matrices go through a home's arithmetic together; those of one block always do."""
        limit = matrices_at_once(math.ceil(math.prod(shape) / self.batch_growth), self._exchange.device)
        size, batch = 0, list[tuple[str, int]]()
        for name, place in places:
            count = len(self._ranges[name][place])
            if batch and size + count > limit:
                yield batch
                size, batch = 0, []
            size += count
            batch.append((name, place))
        yield batch

    def _stack(
        self, whole: dict[str, torch.Tensor], places: list[tuple[str, int]], shape: tuple[int, int]
    ) -> torch.Tensor:
        # Contiguous, for sums over strided memory round otherwise.
        parts = [
            take_block(whole[name], self._blocks[name][place]).reshape(-1, *shape).contiguous()
            for name, place in places
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _kept_part(self, name: str, place: int, kind: str, new: torch.Tensor | None = None) -> torch.Tensor:
        """A block's share of a state, ``[matrices, ...]``; overwritten with ``new`` if that is given."""
        state, meta = self._kept[name][kind], self._params[name][0].meta
        own, (rows, columns) = self._ranges[name][place], block_shape(meta, self._blocks[name][place])
        shape: tuple[int, ...]
        match self.home_state[kind]:
            case Kept.INPUTS:
                part, shape = state[own.start : own.stop], (columns,)
            case Kept.BASIS:
                start, stop = self._basis_starts(meta)[place : place + 2]
                part, shape = state[start:stop], self.basis_shape(rows, columns)
            case _:
                part, shape = take_block(state, self._blocks[name][place]), (rows, state.shape[1])
        if new is not None:
            part.copy_(new.reshape(part.shape))
        return part.reshape(-1, *shape)

    def _kept_of_part(
        self, part: ExpertPart, kind: str, value: torch.Tensor
    ) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """A state of some experts, as pieces of all experts': by row, or by block and expert in it."""
        every, key = part.whole.meta.experts, f"{kind}/{part.meta.name}"
        assert every is not None
        kept, length = self.home_state[kind], len(value) // part.experts * every
        if kept in (Kept.ROWS, Kept.MATRIX):
            return {key: (part.saved(value, part.first_expert * (length // every), length), value)}
        if kept is Kept.INPUTS:
            starts = [*(own.start for own in self._ranges[part.meta.name]), len(value)]
        else:
            starts = self._basis_starts(part.meta)
        pieces, begin = {}, 0
        for place, (start, stop) in enumerate(pairwise(starts)):
            each, piece = (stop - start) // part.experts, value[start:stop]
            pieces[f"{key}/{place}"] = (part.saved(piece, begin + part.first_expert * each, length), piece)
            begin += each * every
        return pieces

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """Live tensors, as ``momentum/<name>`` and ``<kind>/<name>``, each with the place it has in a global tensor.

        Momentum is in storage layout, on the ranks of one replica. What is kept at home is whole, on the home alone;
        it is saved by its parameter's name, so another layout, with another home, loads it there. Parts of a tensor of
        experts are saved as the places that they have in the tensor's state.
        """
        state: dict[str, tuple[MainParam, torch.Tensor]] = {}
        for name, value in self._momentum.items():
            param = self._params[name][0]
            if isinstance(param, ExpertPart):
                param = param.saved(value, param.whole.layout.offsets[0] + param.start, param.whole.meta.shape[0])
            state[f"momentum/{name}"] = (param, value)
        for name, kinds in self._kept.items():
            param = self._params[name][0]
            for kind, value in kinds.items():
                if isinstance(param, ExpertPart):
                    state |= self._kept_of_part(param, kind, value)
                    continue
                meta = replace(param.meta, shape=tuple(value.shape), tp_dim=None)
                state[f"{kind}/{name}"] = (MainParam(meta, Layout.alone(meta), value), value)
        return state
