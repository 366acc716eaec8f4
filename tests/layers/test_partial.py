"""Attention put together of parts equals attention as a whole, forward and backward; and ranks share it evenly."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_mup.layers import partial as module
from megatron_mup.layers.attention import plain_attention
from megatron_mup.layers.context import needed
from megatron_mup.layers.dropout import drop
from megatron_mup.layers.info import Context, attention_mask
from megatron_mup.layers.partial import Partial, merge_
from megatron_mup.parallel.mesh import ContextAxis

SEQ, FIRST, SCALE = 10, 4, 0.4
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
MASKS = {
    "causal": None,
    "documents": partial(attention_mask, document_ids=DOCUMENTS),
    "window": partial(attention_mask, window=3),
}


def thin(weights, queries, keys):
    sample = torch.tensor([3, 8])[:, None, None, None]
    index = (torch.arange(4)[:, None, None] * SEQ + queries[:, None]) * SEQ + keys
    return drop(weights, 0.3, torch.tensor(5), sample, index)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kind", ["kernel", "plain", "documents", "segments", "window", "other width of values"])
def test_parts_make_a_whole(monkeypatch, kind, dropout):
    """Queries after the first few see their own keys, and then those before them all, or as far as the mask lets."""
    monkeypatch.setattr(module, "TILE", 4)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    value_width = 3 if kind.startswith("other") else 8
    query = draw(2, 4, SEQ - FIRST, 8).requires_grad_()
    key, value = draw(2, 2, SEQ, 8).requires_grad_(), draw(2, 2, SEQ, value_width).requires_grad_()
    grad = draw(2, 4, SEQ - FIRST, value_width)
    keys = torch.arange(SEQ)
    queries = keys[FIRST:]
    mask, rule = MASKS.get("documents" if kind == "segments" else kind), thin if dropout else None
    drawn = (mask or attention_mask)(queries, keys)
    here = partial(rule, queries=queries, keys=keys) if rule else None
    want = plain_attention(query, key, value, SCALE, drawn, here)
    want.backward(grad)

    context = Context(ContextAxis(None, 0, 1), True, keys[None], DOCUMENTS)
    parts = Partial(SCALE, mask, rule, plain=kind == "plain", segments=context.segments if kind == "segments" else None)
    by_segments = parts._segments(query, value, (queries, queries), True)
    assert (by_segments is not None) == (kind == "segments" and not dropout)
    assert parts._by_kernel(query, value) == (kind == "kernel" and not dropout)
    output, lse = torch.zeros_like(want), torch.full(want.shape[:3], -torch.inf)
    columns = [(slice(FIRST, SEQ), True), (slice(0, FIRST), False)]
    with torch.no_grad():
        for some, causal in columns:
            places = (queries, keys[some])
            merge_(output, lse, *parts.forward(query, key[:, :, some], value[:, :, some], places, causal))
        torch.testing.assert_close(output, want.detach(), rtol=1e-5, atol=1e-6)
        grad_query = torch.zeros_like(query)
        for some, causal in columns:
            inputs = (query, key[:, :, some], value[:, :, some])
            mine, *pair = parts.backward(grad, *inputs, output, lse, (queries, keys[some]), causal)
            grad_query += mine
            for got, expected in zip(pair, (key.grad, value.grad), strict=True):
                torch.testing.assert_close(got, expected[:, :, some], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad_query, query.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_the_causal_triangle_evenly(ranks):
    seq = 4 * ranks
    places = ContextAxis(None, 0, ranks).places(seq, torch.device("cpu"))
    assert places.flatten().sort().values.tolist() == list(range(seq))
    seen = torch.zeros(seq, seq, dtype=torch.long)
    areas = set()
    for rank in range(ranks):
        for source in range(ranks):
            rows, columns = needed(rank, source, seq // ranks)
            mine, theirs = places[rank][rows], places[source][columns]
            allowed = mine[:, None] >= theirs
            assert source == rank or allowed.all(), "parts of others need no mask"
            seen[mine[:, None], theirs] += allowed
            areas |= {allowed.numel()} if source != rank else set()
    assert torch.equal(seen, torch.ones_like(seen).tril())
    assert len(areas) == 1
