"""Recipes of published models: their sizes give the published number of parameters, and they train at toy size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_mup.config import Config, parse_config, validate
from megatron_mup.models.gpt import parameter_metas
from tests.runs import pretrain, recorded

EXAMPLES = Path(__file__).parents[2] / "examples"
PUBLISHED = {
    "llama3-8b": (128256, 8.03e9, 0.001),
    "qwen3-1.7b": (151936, 1.72e9 + 151936 * 2048, 0.01),
    "moe-8b-a1b": (128256, 8e9 + 2 * 128256 * 2048, 0.05),
    "xmodel-2.5": (129280, 1.3e9, 0.05),
    "moonlight-16b": (163840, 15.96e9, 0.002),
    "mixtral-like": (32000, 46.7e9, 0.001),
}
"""Vocabulary, parameters, and how exact that number is. The published Qwen3 has one table, the recipe two."""
TOY = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 16 --vocab-size 101 "
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 2 --lr-warmup-iters 0 --mock-data --num-workers 0 "
    "--no-bf16 --no-torch-compile --expert-model-parallel-size 1 --log-interval 1"
)
GROUPED = "--num-query-groups 2 --kv-channels 8"
LATENT = "--kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6"
SHRUNK = {
    "llama3-8b": GROUPED,
    "qwen3-1.7b": GROUPED,
    "xmodel-2.5": f"{GROUPED} --optimizer-switch-at 1 --rampup-batch-size 4 4 4 --lr-wsd-decay-iters 1",
    "deepnet-200": f"{GROUPED} --lr-wsd-decay-iters 1",
    "moonlight-16b": f"{LATENT} --moe-layer-freq [0]+[1] --num-experts 8 --moe-ffn-hidden-size 16 "
    "--moe-shared-expert-intermediate-size 16 --rampup-batch-size 4 4 4",
    "latent-small": f"{LATENT} --q-lora-rank 24 --lr-wsd-decay-iters 1",
}
DAILY = ("xmodel-2.5", "moonlight-16b")


def config_of(recipe: str, *flags: str) -> Config:
    return parse_config(["--config", str(EXAMPLES / f"{recipe}.yaml"), "--mock-data", *flags]).config


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_parameters(recipe):
    vocab_size, wanted, tolerance = PUBLISHED[recipe]
    config = config_of(recipe, "--vocab-size", str(vocab_size))
    assert sum(meta.numel for meta in parameter_metas(config, vocab_size)) == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name in DAILY else pytest.mark.long) for name in SHRUNK]
)
def test_two_steps_at_toy_size(tmp_path, recipe):
    """Every setting but the sizes and the layout as it stands."""
    file, path = tmp_path / "metrics.jsonl", EXAMPLES / f"{recipe}.yaml"
    flags = f"--config {path} {TOY} {SHRUNK[recipe]} --metrics-file {file} --save {tmp_path / 'run'}".split()
    validate(parse_config(flags).config, 1)
    outcome = pretrain(flags)
    assert outcome.code == 0, outcome.err
    losses = recorded(file, "train/lm loss")
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses.values())
