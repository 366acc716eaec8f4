"""Tensor-parallel linear layers whose products are Transformer Engine's (``--transformer-impl transformer_engine``).

Parameters, collectives and factors are the native layers' own. So a checkpoint knows no backend, and what travels
between tensor ranks is bf16: one gathered input, cast once, for all three products of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron_mup.kernels import te_mlp
from megatron_mup.kernels.te import GroupedProduct, Padding, Product
from megatron_mup.layers.linear import ColumnLinear, ParallelLinear, RowLinear
from megatron_mup.layers.mlp import GLU_INTERLEAVE, MLP
from megatron_mup.layers.moe import Experts, GroupedLinear
from megatron_mup.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel


class TELinear(ParallelLinear):
    """What both directions hold.

    Args:
        native: arguments of the native layer.
        product: multiplies.
    """

    def __init__(self, *native: Any, product: Product) -> None:
        super().__init__(*native)
        self.product = product

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `ParallelLinear.multiply`."""
        y = self.product.multiply(x, self.weight)
        return y if bias is None else y + bias


# Calls into a library that a compiler can't look into. It is left with the whole layer: each piece that it makes of a
# block costs the host time, which small models don't have.
class TEColumnLinear(TELinear, ColumnLinear):
    """`ColumnLinear` by Transformer Engine."""

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[seq (/ tp), batch, in]`` to ``[seq, batch, out / tp]``."""
        return ColumnLinear.forward(self, x)


class TERowLinear(TELinear, RowLinear):
    """`RowLinear` by Transformer Engine."""

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[seq, batch, in / tp]`` to ``[seq (/ tp), batch, out]``."""
        return RowLinear.forward(self, x)


class TEMLP(MLP):
    """`MLP` of Transformer Engine's layers, without biases and factors, whose SwiGLU writes FP8 under ``delayed``."""

    linear_fc1: TEColumnLinear
    linear_fc2: TERowLinear

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `MLP.forward`."""
        first, second = self.linear_fc1, self.linear_fc2
        # A hook on a layer sees what it puts out only where it is called.
        if not te_mlp.takes(x) or first._forward_hooks or second._forward_hooks:
            return super().forward(x)
        x = enter_tensor_parallel(x, first.axis, first.sequence_parallel)
        products, weights = (first.product, second.product), (first.weight, second.weight)
        y = te_mlp.swiglu_mlp(x, products, weights, GLU_INTERLEAVE)
        return leave_tensor_parallel(y, second.axis, second.sequence_parallel)


class TEExperts(Experts):
    """`Experts` in FP8 by Transformer Engine, which has to know on the host how many rows each one gets.

    Args:
        linear_fc1, linear_fc2, activation: as for the native ones; the activation of zeros is zero.
        multiple: of which FP8 products want rows.
    """

    def __init__(
        self,
        linear_fc1: GroupedLinear,
        linear_fc2: GroupedLinear,
        activation: Callable[[torch.Tensor], torch.Tensor],
        multiple: int,
    ) -> None:
        super().__init__(linear_fc1, linear_fc2, activation)
        self.products = GroupedProduct(), GroupedProduct()
        self.padding = Padding(linear_fc1.experts, multiple)

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """``[n, hidden]``, expert after expert, to the same shape."""
        sizes = counts.tolist()
        rows, padded = self.padding.fill(rows, sizes)
        first, second = (
            linear.weight.unflatten(0, (linear.experts, -1)) for linear in (self.linear_fc1, self.linear_fc2)
        )
        inner = self.activation(self.products[0].multiply(rows, first, padded))
        return self.padding.strip(self.products[1].multiply(inner, second, padded), sizes)


def products(model: nn.Module) -> list[Product | GroupedProduct]:
    """The products of Transformer Engine in a model, in its order."""
    found: list[Product | GroupedProduct] = []
    for module in model.modules():
        if isinstance(module, TELinear):
            found.append(module.product)
        elif isinstance(module, TEExperts):
            found += module.products
    return found
