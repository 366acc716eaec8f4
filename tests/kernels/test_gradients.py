"""Kernels of gradients (rotary positions, embedding, loss) against their plain twins, on a GPU, and in Triton's
interpreter where there is none; and the twins against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_mup.kernels import cross_entropy
from megatron_mup.kernels.embedding import embedding_backward, embedding_backward_reference
from megatron_mup.kernels.late import HAS_KERNEL, kernels_of
from megatron_mup.kernels.rotary import rotary_backward_reference
from megatron_mup.layers import embedding, rope
from tests.interpreter import interpreted

GPU = pytest.mark.skipif(not torch.cuda.is_available() or not HAS_KERNEL, reason="needs a GPU and Triton")
SHAPES = [(3, 2, 2, 3, 8, 8), (2, 1, 5, 1, 12, 8), (4, 2, 1, 40, 64, 64), (3, 2, 2, 2, 64, 64), (2, 2, 3, 2, 128, 128)]
"""Sequence, batch, groups, heads per group, channels of a head, and how many of them rotate."""


def angles(seq: int, width: int, batch: int | None, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(seq, device=device)[:, None] * 7
    if batch is not None:
        positions = positions + torch.arange(batch, device=device) * 3
    return rope.rotary_angles(positions, width, 1e4)


def compare_rotary(device: str, dtype: torch.dtype) -> None:
    """Gradients that lie as attention's do, in both of its orders, and values that lie elsewhere."""
    generator = torch.Generator().manual_seed(0)
    for seq, batch, groups, per, dim, width in SHAPES:
        for sequence_first in (True, False):

            def drawn(heads: int, first: bool = sequence_first, shape: tuple[int, ...] = (seq, batch, dim)):
                length, samples, channels = shape
                if first:
                    found = torch.randn(length, samples, heads, channels, generator=generator)
                else:
                    found = torch.randn(samples, heads, length, channels, generator=generator).permute(2, 0, 1, 3)
                return found.to(device, dtype)

            query = drawn(groups * per).unflatten(2, (groups, per))
            key, value = (drawn(groups)[:, :, :, None] for _ in range(2))
            cos, sin = angles(seq, width, batch if sequence_first else None, device)
            out = torch.full((seq, batch, groups, per + 2, dim), torch.nan, dtype=dtype, device=device)
            kernels_of("rotary").launch(query, key, value, cos, sin, out)
            want = rotary_backward_reference(query, key, value, cos, sin)
            step = torch.finfo(dtype).eps
            torch.testing.assert_close(out, want, rtol=2 * step, atol=4 * step)


def compare_embedding(device: str, dtype: torch.dtype) -> None:
    """Ids that nobody has, that one token has, that many have, first and last rows among them."""
    generator = torch.Generator().manual_seed(0)
    for rows, channels in ((7, 40), (30, 1500)):
        tokens = torch.randint(0, rows, (5, 9), generator=generator)
        tokens[tokens == 3] = 0
        tokens[2] = rows - 1
        grad = torch.randn(5, 9, channels, generator=generator).to(dtype)
        ids, order = tokens.flatten().sort(stable=True)
        ends = torch.searchsorted(ids, torch.arange(rows), right=True)
        out = torch.full((rows, channels), torch.nan, dtype=dtype, device=device)
        kernels_of("embedding").launch(grad.view(-1, channels).to(device), order.to(device), ends.to(device), out)
        want = embedding_backward_reference(tokens, grad, rows)
        torch.testing.assert_close(out.cpu(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        if device == "cuda":
            assert torch.equal(embedding_backward(tokens.cuda(), grad.cuda(), rows), out)


def compare_loss(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for columns in (37, 5000):
        logits = (4 * torch.randn(5, 3, columns, generator=generator)).to(device, dtype)
        label = torch.randint(0, columns, (5, 3), generator=generator).to(device)
        weight, pull = (torch.rand(5, 3, generator=generator).to(device) for _ in range(2))
        weight[0, 1] = pull[0, 1] = pull[1, 1] = 0
        normalizer, out = (logits.float() * 0.5).logsumexp(-1), torch.full_like(logits, torch.nan)
        kernels_of("cross_entropy").launch(logits, normalizer, weight, label, pull, out, 0.5)
        want = cross_entropy.cross_entropy_backward_reference(logits, normalizer, weight, label, pull, 0.5)
        torch.testing.assert_close(out, want, rtol=1e-5 if dtype is torch.float32 else 2**-7, atol=1e-6)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_their_twins(dtype):
    compare_rotary("cuda", dtype)
    compare_embedding("cuda", dtype)
    compare_loss("cuda", dtype)


@pytest.mark.long
def test_kernels_in_the_interpreter():
    code = "import test_gradients as t, torch; kinds = t.compare_rotary, t.compare_embedding, t.compare_loss"
    interpreted(__file__, f"{code}; [compare('cpu', torch.float32) for compare in kinds]")


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_rotated_parts(monkeypatch, compiled):
    calls = []

    def counted(*args):
        calls.append(args)
        return rotary_backward_reference(*args)

    monkeypatch.setattr(rope, "rotary_backward", counted)
    seq, batch, groups, per, dim, width = SHAPES[1]
    leaf = torch.randn(seq, batch, groups, per + 2, dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cos, sin = angles(seq, width, None, "cpu")

    def total(found: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return sum(part.sin().sum() * (i + 1) for i, part in enumerate(found))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return total(rope._Parts.apply(x, cos, sin))

    (torch.compile(layer, backend="aot_eager") if compiled else layer)(leaf).backward()
    assert len(calls) == 1
    got, leaf.grad = leaf.grad, None
    total(rope.rotated_parts(leaf, cos, sin)).backward()
    torch.testing.assert_close(got, leaf.grad)


def test_gradient_of_a_lookup(monkeypatch):
    monkeypatch.setattr(embedding, "embedding_backward", embedding_backward_reference)
    table = torch.randn(11, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([[0, 3, 3], [10, 0, 3]])
    embedding._Lookup.apply(tokens, table).sin().sum().backward()
    got, table.grad = table.grad, None
    F.embedding(tokens, table).sin().sum().backward()
    torch.testing.assert_close(got, table.grad)
