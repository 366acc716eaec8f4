"""A new run from others' weights: its first loss is that of the model that they are from."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.checkpoint.rescale import rescaling
from megatron_mup.config import ConfigError
from megatron_mup.inference import load_model
from tests.checkpoint.convert.hf_cases import convert, hf_logits, make, tokens
from tests.runs import config_of, pretrain, recorded, words

SIZES = (
    "--num-layers 3 --hidden-size 48 --num-attention-heads 6 --num-query-groups 2 --ffn-hidden-size 96 --swiglu "
    "--vocab-size 101 --seq-length 64 --max-position-embeddings 64 --norm-epsilon 1e-6"
)
MODELS = {
    "llama": f"{SIZES} --disable-bias-linear --untie-embeddings-and-output-weights",
    "qwen2-tied": f"{SIZES} --disable-bias-linear --add-qkv-bias",
    "qwen3-tied": f"{SIZES} --disable-bias-linear --qk-layernorm --kv-channels 8",
    "granite-tied-biases": f"{SIZES}",
}
COMPLETEP = (
    "--parametrization completep --mup-base-hidden-size 12 --mup-base-head-dim 4 --base-num-layers 2 "
    "--mup-embedding-mult 3.5 --mup-output-mult 1.7 --mup-residual-mult 0.7"
)
STILL = "--train-iters 1 --lr 1e-30 --weight-decay 0 --log-interval 1"
LAYOUT = "--tensor-model-parallel-size 2 --data-parallel-sharding-strategy optim_grads_params"


@pytest.mark.parametrize(
    ("name", "ranks", "flags"),
    [
        ("llama", 1, ""),
        ("llama", 1, COMPLETEP),
        ("llama", 4, f"{COMPLETEP} {LAYOUT}"),
        ("qwen2-tied", 1, COMPLETEP),
        ("qwen2-tied", 2, f"{COMPLETEP} --untie-embeddings-and-output-weights --pipeline-model-parallel-size 2"),
        ("qwen3-tied", 1, f"{COMPLETEP} --optimizer muon"),
        ("granite-tied-biases", 1, COMPLETEP),
    ],
)
def test_the_function_is_kept_whatever_the_parametrization(pool, tmp_path, name, ranks, flags):
    source = make(name, tmp_path / "hf", intermediate_size=96)
    assert convert("from-hf", "--load", source, "--save", tmp_path / "ours") == 0
    files = f"--pretrained-checkpoint {tmp_path}/ours --load {tmp_path}/run --save {tmp_path}/run"
    outcomes = pool.launch(ranks, pretrain, words(MODELS[name], STILL, files, flags))
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes
    assert ("rescaled to keep their function" if flags else "; as they are") in outcomes[0].out
    model = load_model(tmp_path / "run").model
    want = hf_logits(source, tokens())
    assert (model(tokens()).transpose(0, 1) - want).abs().max() < 1e-5


def test_a_run_goes_on_from_its_own_checkpoint(pool, tmp_path):
    source = make("llama", tmp_path / "hf", intermediate_size=96)
    assert convert("from-hf", "--load", source, "--save", tmp_path / "ours") == 0
    files = f"--pretrained-checkpoint {tmp_path}/ours --load {tmp_path}/run --save {tmp_path}/run"
    run = words(MODELS["llama"], files, COMPLETEP, f"--train-iters 4 --metrics-file {tmp_path}/metrics.jsonl")
    for more in ("--exit-interval 2", ""):
        (outcome,) = pool.launch(1, pretrain, [*run, *more.split(), "--log-interval", "1"])
        assert outcome.code == 0, outcome.err
        assert ("started from the weights of" in outcome.out) == bool(more)
        assert ("resumed from" in outcome.out) != bool(more)
    losses = recorded(tmp_path / "metrics.jsonl", "train/lm loss")
    assert sorted(losses) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pretrained-checkpoint {0}/nothing", "--pretrained-checkpoint {0}/nothing: the folder is missing or empty"),
        ("--pretrained-checkpoint {0}/ours --hidden-size 24 --num-attention-heads 4", "--hidden-size was 48 and is 24"),
        ("--pretrained-checkpoint {0}/ours --parametrization umup", "no factors on weights keep the function"),
    ],
)
def test_mistakes(pool, tmp_path, flags, message):
    assert (
        convert("from-hf", "--load", make("llama", tmp_path / "hf", intermediate_size=96), "--save", tmp_path / "ours")
        == 0
    )
    (outcome,) = pool.launch(1, pretrain, words(MODELS["llama"], flags.format(tmp_path)))
    assert outcome.code == 2
    assert message.format(tmp_path) in outcome.err


def test_finetune_rescales_too(pool, tmp_path):
    plain, grown = f"{MODELS['llama']} --train-iters 2", f"{MODELS['llama']} {COMPLETEP} {STILL}"
    (outcome,) = pool.launch(1, pretrain, words(plain, f"--save {tmp_path}/one"))
    assert outcome.code == 0, outcome.err
    files = f"--load {tmp_path}/one --finetune --save {tmp_path}/two"
    (outcome,) = pool.launch(1, pretrain, words(grown, files))
    assert outcome.code == 0, outcome.err
    logits = [load_model(tmp_path / name).model(tokens()) for name in ("one", "two")]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


GROWN = "--parametrization completep --mup-base-hidden-size 16 --mup-base-head-dim 4 --base-num-layers 1"


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("--norm-position post-branch --mup-base-head-dim 8", "--norm-position"),
        ("--no-norm-affine", "--no-norm-affine"),
        ("--no-norm-affine --qk-layernorm --untie-embeddings-and-output-weights", "--no-norm-affine"),
    ],
)
def test_factors_that_no_weight_can_take_up_are_refused(model, part):
    """Their place would be a gain that isn't there, or in front of a norm."""
    plain, grown = config_of(model), config_of(GROWN, model)
    with pytest.raises(ConfigError, match=part):
        rescaling(plain, grown)
    assert str(rescaling(grown, grown)) == "as they are"
