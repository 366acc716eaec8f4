"""Mixture of experts."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Literal

from megatron_mup.config.errors import ConfigError

_LONGEST_PATTERN = 10_000


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts."""

    num_experts: int | None = None
    """Experts of each MoE layer. Default: no experts, all MLPs are dense."""
    moe_layer_freq: str = "1"
    """Which layers have experts: every N-th from the first (1: all), or a pattern of 0 (dense) and 1 (experts) such as
    "[0]*3+[1]*58"."""
    moe_ffn_hidden_size: int | None = None
    """Inner width of each expert. Default: the MLP's."""
    moe_shared_expert_intermediate_size: int | None = None
    """Inner width, all shared experts together, of the MLP that every token passes beside its routed experts. Default:
    no shared experts."""
    moe_shared_expert_overlap: bool = False
    """Compute shared experts while tokens travel to the ranks of their experts, and gradients back. Bitwise the same
    step; whether it is faster depends on the network."""
    moe_router_topk: int = 2
    """Experts that each token goes to."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """From router logits to scores. sigmoid: the chosen scores are divided by their sum."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before the choice, instead of over the chosen ones after it."""
    moe_router_topk_scaling_factor: float | None = None
    """Factor on the gates. Default: none."""
    moe_router_sqrt_gates: bool = False
    """Gates are square roots of normalised ones: their squares, not they, sum to one, so that the output keeps its size
    when more and smaller experts are chosen."""
    moe_router_num_groups: int | None = None
    """Groups of experts; a token's experts come from --moe-router-group-topk of them. Default: no groups."""
    moe_router_group_topk: int | None = None
    """Groups that each token may choose from: those with the highest sums of their best scores."""
    moe_router_enable_expert_bias: bool = False
    """Balance without a loss: a bias on each expert's score that counts in the choice alone and moves after each step
    against the load (DeepSeek-V3). Needs sigmoid scores."""
    moe_router_bias_update_rate: float = 1e-3
    """Step of the expert bias."""
    moe_router_load_balancing_type: Literal["global_aux_loss", "aux_loss", "seq_aux_loss", "none"] = "global_aux_loss"
    """Loads in the balancing loss. global_aux_loss: of the last global batch; aux_loss: of the micro-batch;
    seq_aux_loss: of each sequence. Only aux_loss depends on --micro-batch-size."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the balancing loss; 0 turns it off."""
    moe_z_loss_coeff: float = 0.0
    """Weight of the router's z-loss, the mean of logsumexp(logits)^2; 0 turns it off."""
    moe_input_jitter_eps: float | None = None
    """Jitter on the router's input in training: each element times a random number within this of 1. Default: none."""
    moe_expert_capacity_factor: float | None = None
    """An expert takes at most this many times its even share of each rank's micro-batch and drops the rest. Default: no
    token is dropped."""
    moe_pad_expert_input_to_capacity: bool = False
    """Fill each expert's input up to its capacity: shapes are then known in advance and no step waits for a count."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an expert keeps above its capacity: those with the largest gates, or the first."""
    moe_per_layer_logging: bool = False
    """Record loads, losses and tokens per expert of each layer, beside their means over layers."""

    def layers(self, num_layers: int) -> tuple[bool, ...]:
        """Whether each layer has experts, ``--moe-layer-freq`` read.

        Raises:
            ConfigError: text that is no frequency or pattern, or a pattern of another length.
        """
        if self.num_experts is None:
            return (False,) * num_layers
        pattern = _pattern(self.moe_layer_freq)
        if isinstance(pattern, int) and pattern >= 1:
            return tuple(layer % pattern == 0 for layer in range(num_layers))
        if not isinstance(pattern, list) or any(place not in (0, 1) for place in pattern):
            raise ConfigError(
                f"--moe-layer-freq {self.moe_layer_freq}",
                "neither a frequency nor a pattern of 0 and 1",
                "write 2 for every other layer, or for instance '[0]*1+[1]*23'",
            )
        if len(pattern) != num_layers:
            raise ConfigError(
                f"--moe-layer-freq {self.moe_layer_freq}, --num-layers {num_layers}",
                f"the pattern has {len(pattern)} layers",
                "write one 0 or 1 for each layer",
            )
        return tuple(place == 1 for place in pattern)


def _pattern(text: str) -> int | list[int] | None:
    """Value of a whole number or of a list put together with ``+`` and ``*``; None for anything else."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> int | list[int]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        places = [_value(place) for place in node.elts]
        if all(isinstance(place, int) for place in places):
            return [place for place in places if isinstance(place, int)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) != isinstance(right, list):
            pattern, times = (left, right) if isinstance(left, list) else (right, left)
            assert isinstance(pattern, list)
            assert isinstance(times, int)
            if 0 <= times * len(pattern) <= _LONGEST_PATTERN:
                return pattern * times
    raise ValueError("no pattern")
