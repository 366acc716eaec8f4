"""What a diagnosis tells about FP8, and that it leaves the run alone."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels.fp8 import E4M3
from megatron_mup.layers.te import TELinear
from megatron_mup.training.diagnostics import Diagnostics
from megatron_mup.training.observe import scaled_by_own
from tests.fake_te import installed
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


TE = "--bf16 --main-params-dtype bf16 --transformer-impl transformer_engine --disable-bias-linear --fp8-format hybrid"


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_transformer_engines_layers_tell_what_their_scales_lose(lone_mesh, recipe):
    config = config_of(TE, f"--fp8-recipe {recipe} --first-last-layers-bf16 --num-layers-at-start-in-bf16 0")
    with installed():
        step = step_of(config, lone_mesh)
        layer = next(m for name, m in step.model.named_modules() if name.endswith(LAYER))
        assert isinstance(layer, TELinear)
        weight = next(m for m in step.main.params if m.meta.name.endswith(f"{LAYER}.weight")).value
        # Far below the largest value; E4M3's smallest is 2^-9.
        weight.view(-1)[:24] = torch.tensor([64.0, -(2.0**-9), 2.0**-12, -(2.0**-13), 2.0**-14, 0.0]).repeat(4)
        scale = 448 / 64
        if recipe == "delayed":  # whose scales were made for smaller values
            scale = 16.0
            factors = [torch.tensor(1.0), torch.tensor(scale)], [torch.tensor(2.0**40)]
            layer.product.multiply(torch.zeros(1, weight.shape[1], dtype=torch.bfloat16), layer.weight)
            layer.product._layer.quantizers = {
                f"scaling_{way}": [_Quantizer(each) for each in factors[way == "bwd"]] for way in ("fwd", "bwd")
            }
        tiny = ((weight.abs() * scale <= 2.0**-10) & (weight != 0)).sum().item()
        _, found = diagnosed(step, config, lone_mesh)
    assert found[f"fp8 amax/weight/{LAYER}"] == 64
    assert tiny >= 4
    assert found[f"fp8 underflow/weight/{LAYER}"] == pytest.approx(tiny / weight.numel())
    assert found[f"fp8 saturation/weight/{LAYER}"] == pytest.approx((4 if recipe == "delayed" else 0) / weight.numel())
    assert (found[f"fp8 saturation/gradient/{LAYER}"] > 0.5) == (recipe == "delayed")
    # As the cast sees them: scales that are older than the values want sums over tokens, not means.
    assert (found[f"fp8 amax/gradient/{LAYER}"] > 1) == (recipe == "delayed")
    layers = {name.split("/")[-1].split(".")[0] for name in found if name.startswith("fp8")}
    assert layers == {"0"}, "the last layer is not in FP8"
    assert isinstance(layer.product, type(step.transformer_engine._products[0])), "nothing is left behind"


class _Quantizer:
    def __init__(self, scale: torch.Tensor) -> None:
        self.scale = scale


def test_training_with_transformer_engine_is_the_same_to_the_bit(lone_mesh):
    config = config_of(TE, "--fp8-recipe tensorwise")
    with installed():
        one, other = step_of(config, lone_mesh), step_of(config, lone_mesh)
        for number in range(2):
            loss, _ = diagnosed(one, config, lone_mesh, number)
            assert loss == other(batch_of(config, number), 1.0).loss


@pytest.mark.parametrize(
    ("recipe", "kind", "sides"),
    [
        ("blockwise", "input", (1, 128)),
        ("blockwise", "weight", (128, 128)),
        ("mxfp8", "weight", (1, 32)),
    ],
)
def test_each_block_has_the_largest_power_of_two_that_fits(recipe, kind, sides):
    values = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).exp()
    scaled = scaled_by_own(values, kind, recipe, 448.0)
    for row in range(0, 256, sides[0]):
        for column in range(0, 384, sides[1]):
            block = slice(row, row + sides[0]), slice(column, column + sides[1])
            assert 224 < scaled[block].max() <= 448
            ratio = scaled[block] / values[block]
            assert ratio.max() == ratio.min() == 2.0 ** round(float(ratio.max().log2()))
