"""The recipes with experts train at toy size: every setting but the sizes and the layout as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import pretrain, recorded

EXAMPLES = Path(__file__).parents[2] / "examples"
TOY = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --kv-channels 8 "
    "--seq-length 16 --micro-batch-size 1 --global-batch-size 8 --train-iters 12 --lr-warmup-iters 2 --vocab-size 101 "
    "--mock-data --num-workers 0 --no-bf16 --no-torch-compile --tensor-model-parallel-size 1 --no-sequence-parallel "
    "--expert-model-parallel-size 1 --log-interval 1 --lr 1e-2 --init-method-std 0.1"
)
RECIPES = {
    "moe-8b-a1b": "--num-experts 8 --moe-layer-freq [0]+[1] --moe-ffn-hidden-size 16 "
    "--sphere-solver-steps 3 --moe-shared-expert-intermediate-size 16",
    "mixtral-like": "",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_trains_at_toy_size(tmp_path, recipe):
    file, config = tmp_path / "metrics.jsonl", EXAMPLES / f"{recipe}.yaml"
    flags = f"--config {config} {TOY} {RECIPES[recipe]} --metrics-file {file} --save {tmp_path / 'run'}"
    outcome = pretrain(flags.split())
    assert outcome.code == 0, outcome.err
    losses = list(recorded(file, "train/lm loss").values())
    assert losses[-1] < losses[0] - 0.05
    assert min(recorded(file, "moe/MaxVio").values()) > 0
