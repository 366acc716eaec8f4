"""Tokens to their experts and back: permutation on the device, all-to-all over expert-parallel ranks, and a gather over
those that share the matrices of each expert."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_mup.layers.router import Routing
from megatron_mup.parallel.collectives import all_to_all, all_to_all_around, gather_rows, sum_rows
from megatron_mup.parallel.mesh import ExpertAxis

Experts = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Run = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Gives a function as it is or compiled."""


@dataclass(frozen=True)
class Plan:
    """Order of the rows that this rank sends, expert after expert.

    Assignments are numbered ``token * topk + choice``.

    Attributes:
        assignment: ``[rows]``, the assignment in each row; their number for a row that fills an expert up.
        place: ``[assignments]``, the row of each; the number of rows for one that is dropped.
        counts: ``[experts]`` int64, rows of each expert.
        gaps: whether there are such rows or assignments.
        even: rows of every expert where that is known to the host, else None.
    """

    assignment: torch.Tensor
    place: torch.Tensor
    counts: torch.Tensor
    gaps: bool
    even: int | None


def plan_rows(routing: Routing, experts: int, pad: bool) -> Plan:
    """Sorts assignments by expert.

    Without a capacity, and with one that is filled up (``pad``), no shape depends on the routing, and the host waits
    for nothing; where tokens are dropped and nothing filled up, it waits for their number.
    """
    # Sorting takes time by the width of what it sorts.
    flat = routing.experts.flatten().short()
    device, number = flat.device, len(flat)
    if routing.kept is not None:
        flat = torch.where(routing.kept.flatten(), flat, experts)
    assignment = flat.argsort(stable=True)
    ranked = flat[assignment]
    bounds = torch.searchsorted(ranked, torch.arange(experts + 1, dtype=flat.dtype, device=device))
    counts = bounds.diff()
    everyone = torch.arange(number, device=device)
    place = torch.empty_like(everyone).scatter_(0, assignment, everyone)
    if routing.kept is None:
        return Plan(assignment, place, counts, gaps=False, even=None)
    if not pad:
        rows = int(bounds[-1])
        return Plan(assignment[:rows], place.clamp(max=rows), counts, gaps=True, even=None)
    capacity = routing.capacity
    assert capacity is not None
    rows = experts * capacity
    # Within its expert's share; dropped assignments, behind all experts, go to the row behind the last.
    ranked = ranked.long()
    inside = ranked * capacity + everyone - bounds[ranked]
    inside = torch.where(ranked < experts, inside, rows)
    filled = torch.full((rows + 1,), number, dtype=torch.long, device=device)
    filled[inside] = assignment
    return Plan(
        filled[:rows],
        torch.empty_like(everyone).scatter_(0, assignment, inside),
        torch.full_like(counts, capacity),
        gaps=True,
        even=capacity,
    )


