"""A grown model computes what the small one did, and everything in it learns."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.checkpoint.convert.grow import grown_config, sources
from megatron_mup.config import ConfigError
from megatron_mup.inference import load_model
from tests.checkpoint.convert.hf_cases import convert, tokens
from tests.runs import config_of, pretrain, saved_tensors, words

SMALL = "--num-layers 2 --seq-length 64"
RUNS = {
    "llama": f"{SMALL} --swiglu --disable-bias-linear --num-query-groups 2 --qk-layernorm",
    "gpt2": f"{SMALL} --normalization LayerNorm --position-embedding-type learned_absolute",
    "squared": f"{SMALL} --squared-relu --normalization LayerNorm",
    "completep": f"{SMALL} --swiglu --parametrization completep --mup-base-hidden-size 16 --base-num-layers 1",
}


def test_old_layers_are_spread():
    assert sources(2, 2) == [0, 1]
    assert sources(2, 5) == [0, None, 1, None, None]
    assert [layer for layer in sources(12, 31) if layer is not None] == list(range(12))


@pytest.mark.parametrize("name", ["llama", "gpt2", "completep"])
def test_growing(pool, tmp_path, name):
    (outcome,) = pool.launch(1, pretrain, words(RUNS[name], f"--save {tmp_path}/small"))
    assert outcome.code == 0, outcome.err
    sizes = ("--num-layers", 5, "--ffn-hidden-size", 112)
    assert convert("grow", "--load", tmp_path / "small", "--save", tmp_path / "big", *sizes) == 0
    small, big = load_model(tmp_path / "small").model, load_model(tmp_path / "big").model
    assert len(big.decoder.layers) == 5
    assert big.decoder.layers["0"].mlp.linear_fc2.weight.shape == (32, 112)
    assert (big(tokens()) - small(tokens())).abs().max() < 1e-5
    assert_learns(pool, tmp_path, f"{RUNS[name]} --num-layers 5 --ffn-hidden-size 112")


def assert_learns(pool, folder, flags) -> None:
    """Trains the grown model; every row and every column of every matrix changes."""
    files = f"--pretrained-checkpoint {folder}/big --save {folder}/more --train-iters 3"
    (outcome,) = pool.launch(1, pretrain, words(flags, files))
    assert outcome.code == 0, outcome.err
    before, after = saved_tensors(folder / "big" / "iter_0000000"), saved_tensors(folder / "more" / "iter_0000003")
    for key, value in before.items():
        assert torch.isfinite(after[key]).all()
        for dim in range(value.dim() - 1):
            still = (after[key] == value).all(1 - dim).float().mean()
            assert still < 0.9 or "position" in key or "word" in key, key


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.long), "completep"])
def test_a_wider_stream(pool, tmp_path, name):
    """The size of activations is such that a wrong epsilon would be seen."""
    flags = f"{RUNS[name]} --norm-epsilon 0.01"
    (outcome,) = pool.launch(1, pretrain, words(flags, f"--save {tmp_path}/small"))
    assert outcome.code == 0, outcome.err
    sizes = ("--num-layers", 3, "--hidden-size", 56)
    assert convert("grow", "--load", tmp_path / "small", "--save", tmp_path / "big", *sizes) == 0
    small, big = load_model(tmp_path / "small"), load_model(tmp_path / "big")
    assert big.config.model.norm_epsilon == pytest.approx(0.01 * 32 / 56)
    assert big.model.decoder.layers["0"].self_attention.linear_qkv.weight.shape[1] == 56
    assert (big.model(tokens()) - small.model(tokens())).abs().max() < 1e-5
    grown = f"--num-layers 3 --hidden-size 56 --kv-channels 8 --norm-epsilon {big.config.model.norm_epsilon!r}"
    assert_learns(pool, tmp_path, f"{RUNS[name]} {grown}")


DAILY = (("completep", 1), ("llama", 2))


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        pytest.param(name, granularity, marks=[] if (name, granularity) in DAILY else [pytest.mark.long])
        for name in ("llama", "completep", "squared")
        for granularity in (1, 2)
    ],
)
def test_upcycling(pool, tmp_path, name, granularity):
    flags = f"{RUNS[name]} --disable-bias-linear"
    (outcome,) = pool.launch(1, pretrain, words(flags, f"--save {tmp_path}/small"))
    assert outcome.code == 0, outcome.err
    experts, topk = 4 * granularity, 2 * granularity
    sizes = ("--num-experts", experts, "--moe-router-topk", topk, "--moe-upcycling-granularity", granularity)
    pattern = "[0,1]" if name == "llama" else "1"
    words_of = ("--load", tmp_path / "small", "--save", tmp_path / "big", "--moe-layer-freq", pattern, *sizes)
    assert convert("upcycle", *words_of) == 0
    small, big = load_model(tmp_path / "small").model, load_model(tmp_path / "big").model
    assert big.decoder.layers["1"].mlp.router.weight.unique(dim=0).shape[0] == 4
    assert ("mlp.router.weight" in dict(big.decoder.layers["0"].named_parameters())) == (name != "llama")
    assert (big(tokens()) - small(tokens())).abs().max() < 1e-5
    grown = f"{flags} --num-experts {experts} --moe-router-topk {topk} --moe-layer-freq {pattern}"
    assert_learns(pool, tmp_path, f"{grown} --moe-ffn-hidden-size {64 // granularity}")
    after = saved_tensors(tmp_path / "more" / "iter_0000003")["model/decoder.layers.1.mlp.experts.linear_fc2.weight"]
    assert after.unflatten(0, (experts, -1)).unique(dim=0).shape[0] == experts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--normalization LayerNorm", "--normalization LayerNorm subtracts a mean"),
        ("--no-norm-affine", "norms have no gains"),
        ("--norm-position post-branch", "--norm-position post-branch"),
        ("--num-experts 4 --disable-bias-linear", "models with experts can't be grown"),
        (
            "--parametrization umup --disable-bias-linear --untie-embeddings-and-output-weights",
            "operations are unit-scaled (--parametrization umup)",
        ),
    ],
)
def test_streams_that_cannot_be_wider(flags, message):
    with pytest.raises(ConfigError) as caught:
        grown_config(config_of(flags), hidden_size=64)
    assert message in str(caught.value)


def test_mistakes(pool, tmp_path, capsys):
    (outcome,) = pool.launch(1, pretrain, words(RUNS["llama"], f"--save {tmp_path}/small"))
    assert outcome.code == 0, outcome.err
    for flags, message in (
        (("--num-layers", 1), "--num-layers 1: the model has 2"),
        (("--ffn-hidden-size", 100), "must be a multiple of 8"),
        (("--hidden-size", 24), "--hidden-size 24: the model has 32"),
    ):
        assert convert("grow", "--load", tmp_path / "small", "--save", tmp_path / "big", *flags) == 2
        assert message in capsys.readouterr().err
    for flags, message in (
        (("--num-experts", 6, "--moe-upcycling-granularity", 4), "granularity 4, --num-experts 6: each copy"),
        (("--num-experts", 4, "--moe-router-topk", 5), "--moe-router-topk 5"),
        (("--num-experts", 4, "--moe-layer-freq", "[1]*3"), "--moe-layer-freq [1]*3"),
    ):
        assert convert("upcycle", "--load", tmp_path / "small", "--save", tmp_path / "big", *flags) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "big").exists()
