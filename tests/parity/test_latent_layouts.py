"""Multi-head latent attention: every layout computes what one rank computes."""

from __future__ import annotations

import functools

import pytest

from tests.parity import cases
from tests.parity.test_context import LAYOUTS as CONTEXT
from tests.parity.test_layouts import assert_parity

LATENT = (
    "--multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 6 --num-query-groups 4 --disable-bias-linear"
)
KINDS = {
    "latent": "",
    "queries from the stream": "--no-qk-layernorm --reset-attention-mask --reset-position-ids --eod-token-id 0",
    "dropout": "--attention-dropout 0.1 --hidden-dropout 0.1 --recompute-granularity selective",
}
SCHEMES = {"adam": "", "muon": cases.SCHEMES["completep"], "heads": cases.SCHEMES["mup"]}
LAYOUTS = {name: cases.LAYOUTS[name] for name in ("tp2", "tp2-sp", "pp2", "fsdp2", "tp2-pp2", "tp2-fsdp2")}
LAYOUTS |= {name: CONTEXT[name] for name in ("cp2", "cp2-gathered")}
DAILY = {("tp2-sp", "latent", "adam")}
MATRIX = [
    pytest.param(layout, kind, optimizer, marks=() if (layout, kind, optimizer) in DAILY else pytest.mark.long)
    for layout in LAYOUTS
    for kind in KINDS
    for optimizer in SCHEMES
    if kind == "latent" or optimizer == "adam"
]


def flags_of(kind: str, optimizer: str) -> tuple[str, ...]:
    latent = LATENT.replace("--q-lora-rank 24", "") if kind == "queries from the stream" else LATENT
    return latent, KINDS[kind], SCHEMES[optimizer], cases.OPTIMIZERS[optimizer]


@pytest.fixture(scope="session")
def reference(pool):
    """What one rank computes, by kind and optimizer."""

    @functools.cache
    def run(kind: str, optimizer: str):
        return pool.run(1, cases.observe, cases.config_of(*flags_of(kind, optimizer)))[0]

    return run


@pytest.mark.parametrize(("layout", "kind", "optimizer"), MATRIX)
def test_layout_matches_one_rank(pool, reference, layout, kind, optimizer):
    case = LAYOUTS[layout]
    config = cases.with_layout(cases.config_of(*flags_of(kind, optimizer)), case)
    assert_parity(pool.run(case.ranks, cases.observe, config)[0], reference(kind, optimizer), optimizer)


def test_the_reference_learns(reference):
    losses = reference("latent", "adam")["losses"]
    assert losses[-1] < losses[0] - 0.05
