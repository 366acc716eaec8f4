"""The benchmark of the planner's memory: what can be seen of it without a GPU."""

from __future__ import annotations

import pytest

from benchmarks.plan_memory import CASES, compare, plan, table
from benchmarks.train_step import preset
from megatron_mup.config import parse_config, validate
from megatron_mup.planning.hardware import GIB


@pytest.mark.parametrize("name", CASES)
def test_cases_are_valid_and_can_be_planned(name):
    gpus, (_, model, *flags) = CASES[name][0], CASES[name][1].split()
    config = parse_config([*preset(model), *flags]).config
    assert validate(config, gpus) == []
    assert all(1 * GIB < memory.peak < 79 * GIB for memory in plan(config, gpus))


def test_the_fullest_ranks_are_compared():
    config = parse_config([*preset("dense-1b"), "--pipeline-model-parallel-size", "2"]).config
    planned = plan(config, 2)
    measured = [(stage, {"peak": int(factor * GIB)}) for stage, factor in [(0, 8), (0, 10), (1, 9)]]
    found = compare(planned, measured)
    most = max(memory.peak for memory in planned) / GIB
    assert (found["planned"], found["measured"]) == (pytest.approx(most, abs=1e-3), 10)
    assert found["error"] == pytest.approx(most / 10 - 1, abs=1e-3)
    assert [stage["measured"]["peak"] for stage in found["stages"]] == [10, 9]
    name = "dense-1b, bf16"
    lines = table({name: found | {"planned": 9.5, "error": -0.05}}).splitlines()
    assert lines[-1] == f"| {name} | 1 | 9.50 | 10.00 | -5.0% |"
    assert table({name: {"failed": "exit code 1"}}).endswith("| 1 | failed: exit code 1 |  |  |")