def dispatch(
    x: torch.Tensor,
    routing: Routing,
    experts: Experts,
    number: int,
    axis: ExpertAxis,
    pad: bool,
    compiled: bool = False,
    meanwhile: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Each token through its experts, the sum weighted by its gates.

    Args:
        x: ``[tokens, hidden]``.
        routing: of these tokens.
        experts: what this rank's experts do with rows ``[n, hidden]``, expert after expert, and the rows of each.
        number: experts of the layer.
        axis: ranks that share them out.
        pad: whether experts are filled up to their capacity.
        compiled: whether permutations run under torch.compile, which gathers and sums in one kernel.
        meanwhile: called while rows are under way to other ranks' experts, if there are any.

    Returns:
        ``[tokens, hidden]``; zero for a token that all of its experts dropped.
    """
    run = _compiled if compiled else _eager
    plan = plan_rows(routing, number, pad)
    rows = _Spread.apply(x, plan, routing.gates.shape[1], run)
    alone = axis.group is None and axis.tensor.group is None
    rows = experts(rows, plan.counts) if alone else _over_ranks(rows, plan, experts, axis, meanwhile)
    return _Combine.apply(rows, routing.gates, plan, run)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _over_ranks(
    rows: torch.Tensor, plan: Plan, experts: Experts, axis: ExpertAxis, meanwhile: Callable[[], None] | None
) -> torch.Tensor:
    """Sends rows to the ranks of their experts and brings the results back."""
    sizes = _sizes(plan, axis)
    if axis.group is not None:
        send = all_to_all if meanwhile is None else partial(all_to_all_around, meanwhile)
        rows = send(rows, sizes.receive, sizes.send, axis.group)
    rows = gather_rows(rows, sizes.gathered, axis.tensor)
    # By rank and then by expert they arrive; by expert they are wanted.
    sources, here = sizes.counts.shape
    ids = torch.arange(here, device=rows.device).repeat(sources)
    ids = ids.repeat_interleave(sizes.counts.flatten(), output_size=len(rows))
    order = ids.argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    rows = experts(_Permute.apply(rows, order, back), sizes.counts.sum(0))
    rows = sum_rows(_Permute.apply(rows, back, order), sizes.gathered, axis.tensor)
    return rows if axis.group is None else all_to_all(rows, sizes.send, sizes.receive, axis.group)


@dataclass(frozen=True)
class _Sizes:
    """How many rows travel.

    Attributes:
        send, receive: to and from each expert-parallel rank.
        gathered: that each expert tensor rank has then.
        counts: ``[expert tensor x expert-parallel ranks, experts here]``, rows of each of them for each expert.
    """

    send: list[int]
    receive: list[int]
    gathered: list[int]
    counts: torch.Tensor


def _sizes(plan: Plan, axis: ExpertAxis) -> _Sizes:
    """Agrees on sizes with the other ranks; the host waits for what depends on data."""
    ranks, parts = axis.size, axis.tensor.size
    here = len(plan.counts) // ranks
    own = plan.counts.view(ranks, here)
    if plan.even is not None:
        even = [here * plan.even] * ranks
        return _Sizes(even, even, [sum(even)] * parts, own.repeat(parts, 1))
    counts = own
    if axis.group is not None:
        counts = all_to_all(plan.counts, [here] * ranks, [here] * ranks, axis.group).view(ranks, here)
    everyone = gather_rows(counts, [ranks] * parts, axis.tensor)
    if axis.group is None and not plan.gaps:
        # Every rank has as many tokens, and all of their rows.
        number = len(plan.assignment)
        return _Sizes([number], [number], [number] * parts, everyone)
    # The one place where the host waits: buffers have to be made, and the all-to-all wants its sizes.
    sums = torch.cat([own.sum(1), everyone.sum(1)]).tolist()
    send, received = sums[:ranks], sums[ranks:]
    gathered = [sum(received[part * ranks : (part + 1) * ranks]) for part in range(parts)]
    mine = axis.tensor.rank * ranks
    return _Sizes(send, received[mine : mine + ranks], gathered, everyone)


def _take(x: torch.Tensor, index: torch.Tensor, gaps: bool) -> torch.Tensor:
    """Rows of ``x`` by number; with gaps, the number behind the last is a row of zeros."""
    if gaps:
        x = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return x.index_select(0, index)


def _sums(rows: torch.Tensor, place: torch.Tensor, topk: int, gaps: bool) -> torch.Tensor:
    """Sum of each token's rows, in fp32 inside."""
    return _take(rows, place, gaps).unflatten(0, (-1, topk)).sum(1)


def _weighted_sums(rows: torch.Tensor, gates: torch.Tensor, place: torch.Tensor, gaps: bool) -> torch.Tensor:
    """Sum of each token's rows, ``[tokens, topk]`` gates before them; in fp32 inside."""
    chosen = _take(rows, place, gaps).unflatten(0, gates.shape)
    return (chosen * gates[..., None]).sum(1).to(rows.dtype)


def _weighted_sums_backward(
    grad: torch.Tensor,
    rows: torch.Tensor,
    gates: torch.Tensor,
    assignment: torch.Tensor,
    place: torch.Tensor,
    gaps: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows and gates."""
    of_rows = _take(grad, assignment // gates.shape[1], gaps)
    weights = _take(gates.view(-1, 1), assignment, gaps)
    # Each row with its token's gradient: rows aren't gathered a second time.
    products = (rows.float() * of_rows.float()).sum(1, keepdim=True)
    return (of_rows * weights).to(rows.dtype), _take(products, place, gaps).view_as(gates)


class _Spread(torch.autograd.Function):
    """Tokens to rows. Backward gathers too, where autograd's own would add up by atomics in any order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Plan, topk: int, run: Run) -> torch.Tensor:
        ctx.save_for_backward(plan.place)
        ctx.topk, ctx.gaps, ctx.run = topk, plan.gaps, run
        return run(_take)(x, plan.assignment // topk, plan.gaps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return ctx.run(_sums)(grad, place, ctx.topk, ctx.gaps), None, None, None


class _Combine(torch.autograd.Function):
    """Rows to tokens, weighted by gates. No copy of the rows in the order of tokens is kept."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gates: torch.Tensor, plan: Plan, run: Run) -> torch.Tensor:
        ctx.save_for_backward(rows, gates, plan.assignment, plan.place)
        ctx.gaps, ctx.run = plan.gaps, run
        return run(_weighted_sums)(rows, gates, plan.place, plan.gaps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        return *ctx.run(_weighted_sums_backward)(grad, *ctx.saved_tensors, ctx.gaps), None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; ``back`` is the inverse of ``order``."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None
