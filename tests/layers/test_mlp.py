from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_mup.kernels.swiglu import swiglu_backward_reference
from megatron_mup.layers.mlp import GLU_BLOCKS, GLU_INTERLEAVE, gelu, squared_relu, swiglu


def test_swiglu_reads_interleaved_rows():
    """The blocks of the fused matrix say which feature is gate and which is up."""
    x = torch.randn(3, 2, 64)
    place = torch.arange(64) % GLU_BLOCKS[0].period
    parts = {b.name: x[..., (b.start <= place) & (place < b.start + b.size)] for b in GLU_BLOCKS}
    assert parts["gate"].shape == parts["up"].shape == (3, 2, 32)
    torch.testing.assert_close(swiglu(x), F.silu(parts["gate"]) * parts["up"])


def test_the_kernels_twin_is_the_gradient_of_swiglu():
    x, grad = torch.randn(3, 2, 64, requires_grad=True), torch.randn(3, 2, 32)
    swiglu(x).backward(grad)
    torch.testing.assert_close(swiglu_backward_reference(x.detach(), grad, GLU_INTERLEAVE), x.grad)


def test_swiglu_of_a_shard_is_the_shard_of_swiglu():
    x = torch.randn(5, 96)
    parts = [swiglu(part) for part in x.split([32, 48, 16], -1)]
    torch.testing.assert_close(torch.cat(parts, -1), swiglu(x))


def test_activations():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
    assert squared_relu(x).tolist() == [0, 0, 0, 0.25, 4]
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    torch.testing.assert_close(gelu(x), 0.5 * x * (1 + tanh))
