"""Static FP8 over layouts. A sum that is rounded otherwise may round to another FP8 value: tolerances are FP8's."""

from __future__ import annotations

import pytest
import torch

from tests.parity import cases

FLAGS = "--fp8-format hybrid --first-last-layers-bf16 --num-layers-at-end-in-bf16 0"
CORE = ("umup", "tp2-sp")


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        pytest.param(scheme, layout, marks=() if (scheme, layout) == CORE else pytest.mark.long)
        for scheme in cases.UNIT_SCALED
        for layout in cases.UNIT_SCALED_LAYOUTS
    ],
)
def test_layout_matches_one_rank(pool, scheme, layout):
    config, case = cases.config_of(cases.UNIT_SCALED[scheme], FLAGS), cases.LAYOUTS[layout]
    want = pool.run(1, cases.observe, config, 4)[0]
    seen = pool.run(case.ranks, cases.observe, cases.with_layout(config, case), 4)[0]
    torch.testing.assert_close(seen["losses"][0], want["losses"][0], rtol=1e-5, atol=0)
    for name, value in want["grads"].items():
        error = (seen["grads"][name] - value).norm() / value.norm()
        assert error < 5e-3, f"gradient of {name}: {error:.2e}"
    torch.testing.assert_close(seen["losses"], want["losses"], rtol=1e-3, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_nothing(pool, recompute):
    flags = cases.UNIT_SCALED["umup"], FLAGS
    want = pool.run(1, cases.observe, cases.config_of(*flags), 3)[0]
    seen = pool.run(1, cases.observe, cases.config_of(*flags, f"--recompute-granularity {recompute}"), 3)[0]
    assert torch.equal(seen["losses"], want["losses"])
