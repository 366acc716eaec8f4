"""Checkpoints of Megatron-LM, laid out here by hand as its sources write them, become ours and go back."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_mup.inference import load_model
from tests.checkpoint.convert.hf_cases import convert, tokens
from tests.runs import VOCAB_SIZE, config_of, model_of, pretrain, saved_tensors, words

PADDED = 128
ARCHITECTURES = {
    "llama": "--swiglu --disable-bias-linear --num-query-groups 2 --untie-embeddings-and-output-weights --qk-layernorm",
    "gpt2": "--normalization LayerNorm --position-embedding-type learned_absolute --max-position-embeddings 64",
    "biases": "--swiglu --num-query-groups 4",
}
EXPERTS = {
    "experts": "--swiglu --disable-bias-linear --num-experts 4 --moe-ffn-hidden-size 24 "
    "--moe-shared-expert-intermediate-size 16 --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
}
SIZES = "--num-layers 4 --seq-length 64"
MLP = "mlp.linear_fc1"


def arguments(config) -> Namespace:
    model = config.model
    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=model.num_query_groups is not None,
        num_query_groups=model.num_query_groups or 1,
        kv_channels=model.head_dim,
        normalization=model.normalization,
        norm_epsilon=model.norm_epsilon,
        swiglu=model.swiglu,
        squared_relu=False,
        add_bias_linear=model.linear_bias,
        add_qkv_bias=False,
        qk_layernorm=model.qk_layernorm,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_base=10000,
        rotary_percent=1.0,
        max_position_embeddings=64,
        seq_length=64,
        padded_vocab_size=PADDED,
        make_vocab_size_divisible_by=8,
        num_experts=None,
        tokenizer_type="NullTokenizer",
    )


def whole(model, config) -> dict[str, torch.Tensor]:
    """Megatron's whole tensors: gate above up, padded vocabulary."""
    out = {}
    for name, param in model.named_parameters():
        value = param.detach().clone()
        if MLP in name and config.model.swiglu:
            rows = torch.arange(len(value)) % 16 < 8
            value = torch.cat([value[rows], value[~rows]])
        if "word_embeddings" in name or "output_layer" in name:
            value = torch.cat([value, torch.full((PADDED - len(value), value.shape[1]), 7.0)])
        out[name] = value
    return out


def transformer_engine(name: str) -> str:
    """Its names: norms lie in the linear layers behind them."""
    for module, linear in (("input_layernorm", "self_attention.linear_qkv"), ("pre_mlp_layernorm", MLP)):
        name = name.replace(f"{module}.", f"{linear}.layer_norm_")
    return name


def shard(name: str, value: torch.Tensor, rank: int, ranks: int, gated: bool) -> torch.Tensor:
    """A tensor rank's part."""
    if MLP in name and "layer_norm" not in name:
        halves = value.chunk(2) if gated else [value]
        return torch.cat([half.chunk(ranks)[rank] for half in halves])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return value.chunk(ranks, 1)[rank]
    if "norm" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias")) or "position" in name:
        return value
    return value.chunk(ranks)[rank]


def write_legacy(folder: Path, config, state: dict[str, torch.Tensor], tp: int, chunks: list[list[int]]) -> None:
    """``chunks``: the stage of each piece of the model, by model chunk."""
    stages = 1 + max(map(max, chunks))
    pieces = sum(map(len, chunks))
    layers = config.model.num_layers // pieces
    module = ModuleType("megatron_of_the_test")
    exec("class State:\n def __init__(self): self.values = {'mode': 1}", module.__dict__)
    module.State.__module__ = module.__name__
    sys.modules[module.__name__] = module
    for rank in range(tp):
        for stage in range(stages):
            models, place = [], 0
            for chunk in chunks:
                for owner in chunk:
                    mine = {}
                    for name, value in state.items():
                        layer = int(name.split(".")[2]) if ".layers." in name else None
                        first, last = place == 0, place == pieces - 1
                        here = layer in range(place * layers, (place + 1) * layers)
                        here |= layer is None and (first if name.startswith("embedding") else last)
                        tied = not config.model.untie_embeddings_and_output_weights
                        local = name
                        if layer is not None:
                            local = name.replace(f".layers.{layer}.", f".layers.{layer - place * layers}.")
                        if here:
                            mine[transformer_engine(local)] = shard(name, value, rank, tp, config.model.swiglu)
                        if last and pieces > 1 and tied and "word_embeddings" in name:
                            mine["output_layer.weight"] = shard(name, value, rank, tp, False)
                    mine["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
                    if owner == stage:
                        models.append(mine)
                    place += 1
            names = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
            target = folder / "iter_0000012" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else ""))
            target.mkdir(parents=True)
            content = {"args": arguments(config), "checkpoint_version": 3.0, "iteration": 12}
            content |= dict(zip(names, models, strict=True)) | {"rerun_state_machine": module.State()}
            torch.save(content, target / "model_optim_rng.pt")
    del sys.modules[module.__name__]
    (folder / "latest_checkpointed_iteration.txt").write_text("12")


