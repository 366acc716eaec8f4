"""What all optimizers of matrices share: momentum on shards, whole matrices at a home rank, updates on shards again."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import ClassVar, Generic, TypeVar

import torch

from megatron_mup.kernels.late import compiled_ahead
from megatron_mup.kernels.shards import (
    Momentum,
    Pieces,
    Shards,
    advance,
    apply,
    can_replay,
    joined_norms,
    move,
)
from megatron_mup.kernels.symmetric import beside_messages
from megatron_mup.optim.batches import (
    Batch,
    lanes_of,
    matrices_at_once,
)
from megatron_mup.optim.blocks import MatrixSettings, block_shape, logical_blocks, take_block
from megatron_mup.optim.chunks import Buffers, Chunk
from megatron_mup.optim.clip import gradients
from megatron_mup.optim.costs import counted_together, kind_of, shared_costs
from megatron_mup.optim.exchange import Exchange, MatrixRanks
from megatron_mup.optim.experts import ExpertPart, ExpertRanks
from megatron_mup.optim.graphs import Lanes, Replays, Work
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.near import HomeMemory, NearChunk
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.optim.placing import Placing
from megatron_mup.optim.planner import make_plan, newton_schulz_cost
from megatron_mup.optim.whole import Kept, Norms, Whole, example
from megatron_mup.parallel.layout import Layout
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.table import Scaling

SettingsT = TypeVar("SettingsT", bound=MatrixSettings)


class MatrixOptimizer(ABC, Generic[SettingsT]):
    """Base of the orthonormalizing optimizers. A subclass holds its update rule and nothing more.

    Each matrix has a home rank (`optim.planner`). Momentum lives on the shard, and in one replica only: the one that
    the home is in. A step advances it and sends shards of the update (and, if the rule asks, of the weight) home,
    where :meth:`compute` sees whole logical blocks; what it returns travels back, in Newton-Schulz's precision, and the
    shards change by :meth:`factors` of it. Ranks that reach each other's memory write and read there (`optim.near`),
    others send messages (`optim.exchange`). So no layout changes the result.

    On a GPU all of it but the messages is replayed from CUDA graphs (`optim.graphs`). What a graph reads and writes
    stays where it is: momenta, states, buffers; gradients and weights are found by tables of addresses.

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
    places_weights: ClassVar[bool] = False
    """Whether a step moves weights to where the rule keeps them, even at rate 0 and with gradients of zero."""
    weight_travels: ClassVar[bool] = False
    """Whether :meth:`compute` needs the weight."""
    home_state: ClassVar[Mapping[str, Kept]] = {}
    """States that :meth:`compute` keeps, by kind, in fp32; they begin at zero."""
    home_momentum: ClassVar[str] = ""
    """The state, of kind `Kept.MATRIX`, that gradients are added to at home; :meth:`compute` gets the sum as update."""
    numbers: ClassVar[int] = 0
    """How many fp32 numbers per logical matrix :meth:`compute` returns beside it."""

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: SettingsT, mesh: MatrixRanks | None) -> None:
        self.settings = settings
        self._params = {param.meta.name: (param, scaling) for param, scaling in params}
        self._blocks = {param.meta.name: logical_blocks(param.meta, settings) for param, _ in params}
        self._ranges = {param.meta.name: self._number(param.meta) for param, _ in params}
        device = params[0][0].value.device if params else torch.device("cpu")
        self._exchange = Exchange(mesh, device)
        make = self._exchange.shared_buffers(settings.reach)
        self._by_messages = make is None and self._exchange.ranks > 1
        metas = [param.meta for param, _ in params]
        homes = [mesh.homes(meta) for meta in metas] if isinstance(mesh, ExpertRanks) else None
        costs, ranks = [self.cost(meta) for meta in metas], self._exchange.ranks
        mode = self.mode if self._exchange.is_cut or ranks == 1 else "replica"
        self._replayed = settings.cuda_graph and can_replay(device)
        if self._replayed:
            self._compile(metas)
        times = self._measured(metas) if settings.measured_costs and ranks > 1 else None
        self.plan = make_plan(metas, costs, ranks, homes, mode, times, near=make is not None)
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
        tensors = [param for param, _ in params]
        placing = Placing(tensors, self._blocks, self._ranges, self.plan, self._exchange, self._at_once)
        self._placing = placing
        self._rates = self.for_all(lambda param, scaling: [scaling.lr] * self._matrices(param.meta.name))
        self._factor = torch.zeros((), device=device)
        self._numbers = torch.zeros(placing.matrices, self.numbers, device=device)
        self._grads, self._values = (Shards(len(params), device) for _ in range(2))
        self._momenta = self._shards_of_momenta(device)
        self._style = Momentum(settings.momentum, settings.momentum_style == "ema", settings.nesterov)
        if self.home_momentum:
            self._style = Momentum(1.0, ema=False, nesterov=False)
        self._chunks: list[Chunk] = []
        self._near_chunks: list[NearChunk] = []
        weights = params[0][0].value.dtype if self.weight_travels and params else None
        if make is None:
            self._chunks = [placing.chunk(chunk) for chunk in self.plan.chunks]
            if self._chunks and ranks > 1:
                self._buffers = [Buffers(self._chunks, settings.ns_dtype, weights, device) for _ in range(2)]
        elif self.plan.chunks:
            self._near_chunks = [placing.near_chunk(chunk) for chunk in self.plan.chunks]
            self._memory = HomeMemory(
                make,
                self._exchange.rank,
                ranks,
                max(chunk.longest for chunk in self._near_chunks),
                settings.ns_dtype,
                weights if self._exchange.is_cut else None,
                (placing.matrices, self.numbers),
                len(self._near_chunks),
            )
        self._replays = Replays(device, self._replayed)
        self._lanes = Lanes(device, lanes_of(ranks))

    @property
    def transport(self) -> str | None:
        """What brings matrices to their homes and results back, in words; None for a rank alone."""
        if self._exchange.ranks == 1:
            return None
        return "collectives" if self._by_messages else "loads and stores in each other's memory"

    def _shards_of_momenta(self, device: torch.device) -> Shards | None:
        """The momenta, on shards or at home, in the order of parameters; nothing for those that are kept elsewhere."""
        if not (self.momentum_on_shards or self.home_momentum) or not self._params:
            return None
        momenta, kept = Shards(len(self._params), device), self._momentum
        if self.home_momentum:
            kept = {name: kinds[self.home_momentum] for name, kinds in self._kept.items()}
        dtype = next(iter(kept.values())).dtype if kept else torch.float32
        nothing = torch.empty(0, device=device, dtype=dtype)
        momenta.set([kept.get(name, nothing) for name in self._params])
        return momenta

    def _number(self, meta: ParamMeta) -> list[range]:
        """The logical matrices of a tensor are numbered through; here are those of each block."""
        ranges, end = [], 0
        for block in self._blocks[meta.name]:
            ranges.append(range(end, end + block.matrices(meta.shape[0])[0]))
            end = ranges[-1].stop
        return ranges

    def _matrices(self, name: str) -> int:
        return self._ranges[name][-1].stop

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

    def _measured(self, metas: Sequence[ParamMeta]) -> list[float]:
        """Milliseconds of one step over each tensor's logical matrices (`optim.costs`). Collective."""
        exchange, counts = self._exchange, self._counts(metas)
        together, kind = counted_together(counts, exchange.ranks, self._at_once), kind_of(self, self.settings)
        times = shared_costs(together, kind, self._example, exchange.device, exchange.group, self._replayed)
        return [sum(times[shape] * count for shape, count in counter.items()) for counter in counts]

    def _compile(self, metas: Sequence[ParamMeta]) -> None:
        """Has the kernels for matrices of all shapes compiled side by side; one after another they take seconds."""
        together = counted_together(self._counts(metas), self._exchange.ranks, self._at_once)
        with compiled_ahead(self._exchange.device):
            for shape, count in together.items():
                self._example(count, shape)()

    def _counts(self, metas: Sequence[ParamMeta]) -> list[Counter[tuple[int, int]]]:
        """Logical matrices of each shape in each tensor."""
        counts = []
        for meta in metas:
            blocks = zip(self._blocks[meta.name], self._ranges[meta.name], strict=True)
            counts.append(sum((Counter({block_shape(meta, b): len(numbers)}) for b, numbers in blocks), Counter()))
        return counts

    def _example(self, count: int, shape: tuple[int, int]) -> Work:
        """The arithmetic on some matrices of a shape."""
        weight = next(iter(self._params.values()))[0].value.dtype if self.weight_travels else None
        kept = {kind: self._kept_shape(form, shape) for kind, form in self.home_state.items()}
        whole = example(count, shape, self.settings.ns_dtype, weight, kept, self._exchange.device)
        return lambda: self._computed(whole) and None

    def _computed(self, whole: Whole) -> tuple[torch.Tensor, torch.Tensor | None]:
        with beside_messages(self._by_messages):
            return self.compute(whole)

    def _kept_shape(self, kept: Kept, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of a logical matrix's part of a state."""
        match kept:
            case Kept.ROWS:
                return (shape[0], 1)
            case Kept.INPUTS:
                return shape[1:]
            case Kept.MATRIX:
                return shape
        return self.basis_shape(*shape)

    @abstractmethod
    def compute(self, whole: Whole) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is computed at home: a matrix like ``update``, and ``[batch, numbers]`` in fp32 or None.

        Nothing in it waits for the device or depends on anything but these tensors: a CUDA graph replays it.
        """

    @abstractmethod
    def factors(self, rates: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors ``gain`` and ``change`` in ``W <- W + (gain R + change W)``, R being what :meth:`compute` gave.

        Args:
            rates: fp32 ``[matrices]``, learning rate of each of this optimizer's logical matrices.
            numbers: ``[matrices, numbers]``, what :meth:`compute` said of them.

        Returns:
            fp32 ``[matrices]`` each.
        """

    def orthonormal(self, whole: Whole) -> torch.Tensor:
        """The update's orthonormal factor by Newton-Schulz with these settings, ``[batch, out, in]``."""
        own = self.settings
        return orthonormalize(
            whole.update, own.num_ns_steps, own.coefficients, own.ns_dtype, norm=whole.norms[0], out=whole.room
        )

    def per_matrix(self, meta: ParamMeta, value: Callable[[int, int], float]) -> list[float]:
        """A function of ``[out, in]`` for each logical matrix."""
        blocks = zip(self._blocks[meta.name], self._ranges[meta.name], strict=True)
        return [value(*block_shape(meta, block)) for block, numbers in blocks for _ in numbers]

    def for_all(self, values: Callable[[MainParam, Scaling], Sequence[float]]) -> torch.Tensor:
        """Fp32 ``[matrices]`` from the numbers of each parameter's logical matrices."""
        found = [values(*self._params[a.meta.name]) for a in self.plan.assignments]
        return torch.tensor([number for numbers in found for number in numbers], device=self._exchange.device)

    def _at_once(self, shape: tuple[int, int], *count: int) -> int:
        size, exchange = self.settings.ns_dtype.itemsize * math.prod(shape), self._exchange
        return matrices_at_once(size, exchange.device, lanes_of(exchange.ranks) if self._by_messages else 1, *count)

    @torch.no_grad()
    def step(self, factor: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """One step at ``factor`` times the peak learning rates. Collective over the ranks that share matrices.

        Args:
            factor: of the rates.
            meanwhile: work on other tensors, to be launched while the first matrices travel.
        """
        params = [param for param, _ in self._params.values()]
        self._grads.set_copies(gradients(params))
        self._values.set([param.value for param in params])
        self._factor.fill_(factor)
        if self._by_messages:
            self._together(meanwhile)
        else:
            work = self._near if self._near_chunks else self._alone
            self._replays(("step", self._grads.dtype), work)
            meanwhile()
        self._grads.forget()

    def _alone(self) -> None:
        """A step of a rank that has all matrices whole."""
        for chunk in self._chunks:
            self._lanes([(b.cost, partial(self._step_batch, chunk, i)) for i, b in enumerate(chunk.batches)])

    def _step_batch(self, chunk: Chunk, number: int) -> None:
        batch, pieces = chunk.batches[number], chunk.packing[number]
        result = self._at_home(batch, pieces, *self._pack_whole(batch, pieces))
        apply(self._values, result.view(-1), pieces, *self._factors())

    def _near(self) -> None:
        """A step among ranks that reach each other's memory."""
        self._memory.barrier()  # all have read the results of the step before
        for number, chunk in enumerate(self._near_chunks):
            areas = self._memory.areas(number)
            if self._exchange.is_cut:
                momenta = None if self.home_momentum else self._momenta
                advance(self._grads, momenta, areas, chunk.outward, self._style)
                if self.weight_travels:
                    advance(self._values, None, self._memory.weights, chunk.outward, self._style)
                self._memory.barrier()
            self._numbers[chunk.matrices].zero_()
            for place in range(len(chunk.batches)):
                self._near_batch(number, place)
            self._memory.say(self._numbers, chunk.matrices)
            self._memory.barrier()
            self._memory.hear(self._numbers, chunk.matrices)
            apply(self._values, areas, chunk.back, *self._factors())

    def _near_batch(self, number: int, place: int) -> None:
        """The arithmetic of a batch at home here; its result takes the place of the update."""
        chunk, own = self._near_chunks[number], self._exchange.rank
        batch, pieces, begin = chunk.batches[place], chunk.packing[place], chunk.begins[place]
        here = self._memory.areas(number).tensors[own][begin : begin + batch.numel].view(-1, *batch.shape)
        if self._exchange.is_cut:
            weight = None
            if self.weight_travels:
                weight = self._memory.weights.tensors[own][begin : begin + batch.numel].view(here.shape)
            if self.home_momentum:
                self._feed_momenta(pieces, here)
            result = self._at_home(batch, pieces, here, weight, (None, None), here)
        else:
            result = self._at_home(batch, pieces, *self._pack_whole(batch, pieces), here)
        if result.data_ptr() != here.data_ptr():
            here.copy_(result.view(here.shape))

    def _feed_momenta(self, pieces: Pieces, update: torch.Tensor) -> None:
        """Adds gradients to momenta that are kept at home, which take the gradients' place."""
        assert self._momenta is not None
        self._change_momenta(pieces, update, 1.0)
        advance(self._momenta, None, update.view(-1), pieces, self._style)

    def _together(self, meanwhile: Callable[[], None]) -> None:
        """A step with others.

        The exchange of the next chunk and of the last one's results runs beside the arithmetic of this one.
        """
        if not self._chunks:
            meanwhile()
            return
        dtype = self._grads.dtype
        following = self._send(0)
        meanwhile()
        returning: Callable[[], None] | None = None
        for number, chunk in enumerate(self._chunks):
            arriving = following
            if number + 1 < len(self._chunks):
                following = self._send(number + 1)
            arriving()
            buffers = self._buffers[number % 2]
            self._replays(("home", number, dtype), partial(self._home, chunk, buffers))
            back = self._exchange.start(chunk.back, buffers.results)
            told = self._exchange.start_sum(self._numbers[chunk.matrices])
            if returning is not None:
                returning()
            returning = partial(self._finish, number, back, told)
        if returning is not None:
            returning()

    def _send(self, number: int) -> Callable[[], None]:
        """Advances the momenta of a chunk and starts updates and weights on their way."""
        if not self._exchange.is_cut:
            return lambda: None
        chunk, buffers = self._chunks[number], self._buffers[number % 2]
        self._replays(("send", number, self._grads.dtype), partial(self._pack, chunk, buffers))
        waits = [self._exchange.start(chunk.homeward, buffers.updates)]
        if self.weight_travels:
            waits.append(self._exchange.start(chunk.homeward, buffers.weights))

        def wait() -> None:
            for one in waits:
                one()

        return wait

    def _pack(self, chunk: Chunk, buffers: Buffers) -> None:
        """Fills the buffers that a chunk's shards travel in."""
        momenta = None if self.home_momentum else self._momenta
        advance(self._grads, momenta, buffers.updates, chunk.shards, self._style)
        if self.weight_travels:
            advance(self._values, None, buffers.weights, chunk.shards, self._style)

    def _home(self, chunk: Chunk, buffers: Buffers) -> None:
        """The arithmetic of a chunk's matrices whose home is here, from what arrived to what goes back."""
        if self.numbers:
            self._numbers[chunk.matrices].zero_()
        self._lanes([(b.cost, partial(self._home_batch, chunk, i, buffers)) for i, b in enumerate(chunk.batches)])

    def _home_batch(self, chunk: Chunk, number: int, buffers: Buffers) -> None:
        batch, pieces = chunk.batches[number], chunk.packing[number]
        if self._exchange.is_cut:
            update, weight, norms = self._unpack(chunk, number, buffers)
            if self.home_momentum:
                self._feed_momenta(pieces, update)
                norms = (None, None)
        else:
            update, weight, norms = self._pack_whole(batch, pieces)
        result = self._at_home(batch, pieces, update, weight, norms).view(-1)
        move(result, buffers.results, chunk.repacking[number])
        apply(self._values, result, chunk.kept[number], *self._factors())

    def _unpack(self, chunk: Chunk, number: int, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor | None, Norms]:
        """Whole matrices of a batch from the shards here and those that arrived, as :meth:`_pack_whole` gives them."""
        batch, here, arrived = chunk.batches[number], chunk.kept[number], chunk.unpacking[number]
        momenta = None if self.home_momentum else self._momenta

        def together(
            own: Shards, momenta: Shards | None, buffer: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            out = torch.empty(batch.numel, dtype=buffer.dtype, device=buffer.device)
            norms = (
                advance(own, momenta, out, here, self._style, batch.matrices),
                move(buffer, out, arrived, batch.matrices),
            )
            return out.view(-1, *batch.shape), joined_norms(*norms)

        update, norm = together(self._grads, momenta, buffers.updates)
        if not self.weight_travels:
            return update, None, (norm, None)
        weight, weight_norm = together(self._values, None, buffers.weights)
        return update, weight, (norm, weight_norm)

    def _finish(self, number: int, back: Callable[[], None], told: Callable[[], None]) -> None:
        """Waits for a chunk's results and updates the shards."""
        back()
        told()
        chunk, buffers = self._chunks[number], self._buffers[number % 2]

        def work() -> None:
            apply(self._values, buffers.results, chunk.results, *self._factors())

        self._replays(("finish", number, self._grads.dtype), work)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.factors(self._rates * self._factor, self._numbers)

    def _change_momenta(self, pieces: Pieces, change: torch.Tensor, factor: float) -> None:
        """Adds a multiple of a batch to momenta that are kept at home."""
        assert self._momenta is not None
        rates = torch.full_like(self._rates, factor)
        apply(self._momenta, change.view(-1), pieces, rates, torch.zeros_like(rates))

    def _pack_whole(self, batch: Batch, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor | None, Norms]:
        """Updates, and weights if the rule asks for them, of whole matrices that are here; advances the momenta."""
        update = torch.empty(batch.numel, dtype=self.settings.ns_dtype, device=self._exchange.device)
        norm = advance(self._grads, self._momenta, update, pieces, self._style, batch.matrices)
        weight, weight_norm = None, None
        if self.weight_travels:
            weight = torch.empty(batch.numel, dtype=self._values.dtype, device=update.device)
            weight_norm = advance(self._values, None, weight, pieces, self._style, batch.matrices)
            weight = weight.view(-1, *batch.shape)
        return update.view(-1, *batch.shape), weight, (norm, weight_norm)

    def _at_home(
        self,
        batch: Batch,
        pieces: Pieces,
        update: torch.Tensor,
        weight: torch.Tensor | None,
        norms: Norms,
        room: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The result of a batch in the precision that travels, on a rank alone too; numbers and states are kept."""
        kinds = [kind for kind in self.home_state if kind != self.home_momentum]
        kept = {kind: torch.cat([self._kept_part(*p, kind) for p in batch.places]) for kind in kinds}
        result, said = self._computed(Whole(update, weight, kept, partial(self._change_momenta, pieces), norms, room))
        end = 0
        for name, place in batch.places:
            own, first = self._ranges[name][place], self._placing.first[name]
            mine, end = slice(end, end + len(own)), end + len(own)
            if said is not None:
                self._numbers[first + own.start : first + own.stop] = said[mine]
            for kind, values in kept.items():
                self._kept_part(name, place, kind, values[mine])
        return result.to(self.settings.ns_dtype).contiguous()

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
            return {key: (part.rows(value, length), value)}
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

    def gather_state(self) -> None:
        """Brings parts of the state that replicas keep for themselves together, where there are such. Collective."""

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
                param = param.momentum(value)
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
