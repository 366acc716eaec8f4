"""Attention inside segments against attention with a mask, forward and backward, and its kernel against it on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_mup.kernels.segments import (
    Segments,
    segment_attention,
    segment_attention_backward,
    segment_attention_backward_reference,
    segment_attention_reference,
)
from megatron_mup.layers.attention import plain_attention

SCALE = 0.3
CASES = {
    "documents": ([0, 0, 0, 1, 2, 2], [0, 0, 0, 1, 2, 2], True, None),
    "the last queries of each": ([0, 1, 1, 3], [0, 0, 0, 1, 1, 2, 2, 3], True, None),
    "a window": ([0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1], True, 2),
    "nothing to see": ([0, 0, 2, 3], [0, 1, 1, 3, 3], False, None),
}
"""Numbers of the segments of queries and of keys, whether causal, window."""


def drawn(queries, keys, dtype, device="cpu", width=8):
    """Gradient of the output, queries, keys and values: four heads of two groups."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    shapes = (queries, 4, width), (queries, 4, width), (keys, 2, width), (keys, 2, width)
    return [draw(shape).to(device, dtype) for shape in shapes]


def segments_of(case, device="cpu"):
    queries, keys, causal, window = CASES[case]
    numbers = (torch.tensor(rows, device=device) for rows in (queries, keys))
    longest = max(rows.count(number) for rows in (queries, keys) for number in rows)
    return Segments.between(*numbers, max(queries + keys) + 1, longest, causal, window)


def mask_of(case):
    """Which query sees which key, counted from the end of each segment."""
    queries, keys, causal, window = CASES[case]

    def sees(row, column):
        after = [sum(n == numbers[at] for n in numbers[at + 1 :]) for numbers, at in ((queries, row), (keys, column))]
        back = after[1] - after[0]
        inside = not causal or 0 <= back <= (len(keys) if window is None else window)
        return queries[row] == keys[column] and inside

    return torch.tensor([[sees(row, column) for column in range(len(keys))] for row in range(len(queries))])


@pytest.mark.parametrize("case", CASES)
def test_equals_attention_with_a_mask(case):
    mask = mask_of(case)
    grad, *inputs = drawn(*mask.shape, torch.float32)
    for x in inputs:
        x.requires_grad_()
    blind = ~mask.any(1)
    heads_first = [x.transpose(0, 1)[None] for x in inputs]
    want = plain_attention(*heads_first, SCALE, mask | blind[:, None], None)[0].transpose(0, 1)
    want = want.masked_fill(blind[:, None, None], 0)
    want.backward(grad)
    with torch.no_grad():
        output, lse = segment_attention(*inputs, segments_of(case), SCALE)
        torch.testing.assert_close(output, want.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(lse.isinf().all(1), blind)
        grads = segment_attention_backward(grad, tuple(inputs), output, lse, segments_of(case), SCALE)
    for got, x in zip(grads, inputs, strict=True):
        torch.testing.assert_close(got, x.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_its_twin(case, width):
    """Longer segments than the CPU's: each row of a case stands for many."""
    queries, keys, causal, window = CASES[case]
    rows, columns = (torch.tensor(numbers, device="cuda").repeat_interleave(96) for numbers in (queries, keys))
    longest = 96 * max(numbers.count(n) for numbers in (queries, keys) for n in numbers)
    segments = Segments.between(rows, columns, max(queries + keys) + 1, longest, causal, window and 70)
    grad, *inputs = drawn(len(rows), len(columns), torch.bfloat16, "cuda", width)
    output, lse = segment_attention(*inputs, segments, SCALE)
    exact = [x.float() for x in inputs]
    want, sums = segment_attention_reference(*exact, segments, SCALE)
    torch.testing.assert_close(output.float(), want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, sums, rtol=1e-4, atol=1e-3)
    # As of more keys than these: a query that sees none of them here still has a sum.
    lse = torch.where(lse.isinf(), 0.5, lse + 0.1)
    grads = segment_attention_backward(grad, tuple(inputs), output, lse, segments, SCALE)
    wanted = segment_attention_backward_reference(grad.float(), tuple(exact), output.float(), lse, segments, SCALE)
    for got, reference in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.float(), reference, rtol=3e-2, atol=3e-2)
