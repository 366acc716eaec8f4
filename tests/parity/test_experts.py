"""Layers with experts: every layout computes what one rank computes, routing included."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_mup.layers.router import Tally
from tests.parity import cases
from tests.parity.cases import FSDP, Case
from tests.parity.test_layouts import assert_parity

# Of gradients near zero Adam makes steps of full size, rounding errors and all, and a choice of experts may hang on
# less: hence the large epsilon.
EXPERTS = (
    "--num-experts 4 --disable-bias-linear --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 16 "
    "--moe-layer-freq [0]*1+[1]*3 --moe-aux-loss-coeff 0.05 --moe-z-loss-coeff 1e-3 --adam-eps 1e-3"
)
BALANCING = {
    "global": "",
    "micro-batch": (
        "--moe-router-load-balancing-type aux_loss --parametrization mup --mup-base-hidden-size 16 "
        "--moe-input-jitter-eps 0.1"
    ),
    "sequence": (
        "--moe-router-load-balancing-type seq_aux_loss --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.05 --moe-router-num-groups 2 "
        "--moe-router-group-topk 2 --moe-router-topk-scaling-factor 1.5 --recompute-granularity full"
    ),
    "capacity": (
        "--moe-expert-capacity-factor 1 --moe-pad-expert-input-to-capacity --moe-router-pre-softmax "
        "--moe-router-sqrt-gates --recompute-granularity selective"
    ),
}
EP2 = "--expert-model-parallel-size 2"
ETP2 = "--expert-tensor-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    "dp2": Case(2, ""),
    "tp2": Case(2, TP2),
    "ep2": Case(2, EP2),
    "ep2-tp2": Case(2, f"{EP2} {TP2}"),
    "ep2-fsdp2": Case(4, f"{EP2} {FSDP}"),
    "ep2-hsdp2": Case(4, f"{EP2} {FSDP} --num-distributed-optimizer-instances 2"),
    "ep2-dp2": Case(4, EP2),
    "ep2-tp2-dp2": Case(4, f"{EP2} {TP2}"),
    "ep4-tp2-fsdp2": Case(4, f"--expert-model-parallel-size 4 {TP2} {FSDP}"),
    "ep2-pp2": Case(4, f"{EP2} --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"),
    "etp2": Case(2, ETP2),
    "etp2-tp2": Case(2, f"{ETP2} {TP2}"),
    "etp2-fsdp2": Case(4, f"{ETP2} {FSDP}"),
    "etp2-ep2": Case(4, f"{ETP2} {EP2}"),
    "etp2-tp2-hsdp2": Case(8, f"{ETP2} {TP2} {FSDP} --num-distributed-optimizer-instances 2"),
    "etp4-tp2-cp2": Case(4, f"--expert-tensor-parallel-size 4 {TP2} --context-parallel-size 2"),
    "etp2-ep2-pp2-dp2": Case(8, f"{ETP2} {EP2} --pipeline-model-parallel-size 2"),
    "ep2-tp2-pp2-fsdp2": Case(8, f"{EP2} {TP2} --pipeline-model-parallel-size 2 {FSDP}"),
}
OPTIMIZERS = {
    **cases.OPTIMIZERS,
    "muon with routers": "--optimizer muon --muon-moe-router --no-muon-split-fc1",
}
DAILY = {
    ("ep2-fsdp2", "global", "muon"),
    ("ep2", "sequence", "adam"),
    ("etp2", "global", "muon"),
}
MATRIX = [
    pytest.param(layout, kind, optimizer, marks=() if (layout, kind, optimizer) in DAILY else pytest.mark.long)
    for layout in LAYOUTS
    for kind in BALANCING
    for optimizer in OPTIMIZERS
    # Room for tokens is counted on each rank, and tensor ranks hold parts of sequences: not the same tokens drop.
    if not (kind == "capacity" and TP2 in LAYOUTS[layout].flags)
    # Each optimizer with one kind, AdamW and Muon with all.
    if kind == "global" or optimizer in cases.IN_EVERY_SCHEME
]


@pytest.fixture(scope="session")
def reference(pool):
    """What one rank computes, by kind and optimizer."""

    @functools.cache
    def run(kind: str, optimizer: str):
        return pool.run(1, cases.observe, cases.config_of(EXPERTS, BALANCING[kind], OPTIMIZERS[optimizer]))[0]

    return run


@pytest.mark.parametrize(("layout", "kind", "optimizer"), MATRIX)
def test_layout_matches_one_rank(pool, reference, layout, kind, optimizer):
    config = cases.config_of(EXPERTS, BALANCING[kind], OPTIMIZERS[optimizer])
    seen = pool.run(LAYOUTS[layout].ranks, cases.observe, cases.with_layout(config, LAYOUTS[layout]))[0]
    assert_routed_alike(seen, reference(kind, optimizer), optimizer)


def assert_routed_alike(seen, expected, optimizer):
    for name in ("tokens", "dropped"):
        mine, theirs = (getattr(Tally.of(run["routing"]), name) for run in (seen, expected))
        assert torch.equal(mine, theirs), f"{name} of each step, layer (and expert)"
    for name in ("balancing_loss", "z_loss"):
        mine, theirs = (getattr(Tally.of(run["routing"]), name) for run in (seen, expected))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    assert_parity(seen, expected, "adam" if optimizer == "adam" else "muon")


@pytest.mark.long
def test_the_reference_routes_and_learns(reference):
    """Every expert is chosen, not evenly; tokens drop where there is no room; the losses differ and fall."""
    runs = {kind: reference(kind, "adam") for kind in BALANCING}
    for kind, run in runs.items():
        tally = Tally.of(run["routing"])
        samples, seq, topk = cases.SAMPLES, cases.SEQ_LENGTH, 2
        assert (tally.tokens.sum(-1) == samples * seq * topk).all(), kind
        assert (tally.tokens > 0).all(), kind
        assert (tally.tokens.amax(-1) > 1.05 * tally.tokens.mean(-1)).any(), kind
        assert (tally.dropped > 0).any() == (kind == "capacity"), kind
        assert run["losses"][-1] < run["losses"][0] - 0.5, kind
        assert any("router" in name and grad.norm() > 0 for name, grad in run["grads"].items()), kind
    assert len({run["losses"][-1].item() for run in runs.values()}) == len(runs)


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "more"),
    [("ep2", ""), ("ep2-tp2", "--recompute-granularity full"), ("ep2-fsdp2", "--recompute-granularity selective")],
)
def test_shared_experts_during_the_exchange_change_nothing(pool, layout, more):
    """Bitwise, over all steps."""
    runs = []
    for overlap in ("", "--moe-shared-expert-overlap"):
        config = cases.with_layout(cases.config_of(EXPERTS, more, overlap), LAYOUTS[layout])
        runs.append(pool.run(LAYOUTS[layout].ranks, cases.observe, config, 3)[0])
    plain, overlapped = runs
    assert torch.equal(overlapped["losses"], plain["losses"])
    assert torch.equal(overlapped["routing"], plain["routing"])
    assert all(torch.equal(grad, plain["grads"][name]) for name, grad in overlapped["grads"].items())
