"""Every pipeline schedule computes what one rank computes."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.config import validate
from megatron_mup.config.schedules import SCHEDULES
from megatron_mup.parallel.mesh import Mesh
from tests.parity import cases
from tests.parity.cases import Case
from tests.parity.test_experts import BALANCING, EP2, EXPERTS, assert_routed_alike
from tests.parity.test_layouts import assert_parity, compare, reference  # noqa: F401
from tests.runs import step_of

PP2 = "--pipeline-model-parallel-size 2"
AXES = {
    "": Case(2, ""),
    "-dp2": Case(4, ""),
    "-kept2": Case(4, "--data-parallel-sharding-strategy optim_grads"),
    "-fsdp2": Case(4, cases.FSDP),
    "-tp2": Case(4, "--tensor-model-parallel-size 2 --sequence-parallel"),
}
WRITTEN = {
    "pp2-zb1p": f"{PP2} --pipeline-schedule InterleavedZeroBubble --num-virtual-stages-per-pipeline-rank 1",
    "pp2-layout": f"{PP2} --pipeline-model-parallel-layout E|t*2|t|tL",
    "pp2-layout-v": f"{PP2} --pipeline-schedule ZBVZeroBubble --pipeline-model-parallel-layout Et|t|tt|L",
}
LAYOUTS = {
    **{
        f"pp2{axis}-{name}": Case(case.ranks, f"{PP2} --pipeline-schedule {name} {case.flags}")
        for axis, case in AXES.items()
        for name, schedule in SCHEDULES.items()
        if not (axis == "-fsdp2" and schedule.splits_backward)  # refused
    },
    **{name: Case(2, flags) for name, flags in WRITTEN.items()},
}
DAILY = {("pp2-Interleaved1F1B", "mup", "muon"), ("pp2-ZBVZeroBubble", "standard", "adam")}
COMBINATIONS = (("standard", "adam"), ("mup", "muon"))


@pytest.mark.parametrize(
    ("layout", "scheme", "optimizer"),
    [
        pytest.param(layout, *kind, marks=() if (layout, *kind) in DAILY else pytest.mark.long)
        for layout in LAYOUTS
        for kind in COMBINATIONS
    ],
)
def test_schedule_matches_one_rank(pool, reference, layout, scheme, optimizer):  # noqa: F811
    compare(pool, reference, LAYOUTS[layout], (cases.SCHEMES[scheme], cases.OPTIMIZERS[optimizer]), optimizer)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Interleaved1F1B", "--recompute-granularity full"),
        ("Interleaved1F1B", "--recompute-granularity selective"),
        ("InterleavedZeroBubble", ""),
        ("ZBVZeroBubble", "--cross-entropy-fusion-impl linear"),
        ("DualPipeV", ""),
    ],
)
def test_other_features(pool, reference, name, more):  # noqa: F811
    """Dropout, document masks, biases, learned positions, untied head, z-loss."""
    config = cases.with_layout(cases.config_of(cases.FEATURES, more), LAYOUTS[f"pp2-{name}"])
    assert_parity(pool.run(2, cases.observe, config)[0], reference(cases.FEATURES), "adam")


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("Interleaved1F1B", "sequence", Case(2, "")),
        ("ZBVZeroBubble", "global", Case(2, "")),
        ("InterleavedZeroBubble", "micro-batch", Case(4, EP2)),
        ("DualPipeV", "global", Case(4, f"{EP2} --data-parallel-sharding-strategy optim_grads")),
    ],
)
def test_experts(pool, name, kind, more):
    """What routers count is counted once, though backward passes through them in halves."""
    config = cases.config_of(EXPERTS, BALANCING[kind])
    case = Case(more.ranks, f"{PP2} --pipeline-schedule {name} {more.flags}")
    seen = pool.run(case.ranks, cases.observe, cases.with_layout(config, case))[0]
    assert_routed_alike(seen, pool.run(1, cases.observe, config)[0], "adam")


@pytest.mark.long
def test_many_stages_on_a_rank(pool):
    """More stages than PyTorch's schedules keep gathered at a time."""
    config = cases.config_of("--num-layers 10")
    want = pool.run(1, cases.observe, config, 1)[0]
    for name in ("Interleaved1F1B", "InterleavedZeroBubble"):
        flags = f"--pipeline-schedule {name} --num-virtual-stages-per-pipeline-rank 5 {AXES['-kept2'].flags}"
        seen = pool.run(4, cases.observe, cases.with_layout(config, Case(4, f"{PP2} {flags}")), 1)[0]
        assert_parity(seen, want, "adam")


def gradients(config, ranks: int) -> dict[str, torch.Tensor]:
    """Main gradients of this rank after one step's passes."""
    validate(config, ranks)
    mesh = Mesh.build(config, torch.device("cpu"))
    step = step_of(config, mesh)
    step.forward_backward(cases.local_batch(config, mesh, 0), torch.ones(()))
    step.main.collect_grads()
    return {main.meta.name: main.grad for main in step.main.params}


@pytest.mark.parametrize(("ranks", "more"), [(2, ""), pytest.param(4, AXES["-kept2"].flags, marks=pytest.mark.long)])
def test_gradients_of_bf16_weights_add_up_in_fp32(pool, ranks, more):
    """Split backward sets gradients of weights behind the back of autograd's and FSDP2's hooks."""
    whole: dict[str, torch.Tensor] = {}
    for name in ("Interleaved1F1B", "InterleavedZeroBubble"):
        config = cases.config_of("--bf16", f"{PP2} --pipeline-schedule {name} {more}")
        for seen in pool.run(ranks, gradients, config, ranks)[:: ranks - 1]:
            for parameter, grad in seen.items():
                assert grad.dtype == torch.float32, parameter
                if name == "Interleaved1F1B":
                    whole[parameter] = grad
                else:
                    torch.testing.assert_close(grad, whole[parameter], rtol=1e-6, atol=1e-6 * grad.abs().max().item())
