"""What the operations of unit-scaled models multiply by, forward and backward; plain models: by nothing.

u-muP (arXiv 2407.17465, appendix B; graphcore-research/unit-scaling) brings every tensor near a root mean square of 1
at the start, gradients included: each operation has a factor forward and may have another backward. Where the two
differ, the gradient of the parameters is a multiple of the true one, the same multiple for every token.

Munit scaling (muS, arXiv 2502.05967) has factors on its matrices alone, the same in both directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_mup.config import Config
from megatron_mup.parametrization.meta import ParamMeta, Role
from megatron_mup.parametrization.schemes import Operations
from megatron_mup.parametrization.table import forward_multipliers, scheme_of


@dataclass(frozen=True)
class Scales:
    """Factors of an operation with a weight.

    Attributes:
        forward: on the output.
        weight: on the gradient of the weight (and bias).
        backward: on the gradient of the input.
    """

    forward: float = 1.0
    weight: float = 1.0
    backward: float = 1.0


PLAIN = Scales()


@dataclass(frozen=True)
class Residual:
    """How a branch joins the residual stream: ``skip * x + branch * f(x)``.

    Attributes:
        delayed: the gradient takes ``branch`` where it leaves the branch for the stream, not where it enters: inside
            the branch it keeps its size.
    """

    skip: float | torch.Tensor = 1.0
    branch: float | torch.Tensor = 1.0
    delayed: bool = False


def matrix_scales(meta: ParamMeta, config: Config) -> Scales:
    """Factors of a linear layer or an embedding.

    Output and gradient of the input divide by the square root of what they sum over. The two must agree over a whole
    branch, or the branch would send a wrong share of gradient to the stream: query/key/value and attention output take
    the forward factor backward too, the MLP's two layers mirror each other. The head's gradient ends in no sum with
    another, so it has its own. What all weight gradients share, 1/sqrt(tokens), is applied by the training step.
    """
    operations = scheme_of(config).operations
    root = 1.0 / math.sqrt(meta.fan_in)
    if operations is Operations.MUNIT and meta.role.is_hidden_matrix:
        return Scales(root, root, root)
    if operations is not Operations.UMUP:
        return PLAIN
    match meta.role:
        case Role.QKV | Role.ATTENTION_OUTPUT:
            return Scales(root, 1.0, root)
        case Role.MLP_IN:
            return Scales(root, 1.0, 1.0 / math.sqrt(config.model.ffn_size))
        case Role.MLP_OUT:
            return Scales(root, 1.0, 1.0 / math.sqrt(config.model.hidden_size))
        case Role.READOUT:
            # Its 1/fan_in is the factor on the logits.
            return Scales(1.0, 1.0, 1.0 / math.sqrt(meta.shape[0]))
        case Role.EMBEDDING:
            return Scales(1.0, math.sqrt(meta.shape[0]), 1.0)
    return PLAIN


def gain_scale(config: Config, sharing: int) -> float:
    """Factor on the gradient of a norm's gain (and bias) that ``sharing`` vectors of each token pass."""
    return 1.0 / math.sqrt(sharing) if scheme_of(config).operations is Operations.UMUP else 1.0


def attention_scale(config: Config) -> float:
    """Factor on the output of attention over a whole sequence of the training length.

    It undoes the average over ``s`` values (``sqrt(ln(s) / s)`` where all weigh alike, 1 where one has all the weight)
    and dropout. The training length stands for shorter sequences too: a model is one function.
    """
    if scheme_of(config).operations is not Operations.UMUP:
        return 1.0
    model, mult = config.model, config.parametrization.mup_attention_mult
    return math.sqrt(1 - model.attention_dropout) / attention_rms(model.head_dim, config.training.seq_length, mult)


def activation_mult(config: Config) -> float:
    """Factor inside the MLP's activation."""
    umup = scheme_of(config).operations is Operations.UMUP
    return config.parametrization.mup_ffn_act_mult if umup else 1.0


def activation_scale(config: Config) -> float:
    """Factor on the output of the MLP's activation."""
    if scheme_of(config).operations is not Operations.UMUP:
        return 1.0
    mult = activation_mult(config)
    return swiglu_scale(mult) if config.model.swiglu else gelu_scale(mult)


