"""Muon on matrices that stay where they are: only Gram matrices travel (``--muon-distributed-mode gram``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.distributed as dist

from megatron_mup.kernels.shards import Pieces, advance, apply
from megatron_mup.optim.batches import cut_runs, pieces_of_parcel
from megatron_mup.optim.blocks import block_shape, logical_blocks
from megatron_mup.optim.clip import gradients
from megatron_mup.optim.coefficients import Step, coefficient_schedule, polynomial
from megatron_mup.optim.exchange import Exchange, Parcel
from megatron_mup.optim.gram import block_lengths
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.muon import Muon, MuonSettings
from megatron_mup.optim.newton_schulz import full_fp32_products
from megatron_mup.optim.planner import Assignment, Plan, make_plan
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.table import Scaling


def cut_dimension(meta: ParamMeta, mesh: Mesh) -> int | None:
    """The one dimension that the ranks of a replica cut, each holding a part; None if they cut two, or hold copies."""
    tp, shards = mesh.size("tp"), mesh.size("dp_shard")
    if tp * shards == 1 or (tp > 1 and meta.tp_dim is None) or (tp > 1 and shards > 1 and meta.tp_dim != 0):
        return None
    return 0 if tp == 1 else meta.tp_dim


def polynomial_product(gram: torch.Tensor, steps: Sequence[Step]) -> torch.Tensor:
    """Product of the Newton-Schulz polynomials p on the way of R, ``R <- p(R)^2 R``.

    Args:
        gram: ``[batch, n, n]`` fp32, symmetric.
        steps: coefficients of each p.
    """
    product: torch.Tensor | None = None
    for number, step in enumerate(steps):
        poly, a = polynomial(gram, step)
        poly.diagonal(dim1=-2, dim2=-1).add_(a)
        product = poly if product is None else product @ poly
        if number + 1 < len(steps):
            gram = poly @ gram @ poly
            gram = (gram + gram.mT) / 2
    assert product is not None
    return product


@dataclass(frozen=True)
class _Slot:
    """Where the Gram matrix of a logical matrix travels: rank, first element among that rank's, and size."""

    home: int
    start: int
    size: int


