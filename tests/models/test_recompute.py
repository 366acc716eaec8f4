"""Recomputation changes memory, not a bit of the result; and it does recompute."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.layers.linear import RowLinear
from tests.runs import batch_of, config_of, model_of

FEATURES = "--num-layers 4 --hidden-dropout 0.1 --attention-dropout 0.1 --swiglu --qk-layernorm"
VARIANTS = {
    "uniform": ("--recompute-granularity full", 4),
    "uniform-3": ("--recompute-granularity full --recompute-num-layers 3", 4),
    "block-2": ("--recompute-granularity full --recompute-method block --recompute-num-layers 2", 2),
    "selective": ("--recompute-activations", 4),
}


def run(*flags):
    """Loss, gradients and how often MLP outputs were computed."""
    config = config_of(FEATURES, *flags)
    model, batch, calls = model_of(config).train(), batch_of(config), []
    for module in model.modules():
        if isinstance(module, RowLinear):
            module.register_forward_hook(lambda *_: calls.append(1))
    loss = model(batch.pop("tokens"), **batch)
    loss[0, 0].backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, len(calls)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bitwise(variant):
    flags, layers = VARIANTS[variant]
    plain, recomputed = run(), run(flags)
    assert torch.equal(recomputed[0], plain[0])
    for name, grad in plain[1].items():
        assert torch.equal(recomputed[1][name], grad), name
    # The last of a chunk's matrix products isn't needed again, hence a little slack.
    assert plain[2] == 8
    assert recomputed[2] > plain[2] + layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_doesnt_recompute(variant):
    config = config_of(FEATURES, VARIANTS[variant][0])
    model, batch = model_of(config).eval(), batch_of(config)
    with torch.no_grad():
        assert model(batch["tokens"]).shape == (16, 4, 101)
