"""The MLP branch of a layer with experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mup.kernels.grouped import grouped_linear
from megatron_mup.layers.dispatch import dispatch
from megatron_mup.layers.dropout import Noise
from megatron_mup.layers.router import Router
from megatron_mup.parallel.mesh import ExpertAxis
from megatron_mup.parametrization.meta import Block


def expert_blocks(rows: int, *parts: str) -> tuple[Block, ...]:
    """Logical matrices of experts stacked along the rows, ``rows`` each: every expert's parts, one after the other.

    Expert-parallel ranks take whole experts, and expert tensor ranks equal runs of each part, so a gate and its up need
    not alternate as they do in an `MLP`.
    """
    size = rows // len(parts)
    return tuple(Block(part, place * size, size, rows, apart=True) for place, part in enumerate(parts))


def halved_swiglu(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``[..., gate and then up]``."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class GroupedLinear(nn.Module):
    """A linear layer for each expert of this rank.

    Args:
        weight: ``[experts here * out, in]``; expert tensor ranks have a part of ``out``, or of ``in``, each.
        experts: experts here.
    """

    def __init__(self, weight: nn.Parameter, experts: int) -> None:
        super().__init__()
        self.weight, self.experts = weight, experts

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows ``[n, in]``, expert after expert, and the rows of each, to ``[n, out]``."""
        return grouped_linear(rows, self.weight.unflatten(0, (self.experts, -1)), counts)


class Experts(nn.Module):
    """This rank's experts: two linear layers around an activation each."""

    def __init__(
        self,
        linear_fc1: GroupedLinear,
        linear_fc2: GroupedLinear,
        activation: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2, self.activation = linear_fc1, linear_fc2, activation

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """``[n, hidden]``, expert after expert, to the same shape; sums over expert tensor ranks are left to do."""
        return self.linear_fc2(self.activation(self.linear_fc1(rows, counts)), counts)


class MoE(nn.Module):
    """Experts behind a router, and shared experts that every token passes.

    Args:
        router: chooses.
        experts: this rank's share of the experts.
        shared_experts: an MLP, or None.
        axis: ranks that share out the experts.
        compiled: whether the parts between products run under torch.compile, each by itself.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared_experts: nn.Module | None,
        axis: ExpertAxis,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared_experts, self.axis = router, experts, shared_experts, axis
        self.pad, self.compiled = router.moe.moe_pad_expert_input_to_capacity, compiled
        self.overlap = router.moe.moe_shared_expert_overlap and shared_experts is not None and axis.group is not None
        if self.overlap and compiled:
            assert shared_experts is not None
            shared_experts.compile()  # it lies within what isn't compiled
        if compiled:
            router.decide = torch.compile(router.decide)  # type: ignore[method-assign]
            experts.activation = torch.compile(experts.activation)

    def forward(self, x: torch.Tensor, noise: Noise | None = None) -> torch.Tensor:
        """``[seq (/ tp), batch, hidden]`` to the same shape. ``noise``: of the router's jitter, in training."""
        if self.overlap:
            return self.overlapped(x, noise)
        y = self.routed(x, noise)
        return y if self.shared_experts is None else y + self.shared_experts(x)

    @torch.compiler.disable
    def overlapped(self, x: torch.Tensor, noise: Noise | None) -> torch.Tensor:
        """The same, shared experts while rows travel; numbers and their order are those without."""
        assert self.shared_experts is not None
        shared: list[torch.Tensor] = []
        y = self.routed(x, noise, lambda: shared.append(self.shared_experts(x)))
        return y + shared[0]

    # Sizes that depend on data and the tally in backward are not for one graph; shared experts are, and parts of this.
    @torch.compiler.disable
    def routed(self, x: torch.Tensor, noise: Noise | None, meanwhile: Callable[[], None] | None = None) -> torch.Tensor:
        """The routed experts' part of the output. ``meanwhile``: see `dispatch`."""
        routing = self.router(x, noise)
        tokens, number = x.flatten(0, 1), self.router.experts
        y = dispatch(tokens, routing, self.experts, number, self.axis, self.pad, self.compiled, meanwhile)
        return y.view_as(x)
