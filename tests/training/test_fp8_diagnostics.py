"""What a diagnosis tells about FP8, and that it leaves the run alone."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels.fp8 import E4M3
from megatron_mup.training.diagnostics import Diagnostics
from tests.runs import batch_of, config_of, step_of

FLAGS = (
    "--parametrization umup --untie-embeddings-and-output-weights --disable-bias-linear --no-norm-affine --lr 0.3 "
    "--fp8-format hybrid --first-last-layers-bf16 --num-layers-at-start-in-bf16 0"
)
LAYER = "0.self_attention.linear_qkv"


def diagnosed(step, config, mesh, number=0):
    batch = batch_of(config, number)
    result, (names, values) = Diagnostics(step, config, mesh).around(batch, lambda: step(batch, 1.0))
    return result.loss, dict(zip(names, values.tolist(), strict=True))


def test_numbers_are_what_they_say(lone_mesh):
    config = config_of(FLAGS)
    step = step_of(config, lone_mesh)
    weight = next(m for m in step.main.params if m.meta.name.endswith("0.self_attention.linear_qkv.weight")).value
    weight.view(-1)[:24] = torch.tensor([1000.0, -2000.0, 448.0, 2.0**-11, 2.0**-10, 0.0]).repeat(4)
    # 2^-10 is half the smallest number, a tie that goes to 0; other weights may be as small.
    tiny = ((weight.abs() <= 2.0**-10) & (weight != 0)).sum().item()
    assert tiny >= 8
    _, found = diagnosed(step, config, lone_mesh)
    assert found[f"fp8 amax/weight/{LAYER}"] == 2000
    assert found[f"fp8 saturation/weight/{LAYER}"] == pytest.approx(8 / weight.numel())
    assert found[f"fp8 underflow/weight/{LAYER}"] == pytest.approx(tiny / weight.numel())
    assert found[f"fp8 saturation/input/{LAYER}"] == 0
    assert 0.5 < found[f"fp8 amax/gradient/{LAYER}"] < torch.finfo(E4M3).max
    layers = {name.split("/")[-1].split(".")[0] for name in found if name.startswith("fp8")}
    assert layers == {"0"}, "the last layer is not in FP8"


def test_training_is_the_same_to_the_bit(lone_mesh):
    config = config_of(FLAGS)
    one, other = step_of(config, lone_mesh), step_of(config, lone_mesh)
    for number in range(3):
        loss, _ = diagnosed(one, config, lone_mesh, number)
        assert loss == other(batch_of(config, number), 1.0).loss
