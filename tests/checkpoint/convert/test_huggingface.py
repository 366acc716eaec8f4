"""Models of Hugging Face come here and go back: same logits, same bits."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch

from megatron_mup.checkpoint.convert.names import Entry
from megatron_mup.inference import load_model
from tests.checkpoint.convert.hf_cases import MODELS, convert, hf_logits, make, tensors, tokens
from tests.runs import saved_tensors

LONG = ("mixtral-tied-window", "qwen3_moe", "granitemoe-tied")


@pytest.mark.parametrize("name", [pytest.param(m, marks=[pytest.mark.long] if m in LONG else []) for m in MODELS])
def test_round_trip(tmp_path, name, capsys):
    source, ours, back = make(name, tmp_path / "hf"), tmp_path / "ours", tmp_path / "back"
    assert convert("from-hf", "--load", source, "--save", ours) == 0
    assert convert("to-hf", "--load", ours, "--save", back) == 0
    printed = re.findall(r"largest difference of logits ([\d.e+-]+)", capsys.readouterr().out)
    assert len(printed) == 2
    assert all(float(number) < 1e-5 for number in printed)

    want = hf_logits(source, tokens())
    assert want.std() > 0.05
    model = load_model(ours).model
    assert (model(tokens()).transpose(0, 1) - want).abs().max() < 1e-5
    torch.testing.assert_close(hf_logits(back, tokens()), want, rtol=0, atol=1e-5)

    before, after = tensors(source), tensors(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, back)]
    for key in (
        "model_type",
        "architectures",
        "tie_word_embeddings",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
    ):
        assert configs[0].get(key) == configs[1].get(key), key
    # transformers 4 and what reads its files knows these names only.
    assert configs[1]["rope_theta"] == configs[1]["rope_parameters"]["rope_theta"]
    assert ("rope_scaling" in configs[1]) == ("llama3" in name)
    assert configs[1].get("num_experts") == (5 if "qwen3_moe" in name else None)
    # Beside the model nothing is written that a later conversion needs.
    assert sorted(os.listdir(ours)) == ["iter_0000000", "latest_checkpointed_iteration.txt"]
    assert sorted(os.listdir(back)) == ["config.json", "model.safetensors"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_half_precision_and_several_files(tmp_path, capsys):
    ours, back, again = tmp_path / "ours", tmp_path / "back", tmp_path / "again"
    source = make("qwen3", tmp_path / "hf")
    assert convert("from-hf", "--load", source, "--save", ours) == 0
    words = ("--dtype", "bf16", "--max-shard-size", "5e-5")
    assert convert("to-hf", "--load", ours, "--save", back, *words) == 0
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    want = {key: value.bfloat16() for key, value in tensors(source).items()}
    assert all(torch.equal(value, want[key]) for key, value in tensors(back).items())
    assert hf_logits(back, tokens()).shape[-1] == 101
    # Their precision is kept on the way in.
    assert convert("from-hf", "--load", back, "--save", again) == 0
    assert {tensor.dtype for tensor in saved_tensors(again / "iter_0000000").values()} == {torch.float32}
    assert load_model(again).config.model.vocab_size == 101
    assert "wrote" in capsys.readouterr().out


def test_models_that_differ_are_a_failed_conversion(tmp_path, monkeypatch, capsys):
    source = make("llama", tmp_path / "hf")
    assert convert("from-hf", "--load", source, "--save", tmp_path / "ours") == 0
    whole = Entry.split
    monkeypatch.setattr(Entry, "split", lambda self, tensor: whole(self, tensor)[:: -1 if "up" in str(self) else 1])
    assert convert("to-hf", "--load", tmp_path / "ours", "--save", tmp_path / "back") == 1
    assert "failed: the converted model is another one" in capsys.readouterr().err
    monkeypatch.setattr(Entry, "fuse", lambda self, parts, fuse=Entry.fuse: fuse(self, parts).flip(0))
    assert convert("from-hf", "--load", source, "--save", tmp_path / "wrong") == 1
    # A logit that is not a number is no agreement.
    monkeypatch.setattr(Entry, "fuse", lambda self, parts, fuse=Entry.fuse: fuse(self, parts) * float("nan"))
    assert convert("from-hf", "--load", source, "--save", tmp_path / "wrong") == 1
    assert sorted(os.listdir(tmp_path)) == ["hf", "ours"]


REFUSED = [
    ("llama", {"attention_bias": True}, "attention_bias = True with mlp_bias"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type = 'linear'"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "layer_types = 'sliding_attention'"),
    ("llama", {"intermediate_size": 90}, "--ffn-hidden-size 90"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window = 8"),
    ("granitemoe", {"attention_bias": True}, "attention_bias = True with mlp_bias"),
    ("mixtral", {"num_experts_per_tok": 1}, "--moe-router-topk 1"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED)
def test_what_is_missing_here_is_refused_by_name(tmp_path, capsys, name, fields, message):
    source = make(name, tmp_path / "hf", **fields)
    assert convert("from-hf", "--load", source, "--save", tmp_path / "ours") == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_other_mistakes_are_one_message(tmp_path, capsys):
    source, target = make("llama", tmp_path / "hf"), tmp_path / "ours"

    def error(*words: object) -> str:
        assert convert(*words) == 2
        return capsys.readouterr().err

    assert "is there already" in error("from-hf", "--load", source, "--save", source)
    assert "holds no config.json" in error("from-hf", "--load", tmp_path, "--save", target)
    assert "holds no checkpoint" in error("to-hf", "--load", tmp_path, "--save", target)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "model.layers.3.input_layernorm.weight is missing" in error("from-hf", "--load", source, "--save", target)
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert "model.layers.2.input_layernorm.weight has no" in error("from-hf", "--load", source, "--save", target)
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    assert "is [88, 48] in torch.float32, and should be [96, 48]" in error(
        "from-hf", "--load", source, "--save", target
    )
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "model_type is 'gpt2'" in error("from-hf", "--load", source, "--save", target)
    (source / "model.safetensors").unlink()
    (source / "config.json").write_text(json.dumps(config))
    assert "holds neither model.safetensors nor" in error("from-hf", "--load", source, "--save", target)
    assert not target.exists()
