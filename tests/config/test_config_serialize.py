import json

import pytest
import yaml
from config_cases import GOOD, build

from megatron_mup.config import Config, ConfigError, from_dict, parse_config, resolved, to_dict, to_yaml, validate
from megatron_mup.config.fields import settings

LINES = [
    "",
    "--swiglu --bf16 --untie-embeddings-and-output-weights --position-embedding-type learned_absolute",
    "--optimizer muon --lr-decay-style WSD --lr-wsd-decay-iters 3 --use-torch-fsdp2 --recompute-activations",
    "--parametrization completep --mup-base-hidden-size 64 --base-num-layers 2 --global-batch-size 16",
    "--use-mup --mup-base-width 100 --rampup-batch-size 2 2 100 --global-batch-size 8 --save a:b",
    "--no-mock-data --data-path 0.3 a 0.7 #b --tokenizer-type NullTokenizer --wandb-project yes --wandb-exp-name 1e3",
]


@pytest.mark.parametrize("line", LINES)
def test_dictionaries_and_json_come_back(line):
    config = build(*line.split())
    assert from_dict(json.loads(json.dumps(to_dict(config))), "here") == config


@pytest.mark.parametrize("line", LINES)
def test_yaml_is_a_recipe(line, tmp_path):
    config = build(*line.split())
    (tmp_path / "r.yaml").write_text(to_yaml(config))
    assert parse_config(["--config", str(tmp_path / "r.yaml")]).config == config


@pytest.mark.parametrize("line", LINES)
def test_the_resolved_run_is_a_recipe_for_the_same_run(line, tmp_path):
    parsed = parse_config([*GOOD, *line.split()])
    warned = validate(parsed.config, 2, parsed.explicit)
    shown = resolved(parsed.config, 2)
    (tmp_path / "r.yaml").write_text(to_yaml(shown))
    again = parse_config(["--config", str(tmp_path / "r.yaml")])
    assert warned == []
    assert validate(again.config, 2, again.explicit) == []
    assert resolved(again.config, 2) == shown


def test_defaults_are_resolved():
    line = "--swiglu --optimizer muon --parametrization completep --mup-base-hidden-size 96 --use-torch-fsdp2 "
    line += "--untie-embeddings-and-output-weights --recompute-activations --micro-batch-size 2 --lr 1e-2"
    shown = resolved(build(*line.split()), 4)
    flat = {name: value for section in shown.values() for name, value in section.items()}
    assert flat.keys() == settings().keys()
    expected = {
        "ffn_hidden_size": 2048, "kv_channels": 64, "num_query_groups": 12, "global_batch_size": 8, "muon_lr": 0.01,
        "decoupled_lr": 0.01, "data_parallel_sharding_strategy": "optim_grads_params", "use_torch_fsdp2": False,
        "recompute_granularity": "selective", "recompute_activations": False, "mup_base_hidden_size": 96,
        "mup_base_ffn_hidden_size": 256, "mup_base_head_dim": 64, "mup_base_num_attention_heads": None,
        "base_num_layers": 12, "embedding_init_method_std": 0.02, "output_layer_init_method_std": 0.02,
        "lr_decay_iters": 10, "lr_decay_samples": None, "max_position_embeddings": None,
    }  # fmt: skip
    assert {name: flat[name] for name in expected} == expected


def test_missing_settings_take_their_defaults():
    assert from_dict({}, "x") == Config()
    assert from_dict({"model": {"num_layers": 3}}, "x").model.num_layers == 3
    assert from_dict({"optimizer": {"lr": 1}}, "x").optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"modle": {}}, ["step_7: modle", "use model"]),
        ({"model": {"num_layer": 3}}, ["step_7: model: num_layer", "use num_layers"]),
        ({"model": {"zzzz": 3}}, ["step_7: model: zzzz", "drop it"]),
        ({"model": {"lr": 3}}, ["step_7: model: lr"]),
        ({"model": 3}, ["step_7: model: 3", "section"]),
        ({1: {}}, ["step_7: 1"]),
        ({"model": {2: 3}}, ["step_7: model: 2"]),
        ({"model": {"num_layers": "3"}}, ["num_layers: '3'", "whole number"]),
        ({"model": {"num_layers": None}}, ["num_layers: None"]),
        ({"model": {"swiglu": 1}}, ["true or false"]),
        ({"model": {"normalization": "x"}}, ["RMSNorm, LayerNorm"]),
        ({"model": {"normalization": ["x"]}}, ["RMSNorm, LayerNorm"]),
        ({"training": {"rampup_batch_size": [1, 2]}}, ["3 whole numbers"]),
        ({"data": {"data_path": [1]}}, ["texts"]),
        ({"optimizer": {"lr": 10**400}}, ["a number"]),
    ],
)
def test_what_is_no_configuration(data, parts):
    with pytest.raises(ConfigError) as caught:
        from_dict(data, "step_7")
    assert [part for part in parts if part not in str(caught.value)] == []


def test_yaml_is_readable():
    text = to_yaml(build("--rampup-batch-size", "2", "2", "100"))
    assert "\n  rampup_batch_size: [2, 2, 100]\n  seq_length: 1024\n" in text
    assert list(yaml.safe_load(text)) == list(to_dict(Config()))
