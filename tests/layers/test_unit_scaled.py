"""Unit-scaled operations, forward and backward, against graphcore-research/unit-scaling 0.3.5.

Each number below was computed once by that library (in fp64, root mean squares too) from the inputs that are made here:
the sum of a tensor times cosines, for the output and each gradient of an operation.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megatron_mup.layers.factory import LayerFactory
from megatron_mup.layers.info import TokenInfo
from megatron_mup.layers.loss import vocab_parallel_cross_entropy
from megatron_mup.layers.scale import scale
from megatron_mup.models.block import TransformerLayer
from megatron_mup.parallel.mesh import ALONE
from megatron_mup.parametrization import operations
from megatron_mup.parametrization.meta import Role
from megatron_mup.parametrization.table import forward_multipliers
from tests.runs import config_of

HIDDEN, FFN, HEADS, SEQ, BATCH, VOCAB = 16, 24, 2, 12, 3, 20
TOKENS = SEQ * BATCH
MULTS = "--mup-attention-mult 1.3 --mup-ffn-act-mult 0.7 --mup-output-mult 1.4"
FLAGS = (
    f"--parametrization umup --num-layers 2 --hidden-size {HIDDEN} --ffn-hidden-size {FFN} "
    f"--num-attention-heads {HEADS} --seq-length {SEQ} --vocab-size {VOCAB} --position-embedding-type none "
    "--disable-bias-linear --untie-embeddings-and-output-weights"
)

GOLDEN: dict[str, dict[str, float]] = {
    "swiglu": {
        "output": -6.46094744,
        "input": 0.979691587,
        "fc1": -2.65150583,
        "fc2": -84.0103931,
    },
    "swiglu-mult": {
        "output": -5.61279407,
        "input": 0.709949047,
        "fc1": -2.78670116,
        "fc2": -77.9584322,
    },
    "gelu": {
        "output": -11.124921,
        "input": -0.0690009728,
        "fc1": 1.5464823,
        "fc2": 67.9208405,
    },
    "gelu-mult": {
        "output": -11.3774567,
        "input": -0.0793392157,
        "fc1": 1.57929145,
        "fc2": 69.5074578,
    },
    "attention": {
        "output": -3.4974927,
        "input": -2.66029792,
        "qkv": -0.848687171,
        "proj": -0.117009808,
    },
    "attention-mult": {
        "output": -3.46018352,
        "input": -1.87744166,
        "qkv": -0.805819357,
        "proj": -0.164302598,
    },
    "rms-norm": {
        "output": 9.18664087,
        "input": 16.7853837,
        "weight": 7.22042731,
    },
    "layer-norm": {
        "output": 11.5611873,
        "input": -9.06878414,
        "weight": 6.84339518,
        "bias": 0.188315653,
    },
    "query-norm": {
        "output": 1.54838172,
        "input": -0.512716145,
        "weight": -11.3135482,
    },
    "embedding": {
        "output": -2.45593358,
        "weight": -1.8890637,
    },
    "loss": {
        "output": 3.2501967,
        "input": 9.87811664,
        "weight": -0.1757042,
    },
    "loss-mult": {
        "output": 3.46230688,
        "input": 10.5535839,
        "weight": 0.437924009,
    },
    "layer": {
        "output": 1.36995477,
        "input": -2.50765587,
        "self_attention.linear_qkv.weight": -0.729714275,
        "self_attention.linear_proj.weight": 0.419209218,
        "mlp.linear_fc1.weight": -5.23082489,
        "mlp.linear_fc2.weight": -2.87235527,
    },
}


def wave(*shape: int, phase: float = 0.0) -> torch.Tensor:
    """Values of unit size."""
    return math.sqrt(2) * torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).view(shape)


def told(tensor: torch.Tensor) -> float:
    """One number that sees every element."""
    flat = tensor.detach().double().flatten()
    return (flat * torch.cos(0.3 * torch.arange(len(flat), dtype=torch.float64))).sum().item()


def factory(*flags: str) -> LayerFactory:
    return LayerFactory(config_of(FLAGS, *flags), VOCAB, ALONE, torch.float64)


def filled(module: nn.Module) -> nn.Module:
    """The module with memory and known weights."""
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for number, param in enumerate(module.parameters()):
            param.copy_(wave(*param.shape, phase=1.0 + number))
    return module


def observed(output: torch.Tensor, **gradients: torch.Tensor) -> dict[str, float]:
    """Numbers of the output and of the gradients; weights' with the step's own 1/sqrt(tokens)."""
    output.backward(wave(*output.shape, phase=2.0))
    seen = {"output": told(output)}
    for name, tensor in gradients.items():
        factor = 1.0 if name.startswith("input") else TOKENS**-0.5
        seen[name] = told(tensor.grad * factor)
    return seen


def tokens_first() -> torch.Tensor:
    return wave(SEQ, BATCH, HIDDEN).requires_grad_()


def mlp(*flags: str) -> dict[str, float]:
    module, x = filled(factory(*flags).mlp("mlp", 0)), tokens_first()
    return observed(module(x), input=x, fc1=module.linear_fc1.weight, fc2=module.linear_fc2.weight)


def attention(*flags: str) -> dict[str, float]:
    module, x = filled(factory(*flags).attention("attention", 0)), tokens_first()
    return observed(module(x, TokenInfo(), None), input=x, qkv=module.linear_qkv.weight, proj=module.linear_proj.weight)


def norm(*flags: str) -> dict[str, float]:
    module, x = filled(factory(*flags).norm("norm", 0)), tokens_first()
    return observed(module(x), input=x, **dict(module.named_parameters()))


def query_norm() -> dict[str, float]:
    module, x = filled(factory().norm("norm", 0, Role.QK_NORM, HEADS)), tokens_first()
    return observed(module(x.view(SEQ, BATCH, HEADS, -1)).view_as(x), input=x, weight=module.weight)


def embedding() -> dict[str, float]:
    module = filled(factory().word_embeddings())
    return observed(module((torch.arange(TOKENS) ** 2 % VOCAB).view(SEQ, BATCH)), weight=module.weight)


def head_and_loss(*flags: str) -> dict[str, float]:
    made, x = factory(*flags), tokens_first()
    module = filled(made.output_layer(embedding_is_here=True))
    factor = forward_multipliers(made.config).logits
    logits = scale(module(x), factor, operations.logits_gradient(made.config, VOCAB, factor))
    labels = (torch.arange(TOKENS) * 7 % VOCAB).view(SEQ, BATCH)
    loss, _ = vocab_parallel_cross_entropy(logits, labels, 0, ALONE)
    loss.sum().backward()
    return {
        "output": loss.mean().item(),
        "input": told(x.grad),
        "weight": told(module.weight.grad * TOKENS**-0.5),
    }


def layer() -> dict[str, float]:
    made, x = (
        factory("--mup-residual-mult 1.7 --mup-residual-attention-ratio 0.6 --swiglu --no-norm-affine"),
        tokens_first(),
    )
    module = filled(TransformerLayer(made, 1))
    seen = observed(module(x, TokenInfo(), None), input=x)
    return seen | {name: told(param.grad * TOKENS**-0.5) for name, param in module.named_parameters()}


CASES = {
    "swiglu": lambda: mlp("--swiglu"),
    "swiglu-mult": lambda: mlp("--swiglu", MULTS),
    "gelu": mlp,
    "gelu-mult": lambda: mlp(MULTS),
    "attention": attention,
    "attention-mult": lambda: attention(MULTS),
    "rms-norm": norm,
    "layer-norm": lambda: norm("--normalization LayerNorm"),
    "query-norm": query_norm,
    "embedding": embedding,
    "loss": head_and_loss,
    "loss-mult": lambda: head_and_loss(MULTS),
    "layer": layer,
}


@pytest.mark.parametrize("case", CASES)
def test_operation_equals_the_library(case):
    seen = CASES[case]()
    assert seen.keys() == GOLDEN[case].keys()
    for name, wanted in GOLDEN[case].items():
        assert seen[name] == pytest.approx(wanted, rel=1e-6, abs=2e-6), name
