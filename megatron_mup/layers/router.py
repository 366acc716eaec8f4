"""The router of an MoE layer: which experts a token goes to, how much each counts, and what keeps them balanced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mup.config import MoEConfig
from megatron_mup.layers.dropout import Noise, jitter
from megatron_mup.parallel.collectives import all_reduce
from megatron_mup.parallel.mesh import ContextAxis, TensorAxis

TINY = 1e-20


@dataclass(frozen=True)
class Routing:
    """Choice of the experts of ``tokens`` tokens.

    Attributes:
        gates: ``[tokens, topk]`` fp32, factor of each chosen expert's output.
        experts: ``[tokens, topk]`` int64.
        kept: ``[tokens, topk]``, whether the expert has room for the token; None where nothing is ever dropped.
        capacity: rows that an expert takes from this rank; None without a limit.
        logits: ``[tokens, experts]`` fp32, what the choice is made from, for those who watch; None where there is no
            router.
    """

    gates: torch.Tensor
    experts: torch.Tensor
    kept: torch.Tensor | None
    capacity: int | None
    logits: torch.Tensor | None = None


class Router(nn.Module):
    """Linear router in fp32 with the balancing that the flags ask for.

    Balancing losses join the backward pass here, weighted so that their sum over a step's micro-batches and ranks is a
    mean: they don't travel through pipeline stages, and the objective that the model returns doesn't hold them.

    What a step has to know of the routing is added up in backward, which runs once for each micro-batch of a training
    step, whatever is recomputed, and never in evaluation.

    Args:
        weight: ``[experts, hidden]``.
        moe: the router's settings.
        sharing: axes whose ranks share each sequence.

    Attributes:
        share: one over the number of micro-batches in the global batch; the step sets it.
        expert_bias: ``[experts]`` fp32, added to the scores in the choice.
        load: ``[experts]`` fp32, share of each expert in the assignments of the last global batch.
        tally: fp64, see `Tally`.
    """

    expert_bias: torch.Tensor
    load: torch.Tensor
    tally: torch.Tensor

    def __init__(self, weight: nn.Parameter, moe: MoEConfig, sharing: Sequence[TensorAxis | ContextAxis] = ()) -> None:
        super().__init__()
        assert moe.num_experts is not None
        self.weight, self.moe, self.sharing = weight, moe, tuple(sharing)
        self.experts, self.topk = moe.num_experts, moe.moe_router_topk
        self.share = 1.0
        self.register_buffer("expert_bias", torch.zeros(self.experts, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(self.experts, dtype=torch.float32))
        self.register_buffer("tally", torch.zeros(Tally.size(self.experts), dtype=torch.float64))

    def reset(self) -> None:
        """Gives the state its initial values: no bias, even loads, nothing counted."""
        self.expert_bias.zero_()
        self.load.fill_(1 / self.experts)
        self.tally.zero_()

    def forward(self, x: torch.Tensor, noise: Noise | None = None) -> Routing:
        """``[seq here, batch, hidden]`` to the routing of ``seq here * batch`` tokens, sequence position first.

        ``noise`` names the random numbers of ``--moe-input-jitter-eps``; None, as in evaluation, takes ``x`` as it is.
        """
        seq, batch, hidden = x.shape
        if noise is not None and self.moe.moe_input_jitter_eps is not None:
            x = jitter(x.float(), self.moe.moe_input_jitter_eps, noise)
        logits = _Logits.apply(x.reshape(seq * batch, hidden), self.weight)
        gates, experts, kept, loss, tally = self.decide(logits, seq)
        if loss is not None:
            gates = _Attach.apply(gates, loss, tally, self.tally)
        return Routing(gates, experts, kept, self._capacity(len(logits)), logits.detach())

    def decide(
        self, logits: torch.Tensor, seq: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """From logits to gates, experts and what is kept, all as in `Routing`; with gradients also the weighted
        balancing losses and the tally of these tokens. A function of its own so that it can be compiled."""
        gates, experts = choose(logits, self.expert_bias, self.moe)
        kept, loss, tally = None, None, None
        if (capacity := self._capacity(len(logits))) is not None:
            kept = within_capacity(gates, experts, self.experts, capacity, self.moe.moe_token_drop_policy)
        if torch.is_grad_enabled():
            loss, tally = self._balance(logits.unflatten(0, (seq, -1)), experts, kept)
        return gates, experts, kept, loss, tally

    def _capacity(self, tokens: int) -> int | None:
        """Rows that an expert takes from this rank."""
        factor = self.moe.moe_expert_capacity_factor
        return None if factor is None else math.ceil(tokens * self.topk / self.experts * factor)

    def _balance(
        self, logits: torch.Tensor, experts: torch.Tensor, kept: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Balancing losses, weighted and added up, and the tally."""
        moe, (seq, batch, _) = self.moe, logits.shape
        with torch.no_grad():
            chosen = torch.zeros_like(logits).view(seq * batch, -1).scatter_(1, experts, 1.0).view_as(logits).sum(0)
            dropped = chosen.new_zeros(()) if kept is None else (~kept).sum()
        # Without coefficients the losses are measured only.
        with torch.set_grad_enabled(moe.moe_aux_loss_coeff > 0 or moe.moe_z_loss_coeff > 0):
            balance = balancing_loss(all_probabilities(logits, moe), self._loads(chosen, seq), self._whole(seq))
            z_loss = torch.logsumexp(logits, -1).square().sum() / (self._whole(seq) * batch)
            loss = moe.moe_aux_loss_coeff * balance + moe.moe_z_loss_coeff * z_loss
        with torch.no_grad():
            losses = self.share * torch.stack([balance, z_loss]).double()
            tally = torch.cat([chosen.sum(0).double(), losses, dropped.double()[None]])
        return loss * self.share, tally

    def _whole(self, seq: int) -> int:
        """Length of the whole sequence, of which this rank may hold a part."""
        return seq * math.prod([axis.size for axis in self.sharing])

    def _loads(self, chosen: torch.Tensor, seq: int) -> torch.Tensor:
        """Share of each expert in the assignments, ``[batch or 1, experts]``, from counts ``[batch, experts]``."""
        if self.moe.moe_router_load_balancing_type in ("global_aux_loss", "none"):
            return self.load[None]
        for axis in self.sharing:
            chosen = all_reduce(chosen, "sum", axis)
        shares = chosen / (self.topk * self._whole(seq))
        return shares if self.moe.moe_router_load_balancing_type == "seq_aux_loss" else shares.mean(0, keepdim=True)


