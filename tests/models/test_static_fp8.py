"""Unit-scaled models in FP8, emulated: which matrices, near unit scale, and how near to training in fp32."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_mup.config import ConfigError
from megatron_mup.layers.fp8 import StaticLinear
from megatron_mup.training import precision
from megatron_mup.training.precision import settle_fp8
from tests.runs import batch_of, config_of, pretrain, step_of, words

SIZES = "--num-layers 3 --hidden-size 64 --ffn-hidden-size 128 --swiglu --disable-bias-linear"
SCHEMES = {
    "umup": "--parametrization umup --untie-embeddings-and-output-weights --no-norm-affine --lr 0.3",
    "munit": "--parametrization munit --norm-position post-branch --residual-tau 0.3 --lr 0.02",
}
FORMATS = {"hybrid": "--fp8-format hybrid", "e4m3": "--fp8-format e4m3"}


def static_layers(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, StaticLinear)}


def losses(mesh, *flags: str, steps: int = 20) -> torch.Tensor:
    config = config_of(SIZES, *flags)
    step = step_of(config, mesh)
    return torch.stack([step(batch_of(config, number), 1.0).loss for number in range(steps)])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_is_near_fp32(lone_mesh, scheme):
    """And no nearer than eight bits allow: a layer that forgot to cast would be."""
    want = losses(lone_mesh, SCHEMES[scheme])
    assert want[-1] < want[0] - 0.5
    for name, flags in FORMATS.items():
        error = (losses(lone_mesh, SCHEMES[scheme], flags) / want - 1).abs()
        assert 1e-5 < error[0] < 5e-3, name
        assert error.mean() < 0.02, name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_operands_are_near_unit_scale(lone_mesh, scheme):
    """Gradients too, whatever the number of tokens: that is what lets scales be constants."""
    for samples in (4, 32):
        config = config_of(SIZES, SCHEMES[scheme], FORMATS["hybrid"], f"--global-batch-size {samples}")
        step = step_of(config, lone_mesh)
        seen: dict[tuple[str, str], float] = {}

        def show(name, seen, kind, x, _dtype):
            seen[name, kind] = x.square().mean().sqrt().item()

        for name, layer in static_layers(step.model).items():
            layer.watcher = partial(show, name, seen)
        step(batch_of(config), 1.0)
        assert len(seen) == 3 * 4 * 3  # layers, matrices, operands
        assert all(0.15 < rms < 4 for rms in seen.values()), seen


def test_which_matrices(lone_mesh):
    def names(*flags: str) -> set[str]:
        config = config_of(SIZES, SCHEMES["umup"], *flags)
        return {name.removeprefix("decoder.layers.") for name in static_layers(step_of(config, lone_mesh).model)}

    inner = {"self_attention.linear_qkv", "mlp.linear_fc1"}
    critical = {"self_attention.linear_proj", "mlp.linear_fc2"}
    assert names() == set()
    assert names(FORMATS["e4m3"]) == {f"{layer}.{part}" for layer in range(3) for part in inner | critical}
    spared = names(FORMATS["e4m3"], "--fp8-critical-bf16 --first-last-layers-bf16 --num-layers-at-end-in-bf16 0")
    assert spared == {f"{layer}.{part}" for layer in (1, 2) for part in inner}


@pytest.mark.parametrize("sharded", [False, True])
def test_casts_are_kept_where_parameters_stay_whole(lone_mesh, monkeypatch, sharded):
    monkeypatch.setattr(precision, "uses_fsdp", lambda config, mesh: sharded)
    step = step_of(config_of(SIZES, SCHEMES["umup"], FORMATS["hybrid"]), lone_mesh)
    assert {layer.keeps for layer in static_layers(step.model).values()} == {not sharded}


def test_without_hardware_a_run_stops_unless_told():
    flags = SIZES, SCHEMES["umup"], FORMATS["hybrid"]
    with pytest.raises(ConfigError, match="a CPU has no FP8 matrix products"):
        settle_fp8(config_of(*flags, "--distributed-backend gloo"))
    plain, told = settle_fp8(config_of(*flags, "--distributed-backend gloo --fp8-fallback bf16"))
    assert plain.fp8.fp8_format is None
    assert "goes on without" in told[0]
    kept, told = settle_fp8(config_of(*flags, "--distributed-backend gloo --fp8-fallback emulate"))
    assert kept.fp8.fp8_format == "hybrid"
    assert "emulated" in told[0]
    done = pretrain(words(*flags, "--distributed-backend gloo"))
    assert done.code == 2
    assert "no FP8" in done.err
