"""A grown model computes what the small one did, and everything in it learns."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.checkpoint.convert.grow import sources
from megatron_mup.inference import load_model
from tests.checkpoint.convert.hf_cases import convert, tokens
from tests.runs import pretrain, saved_tensors, words

SMALL = "--num-layers 2 --seq-length 64"
RUNS = {
    "llama": f"{SMALL} --swiglu --disable-bias-linear --num-query-groups 2 --qk-layernorm",
    "gpt2": f"{SMALL} --normalization LayerNorm --position-embedding-type learned_absolute",
    "completep": f"{SMALL} --swiglu --parametrization completep --mup-base-hidden-size 16 --base-num-layers 1",
}


def test_old_layers_are_spread():
    assert sources(2, 2) == [0, 1]
    assert sources(2, 5) == [0, None, 1, None, None]
    assert [layer for layer in sources(12, 31) if layer is not None] == list(range(12))


@pytest.mark.parametrize("name", RUNS)
def test_growing(pool, tmp_path, name):
    (outcome,) = pool.launch(1, pretrain, words(RUNS[name], f"--save {tmp_path}/small"))
    assert outcome.code == 0, outcome.err
    sizes = ("--num-layers", 5, "--ffn-hidden-size", 112)
    assert convert("grow", "--load", tmp_path / "small", "--save", tmp_path / "big", *sizes) == 0
    small, big = load_model(tmp_path / "small").model, load_model(tmp_path / "big").model
    assert len(big.decoder.layers) == 5
    assert big.decoder.layers["0"].mlp.linear_fc2.weight.shape == (32, 112)
    assert (big(tokens()) - small(tokens())).abs().max() < 1e-5

    grown = f"{RUNS[name]} --num-layers 5 --ffn-hidden-size 112 --train-iters 3"
    files = f"--pretrained-checkpoint {tmp_path}/big --save {tmp_path}/more"
    (outcome,) = pool.launch(1, pretrain, words(grown, files))
    assert outcome.code == 0, outcome.err
    before, after = saved_tensors(tmp_path / "big" / "iter_0000000"), saved_tensors(tmp_path / "more" / "iter_0000003")
    for key, value in before.items():
        assert torch.isfinite(after[key]).all()
        if value.dim() == 2:
            still = (after[key] == value).all(1).float().mean()
            assert still < 0.9 or "position" in key or "word" in key, key


def test_mistakes(pool, tmp_path, capsys):
    (outcome,) = pool.launch(1, pretrain, words(RUNS["llama"], f"--save {tmp_path}/small"))
    assert outcome.code == 0, outcome.err
    for flags, message in (
        (("--num-layers", 1), "--num-layers 1: the model has 2"),
        (("--ffn-hidden-size", 100), "must be a multiple of 8"),
    ):
        assert convert("grow", "--load", tmp_path / "small", "--save", tmp_path / "big", *flags) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "big").exists()
