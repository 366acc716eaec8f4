"""A step that is left out changes nothing, to the bit, in any layout: not then, and not in the steps after it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_mup.config import Config, validate
from megatron_mup.layers.attention import SelfAttention
from megatron_mup.models.build import build_model
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.guard import Guard
from megatron_mup.training.step import TrainStep
from tests.parity import cases
from tests.parity.test_experts import BALANCING, EXPERTS
from tests.parity.test_experts import LAYOUTS as EXPERT_LAYOUTS

LAYOUTS = {
    **{name: (cases.LAYOUTS[name], "") for name in ("dp2", "tp2", "pp2", "fsdp2", "hsdp2x2", "tp2-pp2")},
    **{name: (EXPERT_LAYOUTS[name], f"{EXPERTS} {BALANCING['sequence']}") for name in ("ep2", "ep2-fsdp2")},
}
DAILY = {("fsdp2", "muon")}
MATRIX = [
    pytest.param(layout, optimizer, marks=() if (layout, optimizer) in DAILY else pytest.mark.long)
    for layout in LAYOUTS
    for optimizer in cases.IN_EVERY_SCHEME
]


def state_of(step: TrainStep) -> dict[str, torch.Tensor]:
    """Copies of all that a step may change on this rank."""
    found = {f"main/{main.meta.name}": main.value for main in step.main.params}
    found |= {f"module/{name}": param.detach() for name, param in step.model.named_parameters()}
    found |= {f"optimizer/{key}": tensor for key, (_, tensor) in step.optimizer.state_tensors().items()}
    found |= {f"scalar/{key}": torch.tensor(value) for key, value in step.optimizer.state_scalars().items()}
    found |= {f"bias/{key}": value for key, value in step.model.expert_biases().items()}
    found |= {f"load/{key}": value for key, value in step.balancing.loads().items()}
    return {key: getattr(value, "_local_tensor", value).clone() for key, value in found.items()}


def differences(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert mine.keys() == other.keys()
    return [key for key, value in mine.items() if not torch.equal(value, other[key])]


def poison(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
    """A forward hook after which gradients in front of the module are NaN."""
    output.register_hook(lambda grad: torch.full_like(grad, torch.nan))


def local_batch(config: Config, mesh: Mesh, index: int) -> dict[str, torch.Tensor]:
    """This rank's share of a step, on its device."""
    return {name: value.to(mesh.device) for name, value in cases.local_batch(config, mesh, index).items()}


def train(config: Config, mesh: Mesh, with_broken_step: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
    """State after three steps, and what a broken one before the last changed, whose gradients hold NaN on one rank."""
    step = TrainStep(build_model(config, cases.VOCAB_SIZE, mesh), config, mesh)
    step.initialise()
    for index in range(2):
        step(local_batch(config, mesh, index), 1.0)
    changed: list[str] = []
    if with_broken_step:
        before, guard = state_of(step), Guard(config)
        handles = []
        if dist.get_rank() == dist.get_world_size() - 1:
            layer = next(module for module in step.model.modules() if isinstance(module, SelfAttention))
            handles.append(layer.register_forward_hook(poison))
        result = step(local_batch(config, mesh, 2), 1.0, gate=guard.accepts)
        for handle in handles:
            handle.remove()
        assert result.loss.isfinite()
        assert guard.reason == "its gradient norm is nan"
        changed = differences(state_of(step), before)
    step(local_batch(config, mesh, 3), 1.0)
    return state_of(step), changed


CPU = torch.device("cpu")


def broken_and_whole(config: Config, device: torch.device = CPU) -> tuple[list[str], list[str]]:
    """What the broken step changed at once, and what it changed later."""
    validate(config, dist.get_world_size())
    mesh = Mesh.build(config, device)
    state, changed = train(config, mesh, with_broken_step=True)
    whole, _ = train(config, mesh, with_broken_step=False)
    return changed, differences(state, whole)


@pytest.mark.parametrize(("layout", "optimizer"), MATRIX)
def test_a_step_left_out_changes_nothing(pool, layout, optimizer):
    case, features = LAYOUTS[layout]
    config = cases.config_of(features, cases.OPTIMIZERS[optimizer], "--max-skipped-steps 1")
    for changed, later in pool.run(case.ranks, broken_and_whole, cases.with_layout(config, case)):
        assert changed == []
        assert later == []
