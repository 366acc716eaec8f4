"""What a diagnosis tells of Transformer Engine's layers, beside the library's own scales."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.config import Config
from megatron_mup.kernels.te import obstacle
from megatron_mup.layers.te import TELinear
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.diagnostics import Diagnostics
from megatron_mup.training.observe import _delayed_scale
from megatron_mup.training.step import TrainStep
from tests.gpu.gpu_runs import gpu_config, share
from tests.runs import step_of

pytestmark = pytest.mark.gpu

STEPS = 4
ENDS = {"input": 448, "weight": 448, "gradient": 57344}
"""Of the types that ``hybrid`` casts to."""


def trained(config: Config, diagnosed: bool) -> tuple[TrainStep, list[float], dict[str, float]]:
    mesh = Mesh.build(config, torch.device("cuda"))
    step, losses, found = step_of(config, mesh), [], {}
    for number in range(STEPS):
        batch = share(config, mesh, number)
        if diagnosed:
            result, (names, values) = Diagnostics(step, config, mesh).around(batch, lambda: step(batch, 1.0))  # noqa: B023
            found = dict(zip(names, values.tolist(), strict=True))
        else:
            result = step(batch, 1.0)
        losses.append(result.loss.item())
    return step, losses, found


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_a_diagnosis_knows_the_scales_and_leaves_them_alone(process_group, recipe):
    if (why := obstacle(recipe)) is not None:
        pytest.skip(why)
    flags = f"--bf16 --transformer-impl transformer_engine --fp8-format hybrid --fp8-recipe {recipe}"
    config = gpu_config(flags, "--attention-backend unfused")
    _, want, _ = trained(config, False)
    step, losses, found = trained(config, True)
    assert losses == pytest.approx(want, rel=1e-4)
    layers = {n.removeprefix("decoder.layers."): m for n, m in step.model.named_modules() if isinstance(m, TELinear)}
    assert len(layers) == 8
    for name, layer in layers.items():
        for kind, end in ENDS.items():
            amax, lost, cut = (found[f"fp8 {what}/{kind}/{name}"] for what in ("amax", "underflow", "saturation"))
            assert amax > 0
            assert 0 <= lost < 0.5
            assert cut < 1e-3
            if recipe == "delayed":
                scale = _delayed_scale(layer.product, kind)
                assert scale is not None
                # The largest value of a few steps is near that of the last one.
                assert end / 8 < amax * scale.item() < end * 4, (name, kind)