class GramMuon(Muon[MuonSettings]):
    """`Muon` in which matrices that are cut along their long side are never put together.

    With X cut along the long side, ``R = X X^T`` (or ``X^T X``) is a sum of what each rank has. The sum goes to the
    matrix's home, which turns it into the product Q of the polynomials of a few Newton-Schulz steps, and Q goes to all,
    who apply it to their part: one reduce-scatter and one all-gather of n x n numbers each time, n the short side. R is
    formed anew as often as rounding asks for (`optim.gram`). All in fp32, so nearly, not bitwise, what whole matrices
    give. Other matrices (cut along the short side, along both, or not at all) have a home as in `Muon`. Each replica
    does the work of a replica.
    """

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: MuonSettings, mesh: Mesh) -> None:
        cut = [pair for pair in params if self._fits(pair[0].meta, settings, mesh)]
        # Alone: shards are not gathered, so nothing is exchanged but Gram matrices.
        super().__init__(cut, settings, None)
        self._others = Muon([pair for pair in params if pair not in cut], settings, mesh)
        self._dims = {param.meta.name: cut_dimension(param.meta, mesh) for param, _ in cut}
        self._group = mesh.replica_group
        self._rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        metas = [param.meta for param, _ in cut]
        self._shared = make_plan(metas, [self._gram_cost(meta) for meta in metas], ranks).chunks
        self._shard_pieces = [self._pieces(chunk) for chunk in self._shared]
        self._rows = {param.meta.name: self._own_rows(param) for param, _ in cut}
        self.plan = self._whole_plan(mesh)
        Exchange(mesh, mesh.device).check(self.plan)

    @property
    def transport(self) -> str | None:
        """Of those that do have a home."""
        return self._others.transport

    @staticmethod
    def _fits(meta: ParamMeta, settings: MuonSettings, mesh: Mesh) -> bool:
        dim = cut_dimension(meta, mesh)
        if dim is None:
            return False
        shapes = [block_shape(meta, block) for block in logical_blocks(meta, settings)]
        return all(shape[1 - dim] <= shape[dim] for shape in shapes)

    def _short(self, meta: ParamMeta) -> list[int]:
        """Short side of each logical matrix: that of its Gram matrix."""
        dim = self._dims[meta.name]
        assert dim is not None
        return [int(n) for n in self.per_matrix(meta, lambda *shape: shape[1 - dim])]

    def _gram_cost(self, meta: ParamMeta) -> float:
        return 4.0 * self.settings.num_ns_steps * sum(n**3 for n in self._short(meta))

    def _whole_plan(self, mesh: Mesh) -> Plan:
        """The plan of all matrices; those that stay put have a home in each replica, of which the first is named."""
        places = mesh.matrix_places()
        ranks = [rank for rank, place in enumerate(places) if place[1] == 0]
        chunks = [tuple(replace(a, home=ranks[a.home], mode="gram") for a in chunk) for chunk in self._shared]
        return Plan(len(places), (*self._others.plan.chunks, *chunks))

    def _own_rows(self, param: MainParam) -> list[torch.Tensor] | None:
        """Rows of a shard that belong to each logical matrix, where it holds several."""
        name, layout = param.meta.name, param.layout
        if self._matrices(name) == 1:
            return None
        rows: list[list[int]] = [[] for _ in range(self._matrices(name))]
        parcel = Parcel(name, layout.offsets, layout.local_shape, 0)
        for place in range(len(self._blocks[name])):
            for run in cut_runs(self._placing.runs(name, place), parcel):
                start = run.start - layout.offsets[0]
                rows[run.matrix - self._placing.first[name]] += range(start, start + run.count)
        return [torch.tensor(own, dtype=torch.int64, device=param.value.device) for own in rows]

    @torch.no_grad()
    def step(self, factor: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """See `MatrixOptimizer.step`. Collective over the ranks that share matrices."""
        self._others.step(factor, meanwhile)
        params = [param for param, _ in self._params.values()]
        self._grads.set_copies(gradients(params))
        self._values.set([param.value for param in params])
        self._factor.fill_(factor)
        for chunk, pieces in zip(self._shared, self._shard_pieces, strict=True):
            names = [a.meta.name for a in chunk]
            shards = [self._params[name][0].value for name in names]
            sizes = [shard.numel() for shard in shards]
            flat = torch.empty(sum(sizes), device=shards[0].device)
            advance(self._grads, self._momenta, flat, pieces, self._style)
            updates = [part.view(shard.shape) for part, shard in zip(flat.split(sizes), shards, strict=True)]
            parts = [part for name, update in zip(names, updates, strict=True) for part in self._take(name, update)]
            with full_fp32_products():
                parts = self._orthonormalize(parts, self._slots(chunk))
            found = iter(parts)
            results = [
                self._put(name, update, list(islice(found, self._matrices(name)))).reshape(-1)
                for name, update in zip(names, updates, strict=True)
            ]
            apply(self._values, torch.cat(results), pieces, *self._factors())
        self._grads.forget()

    def _pieces(self, chunk: Sequence[Assignment]) -> Pieces:
        """The shards of a chunk, one after another, by logical matrix."""
        tensor = {name: number for number, name in enumerate(self._params)}
        place, pieces = 0, []
        for name in (a.meta.name for a in chunk):
            layout = self._params[name][0].layout
            parcel = Parcel(name, layout.offsets, layout.local_shape, place)
            place += parcel.numel
            for block in range(len(self._blocks[name])):
                pieces += pieces_of_parcel(tensor[name], self._placing.runs(name, block), parcel)
        return self._placing.as_pieces(pieces)

    def _take(self, name: str, update: torch.Tensor) -> list[torch.Tensor]:
        """This rank's part of each logical matrix, fp32, ``[short side, what is here of the long side]``."""
        rows = self._rows[name]
        parts = [update] if rows is None else [update[own] for own in rows]
        return [(part.mT if self._dims[name] == 0 else part).float() for part in parts]

    def _put(self, name: str, update: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
        """The opposite of :meth:`_take`."""
        if self._dims[name] == 0:
            parts = [part.mT for part in parts]
        rows = self._rows[name]
        if rows is None:
            return parts[0]
        whole = torch.empty(update.shape, device=update.device)
        for own, part in zip(rows, parts, strict=True):
            whole[own] = part
        return whole

    def _slots(self, chunk: Sequence[Assignment]) -> list[_Slot]:
        ends: dict[int, int] = {}
        slots = []
        for assignment in chunk:
            for size in self._short(assignment.meta):
                start = ends.get(assignment.home, 0)
                slots.append(_Slot(assignment.home, start, size))
                ends[assignment.home] = start + size * size
        return slots

    def _orthonormalize(self, parts: list[torch.Tensor], slots: list[_Slot]) -> list[torch.Tensor]:
        settings, ranks = self.settings, dist.get_world_size(self._group)
        length = max(slot.start + slot.size**2 for slot in slots)
        steps = iter(coefficient_schedule(settings.coefficients, settings.num_ns_steps))
        for number, count in enumerate(block_lengths(settings.coefficients, settings.num_ns_steps)):
            sent = torch.zeros(ranks, length, device=parts[0].device)
            for part, slot in zip(parts, slots, strict=True):
                torch.mm(part, part.mT, out=sent[slot.home, slot.start : slot.start + slot.size**2].view(slot.size, -1))
            mine = torch.empty(length, device=sent.device)
            dist.reduce_scatter_tensor(mine, sent.view(-1), group=self._group)
            self._polynomials(mine, slots, list(islice(steps, count)), normalize=number == 0)
            dist.all_gather_into_tensor(sent.view(-1), mine, group=self._group)
            parts = [
                sent[slot.home, slot.start : slot.start + slot.size**2].view(slot.size, -1) @ part
                for part, slot in zip(parts, slots, strict=True)
            ]
        return parts

    def _polynomials(self, grams: torch.Tensor, slots: list[_Slot], steps: Sequence[Step], normalize: bool) -> None:
        """Replaces the Gram matrices at home here by the polynomials' product; those of one size go together.

        The first time they are divided by their trace, which is the square of the matrix's Frobenius norm.
        """
        here = [slot for slot in slots if slot.home == self._rank]
        for size in sorted({slot.size for slot in here}):
            views = [grams[s.start : s.start + size**2].view(size, size) for s in here if s.size == size]
            gram = torch.stack(views)
            trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp(min=1e-14)
            trace = trace if normalize else torch.ones_like(trace)
            product = polynomial_product(gram / trace, steps) / trace.sqrt()
            torch._foreach_copy_(views, list(product))

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """Momentum in storage layout; that of matrices that stay put on every replica."""
        return {**self._others.state_tensors(), **super().state_tensors()}
