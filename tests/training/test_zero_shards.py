"""Runs of elements as rectangles."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.training.zero_shards import rectangles


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (6, 1)])
def test_rectangles_hold_the_elements_of_the_run_in_order(shape):
    flat = torch.arange(torch.Size(shape).numel())
    whole = flat.view(shape)
    for start in range(len(flat)):
        for count in range(1, len(flat) - start + 1):
            parts = []
            for offsets, sizes in rectangles(shape, start, count):
                part = whole
                for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                    part = part.narrow(dim, offset, size)
                parts.append(part.flatten())
            assert torch.equal(torch.cat(parts), flat[start : start + count])
            assert len(parts) <= 3