@dataclass(frozen=True)
class Tally:
    """Sums over a step, as they lie in `Router.tally`; over all ranks they are the layer's own.

    Attributes:
        tokens: ``[experts]``, assignments to each expert, dropped ones included.
        balancing_loss, z_loss: means over the micro-batches, without their coefficients.
        dropped: assignments that found no room.
    """

    tokens: torch.Tensor
    balancing_loss: torch.Tensor
    z_loss: torch.Tensor
    dropped: torch.Tensor

    @staticmethod
    def size(experts: int) -> int:
        """Numbers in it."""
        return experts + 3

    @classmethod
    def of(cls, flat: torch.Tensor) -> Tally:
        """Names to the numbers ``[..., size]``."""
        return cls(flat[..., :-3], flat[..., -3], flat[..., -2], flat[..., -1])


class _Logits(torch.autograd.Function):
    """Linear layer in fp32, whatever its operands are in: ``[tokens, hidden]`` to ``[tokens, experts]``.

    Nothing is kept or, where the device multiplies bf16 into fp32, read in fp32 that isn't in it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
            # Products of bf16 numbers are exact in fp32.
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return F.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return (grad @ weight.float()).to(x.dtype), (grad.t() @ x.float()).to(weight.dtype)


class _Attach(torch.autograd.Function):
    """Identity of the gates. In backward the loss gets the gradient 1, and a tally is added to another."""

    @staticmethod
    def forward(
        ctx: Any, gates: torch.Tensor, loss: torch.Tensor, tally: torch.Tensor, total: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(tally)
        ctx.total = total
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (tally,) = ctx.saved_tensors
        ctx.total.add_(tally)
        return grad, grad.new_ones(()), None, None


def choose(logits: torch.Tensor, bias: torch.Tensor, moe: MoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and experts of each token, both ``[tokens, topk]``, from logits ``[tokens, experts]`` in fp32.

    softmax: over the chosen logits, or before the choice over all. sigmoid: the chosen scores over their sum
    (DeepSeek-V3, arXiv 2412.19437); the bias counts in the choice alone (Wang et al., arXiv 2408.15664).
    """
    sigmoid, topk = moe.moe_router_score_function == "sigmoid", moe.moe_router_topk
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1) if moe.moe_router_pre_softmax else logits
    with torch.no_grad():
        wanted = scores + bias if moe.moe_router_enable_expert_bias else scores
        if moe.moe_router_num_groups is not None:
            assert moe.moe_router_group_topk is not None
            wanted = of_best_groups(wanted, moe.moe_router_num_groups, moe.moe_router_group_topk, topk)
        experts = wanted.topk(topk, -1).indices
    gates = scores.gather(-1, experts)
    if sigmoid and topk > 1:
        gates = gates / (gates.sum(-1, keepdim=True) + TINY)
    elif not sigmoid and not moe.moe_router_pre_softmax:
        gates = gates.softmax(-1)
    if moe.moe_router_sqrt_gates:
        gates = gates.clamp(min=TINY).sqrt()
    if moe.moe_router_topk_scaling_factor is not None:
        gates = gates * moe.moe_router_topk_scaling_factor
    return gates, experts


