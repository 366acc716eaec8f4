"""The coordinate check over all its sizes, which the sphere's optimizer reaches on a GPU only."""

from __future__ import annotations

import pytest

from benchmarks.coordinates import PLANS, cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_grid(meshes, case):
    """Every scheme passes with every optimizer over the sizes that it promises; the standard one fails."""
    found = case.run(meshes["cuda"], PLANS[case.axis])
    failed = [f"{v.quantity} of {v.name}: {v.slope:.2f}" for v in found if not v.passed]
    assert bool(failed) == (case.parametrization == "standard"), failed
