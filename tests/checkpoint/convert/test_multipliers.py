"""Models of every parametrization leave with their function: folded into plain weights, or mapped to Granite."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_mup.checkpoint.convert.architectures import to_hf_config
from megatron_mup.config import ConfigError
from megatron_mup.inference import load_model
from tests.checkpoint.convert.hf_cases import convert, hf_logits, tensors, tokens
from tests.runs import VOCAB_SIZE, config_of, pretrain, words

PLAIN = "--swiglu --disable-bias-linear --num-query-groups 2 --num-layers 4 --seq-length 64"
COMPLETEP = (
    f"{PLAIN} --parametrization completep --mup-base-hidden-size 16 --mup-base-head-dim 4 --base-num-layers 2 "
    "--mup-embedding-mult 3.3 --mup-output-mult 1.7 --mup-attention-mult 1.9 --mup-residual-mult 0.7"
)
EXPERTS = "--num-experts 4 --moe-ffn-hidden-size 24 --moe-router-topk 3"
LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"
RUNS = {
    "completep": (1, COMPLETEP),
    "completep-untied-tp2-pp2": (4, f"{COMPLETEP} --untie-embeddings-and-output-weights {LAYOUT}"),
    "qk-norm": (1, f"{COMPLETEP} --qk-layernorm --norm-epsilon 1e-4"),
    "biases": (1, COMPLETEP.replace("--disable-bias-linear", "--untie-embeddings-and-output-weights")),
    "qkv-biases": (1, f"{COMPLETEP} --add-qkv-bias"),
    "window": (1, f"{COMPLETEP} --window-size 9 --kv-channels 12"),
    "xmodel": (
        1,
        f"{PLAIN} --parametrization mup --mup-base-hidden-size 16 --mup-attention-residual-scale 1.4 "
        "--mup-ffn-residual-scale 1.1 --mup-output-mult 0.5",
    ),
    "experts": (1, f"{COMPLETEP} {EXPERTS} --moe-expert-capacity-factor 0.5"),
    "experts-ep2": (
        2,
        f"{COMPLETEP} {EXPERTS} --expert-model-parallel-size 2 --qk-layernorm --moe-layer-freq 2 "
        "--moe-router-pre-softmax --moe-router-topk-scaling-factor 1.7",
    ),
    "experts-tp2-pp2-ep2": (4, f"{COMPLETEP} {EXPERTS} {LAYOUT} --expert-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory):
    """Folders of short runs, by name."""
    folders = {}

    def folder(name: str):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "run"
            ranks, flags = RUNS[name]
            for outcome in pool.launch(ranks, pretrain, words(flags, f"--save {folders[name]}")):
                assert outcome.code == 0, outcome.err
        return folders[name]

    return folder


@pytest.mark.parametrize(
    ("run", "flags", "architecture"),
    [
        ("completep", (), "llama"),
        ("completep", ("--multipliers", "granite"), "granite"),
        ("completep", ("--architecture", "mistral"), "mistral"),
        ("completep", ("--architecture", "granite", "--multipliers", "fold"), "granite"),
        ("completep-untied-tp2-pp2", (), "llama"),
        ("completep-untied-tp2-pp2", ("--multipliers", "granite"), "granite"),
        ("qk-norm", (), "qwen3"),
        ("biases", (), "llama"),
        ("biases", ("--architecture", "granite"), "granite"),
        ("qkv-biases", (), "qwen2"),
        ("window", (), "mistral"),
        ("xmodel", (), "llama"),
        ("xmodel", ("--multipliers", "granite"), "granite"),
        pytest.param("experts", (), "mixtral", marks=pytest.mark.long),
        pytest.param("experts", ("--multipliers", "granite"), "granitemoe", marks=pytest.mark.long),
        ("experts-ep2", (), "qwen3_moe"),
        pytest.param("experts-tp2-pp2-ep2", (), "mixtral", marks=pytest.mark.long),
        ("experts-tp2-pp2-ep2", ("--multipliers", "granite"), "granitemoe"),
    ],
)
def test_a_trained_model_keeps_its_function(trained, tmp_path, run, flags, architecture):
    source = trained(run)
    assert convert("to-hf", "--load", source, "--save", tmp_path / "hf", *flags) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == architecture
    model = load_model(source).model
    logits = model(tokens()).transpose(0, 1)
    assert logits.std() > 0.1
    assert (hf_logits(tmp_path / "hf", tokens()) - logits).abs().max() < 1e-5
    # And what left can come back.
    assert convert("from-hf", "--load", tmp_path / "hf", "--save", tmp_path / "back") == 0
    assert convert("to-hf", "--load", tmp_path / "back", "--save", tmp_path / "again") == 0
    first, second = tensors(tmp_path / "hf"), tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_tied_model_is_untied_only_where_it_must_be(trained, tmp_path):
    for name, flags, untied in (
        ("plain", ["--multipliers", "fold"], True),
        ("granite", ["--multipliers", "granite"], False),
    ):
        assert convert("to-hf", "--load", trained("completep"), "--save", tmp_path / name, *flags) == 0
        assert ("lm_head.weight" in tensors(tmp_path / name)) == untied
    folded = tensors(tmp_path / "plain")
    ratio = folded["lm_head.weight"] / folded["model.embed_tokens.weight"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.7 / 2 / 3.3))


def test_no_multiplier_leaves_the_bits_alone():
    plain = to_hf_config(config_of(PLAIN, f"--vocab-size {VOCAB_SIZE}"))
    assert str(plain.fold) == "as they are"
    assert not plain.unties


@pytest.mark.parametrize(
    ("flags", "architecture", "multipliers", "message"),
    [
        ("--qk-layernorm", "llama", None, "--architecture llama: it has no norms on queries and keys"),
        ("", "qwen3", None, "it needs norms on queries and keys"),
        ("--add-qkv-bias", "llama", None, "it has biases on none or all"),
        ("--window-size 4", "granite", None, "it has no sliding window (--window-size 4)"),
        ("", "llama", "granite", "it has no fields for multipliers"),
        ("--normalization LayerNorm", None, None, "--normalization LayerNorm: "),
        ("--rotary-percent 0.5", None, None, "--rotary-percent 0.5: "),
        ("", "mixtral", None, "it is made of experts, and the model has none"),
        (EXPERTS, "llama", None, "it has no experts"),
        (f"{EXPERTS} --moe-layer-freq 2", None, None, "all of its layers have experts (--moe-layer-freq 2)"),
        (f"{EXPERTS} --moe-router-pre-softmax", None, None, "its softmax is over the chosen experts"),
        (f"{EXPERTS} --moe-router-score-function sigmoid", None, None, "--moe-router-score-function sigmoid: none of"),
        (f"{EXPERTS} --moe-router-sqrt-gates", None, None, "--moe-router-sqrt-gates: none of"),
        (f"{EXPERTS} --moe-shared-expert-intermediate-size 8", None, None, "intermediate-size 8: none of"),
    ],
)
def test_an_architecture_that_cannot_hold_the_model_is_refused(flags, architecture, multipliers, message):
    with pytest.raises(ConfigError) as caught:
        to_hf_config(config_of(PLAIN, flags), architecture, multipliers)
    assert message in str(caught.value)
