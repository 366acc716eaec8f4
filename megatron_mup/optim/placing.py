"""Where the rows of logical matrices are: in tensors and their shards, in batches at home, and on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from megatron_mup.kernels.shards import Piece, Pieces, is_unaligned
from megatron_mup.optim.batches import (
    Batch,
    Run,
    arriving_pieces,
    make_batches,
    pieces_of_parcel,
    pieces_of_runs,
    runs_of_block,
    turned,
)
from megatron_mup.optim.blocks import block_shape
from megatron_mup.optim.chunks import Chunk
from megatron_mup.optim.exchange import Exchange, Parcel
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.near import NearChunk, begins_of
from megatron_mup.optim.planner import Assignment, Plan
from megatron_mup.parametrization.meta import Block


class Placing:
    """Tables of what a step moves, for the chunks of a plan.

    Args:
        params: the tensors, in the order of their numbers.
        blocks: of each tensor, by name.
        ranges: numbers of each block's logical matrices among the tensor's.
        plan: says which tensors are together, and where.
        exchange: between the ranks that share them.
        at_once: how many of some matrices of a shape go through a home's arithmetic together.

    Attributes:
        first: number of each tensor's first logical matrix among all.
        matrices: how many there are in all.
    """

    def __init__(
        self,
        params: Sequence[MainParam],
        blocks: Mapping[str, Sequence[Block]],
        ranges: Mapping[str, Sequence[range]],
        plan: Plan,
        exchange: Exchange,
        at_once: Callable[[tuple[int, int], int], int],
    ) -> None:
        self._blocks, self._ranges, self._exchange, self._at_once = blocks, ranges, exchange, at_once
        self._metas = {param.meta.name: param.meta for param in params}
        self._tensor = {param.meta.name: number for number, param in enumerate(params)}
        self._unaligned = {number for number, param in enumerate(params) if is_unaligned(param.value)}
        self.first, self.matrices = dict[str, int](), 0
        for assignment in plan.assignments:
            name = assignment.meta.name
            self.first[name], self.matrices = self.matrices, self.matrices + ranges[name][-1].stop

    def chunk(self, chunk: Sequence[Assignment]) -> Chunk:
        """What there is to do for a chunk, here and between ranks."""
        exchange = self._exchange
        batches = self._make_batches([a.meta.name for a in chunk if a.home == exchange.rank])
        runs, packing = self._laid_out(batches), self._packing(batches)
        homeward, back = exchange.to_homes(chunk), exchange.from_homes(chunk)
        shards = [Piece(self._tensor[p.name], 0, p.place, p.numel, 0) for p in homeward.sent.parcels]
        results = [
            piece
            for parcel in back.got.parcels
            for place in range(len(self._blocks[parcel.name]))
            for piece in pieces_of_parcel(self._tensor[parcel.name], self.runs(parcel.name, place), parcel)
        ]
        kept, unpacking, repacking = list[Pieces](), list[Pieces](), list[Pieces]()
        for number, batch in enumerate(batches if exchange.ranks > 1 else []):
            way = partial(arriving_pieces, number, batch.shape[1], runs)
            here = [
                replace(p, tensor=self._tensor[own.name], start=p.start - own.place)
                for own in back.kept.parcels
                for p in way([own])
            ]
            kept.append(self.as_pieces(here))
            unpacking.append(Pieces(way(homeward.got.parcels), exchange.device))
            repacking.append(Pieces(turned(way(back.sent.parcels)), exchange.device))
        ends = self.as_pieces(shards), self.as_pieces(results)
        return Chunk(self._numbers_of(chunk), batches, packing, kept, unpacking, repacking, homeward, back, *ends)

    def near_chunk(self, chunk: Sequence[Assignment]) -> NearChunk:
        """The same where ranks reach each other's memory."""
        exchange, sent, pieces, longest = self._exchange, list[Piece](), list[Piece](), 0
        for home in range(exchange.ranks):
            metas = {a.meta.name: a.meta for a in chunk if a.home == home}
            batches = self._make_batches(list(metas))
            runs, begins, first = self._laid_out(batches), begins_of(batches), len(pieces)
            parcels = [Parcel(name, *exchange.bounds(meta, exchange.rank), 0) for name, meta in metas.items()]
            for number, (batch, begin) in enumerate(zip(batches, begins, strict=False)):
                for parcel in parcels:
                    found = arriving_pieces(number, batch.shape[1], runs, [parcel])
                    tensor = self._tensor[parcel.name]
                    pieces += [replace(p, tensor=tensor, place=begin + p.place, buffer=home) for p in found]
            if exchange.holds(home):
                sent += pieces[first:]
            longest = max(longest, begins[-1])
            if home == exchange.rank:
                here = batches, begins[:-1], self._packing(batches)
        back = self.as_pieces(pieces)
        outward = back if len(sent) == len(pieces) else self.as_pieces(sent)
        return NearChunk(self._numbers_of(chunk), *here, outward, back, longest)

    def _numbers_of(self, chunk: Sequence[Assignment]) -> slice:
        """The logical matrices of a chunk."""
        start = self.first[chunk[0].meta.name]
        return slice(start, start + sum(self._ranges[a.meta.name][-1].stop for a in chunk))

    def _laid_out(self, batches: Sequence[Batch]) -> dict[str, list[Run]]:
        """Where the rows of each tensor are in batches."""
        runs: dict[str, list[Run]] = {}
        for number, batch in enumerate(batches):
            row = 0
            for name, place in batch.places:
                found = [replace(run, batch=number, row=row + run.row) for run in self.runs(name, place)]
                runs.setdefault(name, []).extend(found)
                row += len(self._ranges[name][place]) * batch.shape[0]
        return runs

    def _packing(self, batches: Sequence[Batch]) -> list[Pieces]:
        """By batch, where its rows are in whole tensors."""
        runs, packing = self._laid_out(batches), []
        for number, batch in enumerate(batches):
            pieces = []
            for name in dict.fromkeys(name for name, _ in batch.places):
                here = (run for run in runs[name] if run.batch == number)
                pieces += pieces_of_runs(self._tensor[name], here, batch.shape[1])
            packing.append(self.as_pieces(pieces))
        return packing

    def as_pieces(self, pieces: Sequence[Piece]) -> Pieces:
        """Pieces of these parameters."""
        return Pieces(pieces, self._exchange.device, self._unaligned)

    def _make_batches(self, names: Sequence[str]) -> list[Batch]:
        """Groups of the logical matrices of tensors whose home is here."""
        places = [(name, place) for name in names for place in range(len(self._blocks[name]))]
        shapes = {(n, i): block_shape(self._metas[n], self._blocks[n][i]) for n, i in places}
        counts, totals = {(n, i): len(self._ranges[n][i]) for n, i in places}, Counter[tuple[int, int]]()
        for place, shape in shapes.items():
            totals[shape] += counts[place]
        return make_batches(shapes, counts, {shape: self._at_once(shape, count) for shape, count in totals.items()})

    def runs(self, name: str, place: int) -> list[Run]:
        """Rows of a block, with the numbers of its matrices among all."""
        own, first = self._ranges[name][place], self.first[name]
        rows = self._metas[name].shape[0]
        return runs_of_block(self._blocks[name][place], rows, range(first + own.start, first + own.stop))