def of_best_groups(scores: torch.Tensor, groups: int, chosen: int, topk: int) -> torch.Tensor:
    """Scores ``[tokens, experts]``, minus infinity outside each token's best groups of neighbouring experts.

    A group is as good as the sum of its best ``topk / chosen`` scores (DeepSeek-V3, arXiv 2412.19437).
    """
    grouped = scores.unflatten(-1, (groups, -1))
    merit = grouped.topk(topk // chosen, -1).values.sum(-1)
    best = torch.zeros_like(merit, dtype=torch.bool).scatter_(-1, merit.topk(chosen, -1).indices, True)
    return grouped.masked_fill(~best[..., None], -math.inf).flatten(-2)


def within_capacity(
    gates: torch.Tensor, experts: torch.Tensor, number: int, capacity: int, policy: str
) -> torch.Tensor:
    """Which assignments ``[tokens, topk]`` fit: each of ``number`` experts keeps ``capacity`` of those to it.

    Those with the largest gates (``policy`` probs; the first of equal ones), or the first (position).
    """
    flat = experts.flatten()
    order = torch.arange(len(flat), device=flat.device)
    if policy == "probs":
        order = gates.detach().flatten().argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]
    ranked = flat[order]
    first = torch.searchsorted(ranked, torch.arange(number, device=flat.device))
    place = torch.arange(len(flat), device=flat.device) - first[ranked]
    return torch.empty_like(flat, dtype=torch.bool).scatter_(0, order, place < capacity).view_as(experts)


def all_probabilities(logits: torch.Tensor, moe: MoEConfig) -> torch.Tensor:
    """Probabilities of all experts, which the balancing loss looks at; like the logits."""
    if moe.moe_router_score_function == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / (scores.sum(-1, keepdim=True) + TINY)


def balancing_loss(probabilities: torch.Tensor, loads: torch.Tensor, length: int) -> torch.Tensor:
    """``experts * sum_i f_i P_i`` (Switch Transformer, arXiv 2101.03961, eq. 4), mean over sequences.

    Args:
        probabilities: ``[seq here, batch, experts]``; their mean over tokens is P. A sequence shard gives its part of
            the sum.
        loads: ``[batch or 1, experts]``, f: the share of assignments that each expert gets; constants.
        length: of the whole sequence.
    """
    batch, experts = probabilities.shape[1:]
    return experts * (loads * probabilities.sum(0)).sum() / (length * batch)
