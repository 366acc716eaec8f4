"""Dropout: right rate and scale, and a mask that is a function of its counter alone."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.layers.dropout import drop, hidden_dropout
from tests.runs import batch_of, config_of, model_of

KEY = torch.tensor(123456789)


def dropped(x=None, probability=0.25, key=KEY, samples=(7, 8, 9), seq_start=0):
    x = torch.ones(64, len(samples), 96) if x is None else x
    return hidden_dropout(x, probability, key, torch.tensor(samples), torch.arange(seq_start, seq_start + len(x)))


@pytest.mark.parametrize("probability", [0.05, 0.25, 0.9])
def test_rate_and_scale(probability):
    y = dropped(probability=probability)
    share = (y == 0).double().mean().item()
    assert abs(share - probability) < 5 * (probability * (1 - probability) / y.numel()) ** 0.5
    assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - probability)))


def test_mask_doesnt_depend_on_the_cut():
    """Any batch order, micro-batch or sequence shard sees the same mask."""
    x = torch.randn(64, 3, 96)
    whole = dropped(x)
    assert torch.equal(dropped(x), whole)
    assert torch.equal(dropped(x[:, [2]], samples=(9,)), whole[:, [2]])
    assert torch.equal(dropped(x.flip(1), samples=(9, 8, 7)), whole.flip(1))
    assert torch.equal(dropped(x[16:40], seq_start=16), whole[16:40])


def test_masks_of_other_counters_are_independent():
    mask = dropped(samples=(7,)) == 0
    others = [dropped(samples=(8,)), dropped(samples=(7,), key=KEY + 1), dropped(samples=(7,), seq_start=64)]
    for other in others:
        both = (mask & (other == 0)).double().mean().item()
        assert abs(both - 0.25**2) < 5 * (0.0625 * 0.9375 / mask.numel()) ** 0.5


def test_gradient_has_the_same_mask():
    x = torch.randn(8, 2, 16, requires_grad=True)
    y = drop(x, 0.5, KEY, torch.arange(2)[:, None], torch.arange(16))
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 2.0))


def test_nothing_is_dropped_without_a_key_or_a_probability():
    x = torch.randn(4, 3, 8)
    assert dropped(x, key=None) is x
    assert dropped(x, probability=0.0) is x


@pytest.mark.parametrize("kind", ["hidden", "attention"])
def test_in_the_model(kind):
    """The mask changes with sample, seed and layer; evaluation has none."""
    flags = (f"--{kind}-dropout 0.5", "--num-layers 1")

    def run(*more, samples=0, train=True):
        config = config_of(*flags, *more)
        batch = batch_of(config)
        with torch.no_grad():
            model = model_of(config).train(train)
            return model(batch["tokens"], sample_index=batch["sample_index"] + samples)

    plain = run(train=False)
    torch.testing.assert_close(run(f"--{kind}-dropout 0"), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(), run())
    seen = [run(), run(samples=1), run("--seed 5"), plain]
    for place, one in enumerate(seen):
        for other in seen[:place]:
            assert not torch.allclose(one, other, atol=1e-3)


def test_keys_differ_by_layer_and_place():
    model = model_of(config_of("--hidden-dropout 0.1 --num-layers 3")).train()
    assert model.salts(torch.device("cpu")).flatten().unique().numel() == 4 * 4
    assert model.eval().salts(torch.device("cpu")) is None


@pytest.mark.long
def test_compiles_to_the_same_mask():
    """Counters from arange are index expressions to torch.compile; hashed bare, they overflow it."""
    x, samples, places = torch.ones(6, 2, 8), torch.tensor([3, 1 << 40]), torch.arange(4, 10)
    compiled = torch.compile(hidden_dropout, fullgraph=True)
    assert torch.equal(compiled(x, 0.3, KEY, samples, places), hidden_dropout(x, 0.3, KEY, samples, places))