def write_dist(folder: Path, config, state: dict[str, torch.Tensor], stacked: bool) -> None:
    path = folder / "iter_0000012"
    path.mkdir(parents=True)
    out: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if not stacked or ".layers." not in name:
            out[transformer_engine(name)] = value
        elif ".layers.0." in name:
            same = [state[name.replace(".layers.0.", f".layers.{i}.")] for i in range(config.model.num_layers)]
            out[transformer_engine(name).replace(".layers.0.", ".layers.")] = torch.stack(same)
    dcp.save(out | {"optimizer.state.exp_avg.x": torch.ones(3)}, checkpoint_id=path, no_dist=True)
    torch.save({"args": arguments(config), "checkpoint_version": 3.0, "iteration": 12}, path / "common.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("12")


LAYOUTS = {
    "one": (1, [[0]]),
    "tp2": (2, [[0]]),
    "tp2-pp2": (2, [[0, 1]]),
    "pp2-interleaved": (1, [[0, 1], [0, 1]]),
    "torch_dist-stacked": None,
    "torch_dist-by-layer": None,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_and_back(tmp_path, architecture, layout, capsys):
    config = config_of(SIZES, ARCHITECTURES[architecture])
    model = model_of(config).eval()
    state = whole(model, config)
    if LAYOUTS[layout] is not None:
        write_legacy(tmp_path / "theirs", config, state, *LAYOUTS[layout])
    else:
        write_dist(tmp_path / "theirs", config, state, stacked="stacked" in layout)
    flags = ("--true-vocab-size", VOCAB_SIZE)
    assert convert("from-megatron", "--load", tmp_path / "theirs", "--save", tmp_path / "ours", *flags) == 0
    values = saved_tensors(tmp_path / "ours" / "iter_0000012")
    assert values.keys() == {f"model/{name}" for name, _ in model.named_parameters()}
    assert all(torch.equal(values[f"model/{name}"], param) for name, param in model.named_parameters())
    assert torch.equal(load_model(tmp_path / "ours").model(tokens()), model(tokens()))

    assert convert("to-megatron", "--load", tmp_path / "ours", "--save", tmp_path / "back") == 0
    assert "largest difference of logits 0.00e+00" in capsys.readouterr().out
    file = tmp_path / "back" / "iter_0000012" / "mp_rank_00" / "model_optim_rng.pt"
    written = torch.load(file, weights_only=False)
    assert written["args"].padded_vocab_size == 104
    for name, value in written["model"].items():
        want = state[name][:VOCAB_SIZE] if len(value) == 104 else state[name]
        assert torch.equal(value[: len(want)], want), name
    assert sorted(os.listdir(tmp_path / "back")) == ["iter_0000012", "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize("architecture", ["biases", pytest.param("experts", marks=pytest.mark.long)])
def test_multipliers_are_folded(pool, tmp_path, architecture):
    flags = (
        f"{SIZES} {(ARCHITECTURES | EXPERTS)[architecture]} --parametrization completep --mup-base-hidden-size 16 "
        "--base-num-layers 2 --mup-base-head-dim 4 --mup-embedding-mult 3.3 --mup-output-mult 1.7 "
        "--mup-residual-mult 0.7"
    )
    (outcome,) = pool.launch(1, pretrain, words(flags, f"--save {tmp_path}/run"))
    assert outcome.code == 0, outcome.err
    assert convert("to-megatron", "--load", tmp_path / "run", "--save", tmp_path / "theirs") == 0
    assert convert("from-megatron", "--load", tmp_path / "theirs", "--save", tmp_path / "back") == 0
    plain = load_model(tmp_path / "back")
    assert plain.config.parametrization.parametrization == "standard"
    want = load_model(tmp_path / "run").model(tokens())
    assert (plain.model(tokens())[..., :VOCAB_SIZE] - want).abs().max() < 1e-5


class Evil:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def test_no_code_of_a_checkpoint_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = config_of(SIZES, ARCHITECTURES["llama"])
    write_legacy(tmp_path / "theirs", config, whole(model_of(config), config), 1, [[0]])
    file = tmp_path / "theirs" / "iter_0000012" / "mp_rank_00" / "model_optim_rng.pt"
    torch.save({"args": Evil(), "iteration": 12, "model": {}}, file)
    assert convert("from-megatron", "--load", tmp_path / "theirs", "--save", tmp_path / "ours") == 2
    assert not (tmp_path / "PWNED").exists()
    assert convert("from-megatron", "--load", tmp_path, "--save", tmp_path / "ours") == 2
    assert "holds no checkpoint of Megatron-LM" in capsys.readouterr().err
