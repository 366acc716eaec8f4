"""Dion whose replicas sum factors instead of gradients takes the steps of Dion on one rank.

`tests/optim/test_compressed_dion.py` has what `make test` runs of it.
"""

from __future__ import annotations

import pytest
import torch

from tests.parity import cases
from tests.parity.cases import FSDP, Case

PLAIN = "--optimizer dion --dion-rank-fraction 0.25 --clip-grad 0"
COMPRESSED = f"{PLAIN} --dion-compressed-sync"
HSDP = f"{FSDP} --num-distributed-optimizer-instances 2"
LAYOUTS = {
    "dp2": Case(2, ""),
    "dp4": Case(4, ""),
    "hsdp2x2": Case(4, HSDP),
    "tp2-dp2": Case(4, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2-dp2": Case(4, "--pipeline-model-parallel-size 2"),
    "pp2-dp2-zbv": Case(4, "--pipeline-model-parallel-size 2 --pipeline-schedule ZBVZeroBubble"),
    "cp2": Case(2, "--context-parallel-size 2"),
    "tp2-hsdp2x2": Case(8, f"--tensor-model-parallel-size 2 {HSDP}"),
}


@pytest.fixture(scope="module")
def want(pool):
    """What one rank computes."""
    return pool.run(1, cases.observe, cases.config_of(PLAIN))[0]


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_matches_one_rank(pool, want, layout):
    config = cases.with_layout(cases.config_of(COMPRESSED), LAYOUTS[layout])
    seen = pool.run(LAYOUTS[layout].ranks, cases.observe, config)[0]
    for name, value in want["weights"].items():
        assert torch.equal(seen["weights"][name], value), f"initial {name} differs"
    torch.testing.assert_close(seen["losses"][0], want["losses"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(seen["losses"], want["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(seen["eval"], want["eval"], rtol=1e-4, atol=0)
    assert seen["losses"][-1] < seen["losses"][0] - 0.05