def dropout_scale(config: Config) -> float:
    """Factor on a branch or embedding that ``--hidden-dropout`` thinned, in evaluation too."""
    if scheme_of(config).operations is not Operations.UMUP:
        return 1.0
    return math.sqrt(1 - config.model.hidden_dropout)


def logits_gradient(config: Config, vocab_size: int, forward: float) -> float:
    """Factor on the gradient of the logits behind their own factor ``forward``.

    At the start a token's gradient has the root mean square ``sqrt(V - 1) / V``; u-muP brings it to 1.
    """
    if scheme_of(config).operations is not Operations.UMUP:
        return forward
    return vocab_size / math.sqrt(vocab_size - 1)


def residual(config: Config, layer: int, branch: str) -> Residual:
    """Weights of a branch, ``"attention"`` or ``"mlp"``, of a layer.

    Plain schemes have the branch's factor of `ForwardMultipliers`. u-muP (appendix G): with ``a`` the weight of the
    branch's kind against the embedding, ``tau`` is ``a`` over the root of what the stream holds by then, and the
    weights are ``tau`` and 1 over ``sqrt(1 + tau^2)``. muS: roots of ``tau`` and ``1 - tau``.
    """
    flags, operations = config.parametrization, scheme_of(config).operations
    if operations is Operations.MUNIT:
        tau = flags.residual_tau or 0.0
        return Residual(math.sqrt(1 - tau), math.sqrt(tau))
    if operations is Operations.PLAIN:
        factors = forward_multipliers(config)
        return Residual(branch=factors.mlp_branch if branch == "mlp" else factors.attention_branch)
    index = 2 * layer + (branch == "mlp")
    tau = residual_tau(index, config.model.num_layers, flags.mup_residual_mult, flags.mup_residual_attention_ratio)
    whole = math.sqrt(1 + tau**2)
    return Residual(1 / whole, tau / whole, delayed=True)


def scales_gradients(config: Config) -> bool:
    """Whether gradients are those of a sum over tokens, brought to the size of one by 1/sqrt(tokens)."""
    return scheme_of(config).operations is Operations.UMUP


def fp8_gradient_scale(config: Config) -> float:
    """Power of two that brings gradients of a sum over tokens, as hidden matrices get them, near unit scale for FP8.

    u-muP's are there. Munit scaling has true gradients: what reaches the last norm has passed the logits' factor, and
    norms and residual weights keep its size. Derived here: the paper (2502.05967) doesn't say how losses are scaled.
    """
    if scheme_of(config).operations is Operations.UMUP:
        return 1.0
    return float(2.0 ** round(-math.log2(forward_multipliers(config).logits)))


# ---- Formulas of u-muP


def log_interpolate(share: float, low: float, high: float) -> float:
    """``low`` at share 0, ``high`` at share 1, a straight line between their logarithms."""
    return math.exp(share * math.log(high) + (1 - share) * math.log(low))


def attention_rms(head_dim: int, seq: int, mult: float) -> float:
    """Size of causal attention's output over ``seq`` unit-scaled values, with logits ``mult / head_dim``."""
    flat = math.sqrt(math.log(seq) / seq) if seq > 1 else 1.0
    return log_interpolate(1 / (1 + 4 * head_dim / mult**2), flat, 1.0)


def swiglu_scale(mult: float) -> float:
    """Factor on ``up * gate * sigmoid(mult * gate)``, forward and backward."""
    return log_interpolate(1 / (1 + 1 / mult**2), 2.0, math.sqrt(2))


def gelu_scale(mult: float) -> float:
    """Factor on ``gelu(mult * x) / mult``, forward and backward."""
    return log_interpolate(1 / (1 + 0.25 / mult**2), 2.0, math.sqrt(2 / (1 - 1 / math.pi)))


def residual_tau(index: int, layers: int, mult: float, attention_ratio: float) -> float:
    """Weight of residual branch ``index`` (even: attention) over the stream in front of it, for ``layers`` layers."""
    mlp = mult * math.sqrt(2 / (1 + attention_ratio**2))
    attention = attention_ratio * mlp
    held = layers + math.ceil(index / 2) * attention**2 + index // 2 * mlp**2
    return (mlp if index % 2 else attention) / math.sqrt(held)
