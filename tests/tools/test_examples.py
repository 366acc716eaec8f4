from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.config import parse_config, validate

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples").rglob("*.yaml"))
WORLD_SIZES = {
    "cpu.yaml": 2,
    "gpu.yaml": 8,
    "llama-1b.yaml": 8,
    "continue-pretraining.yaml": 8,
    "moe-8b-a1b.yaml": 8,
    "mixtral-like.yaml": 64,
    "llama3-8b.yaml": 64,
    "qwen3-1.7b.yaml": 8,
    "xmodel-2.5.yaml": 8,
    "deepnet-200.yaml": 8,
    "moonlight-16b.yaml": 64,
}


def config_of(recipe: Path):
    return parse_config(["--config", str(recipe), "--mock-data", "--vocab-size", "4096", "--save", "runs/example"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.relative_to(ROOT / "examples").as_posix())
def test_recipes_are_valid_and_every_setting_in_them_has_an_effect(recipe):
    parsed = config_of(recipe)
    assert validate(parsed.config, WORLD_SIZES.get(recipe.name, 1), parsed.explicit) == []
    assert not parsed.warnings


def test_the_big_recipe_is_based_on_its_proxy():
    proxy, big = (config_of(ROOT / "examples" / f"{name}.yaml").config for name in ("proxy-40m", "llama-1b"))
    base = big.parametrization
    assert base.mup_base_hidden_size == proxy.model.hidden_size
    assert base.mup_base_ffn_hidden_size == proxy.model.ffn_size
    assert base.mup_base_num_attention_heads == proxy.model.num_attention_heads
    assert base.mup_base_head_dim == proxy.model.head_dim
    assert base.base_num_layers == proxy.model.num_layers
    assert big.optimizer == proxy.optimizer
