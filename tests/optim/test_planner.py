from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from optim_cases import GATE_UP_BLOCKS, alone, meta, numbers

from megatron_mup.config import Config
from megatron_mup.optim import planner
from megatron_mup.optim.muon import Muon, MuonSettings
from megatron_mup.optim.planner import describe, make_plan, newton_schulz_cost
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import Block, Role


def whole(rows: int) -> tuple[Block, ...]:
    return (Block("whole", 0, rows, rows),)


def plan_of(shapes: list[tuple[int, int]], ranks: int):
    metas = [meta(f"w{i}", Role.MLP_OUT, shape) for i, shape in enumerate(shapes)]
    return make_plan(metas, [newton_schulz_cost(m.shape, whole(m.shape[0])) for m in metas], ranks)


def test_cost_is_of_the_short_side_and_of_each_block():
    assert newton_schulz_cost((4, 16), whole(4)) == newton_schulz_cost((16, 4), whole(16)) == 2 * 16 * 16 + 64
    halves = newton_schulz_cost((16, 4), GATE_UP_BLOCKS)
    assert halves == 2 * (2 * 16 * 8 + 64)


def test_balance_over_shapes_and_the_same_plan_for_any_order():
    shapes = [(64, 64), (16, 64), (64, 16), (8, 8), (64, 64), (16, 16)] * 4
    plan = plan_of(shapes, 4)
    assert max(plan.loads()) < 1.15 * sum(plan.loads()) / 4
    metas = sorted((a.meta for a in plan.assignments), key=lambda m: m.name)[::-1]
    again = make_plan(metas, [newton_schulz_cost(m.shape, whole(m.shape[0])) for m in metas], 4)
    assert again.digest() == plan.digest()
    assert plan_of(shapes, 3).digest() != plan.digest()
    assert plan_of([*shapes[:-1], (16, 17)], 4).digest() != plan.digest()


def test_chunks_hold_each_matrix_once_and_are_even(monkeypatch):
    monkeypatch.setattr(planner, "CHUNK_ELEMENTS", 1 << 12)
    plan = plan_of([(64, 64)] * 16, 2)
    assert len(plan.chunks) == 8
    assert [len(chunk) for chunk in plan.chunks] == [2] * 8
    assert sorted(a.meta.name for a in plan.assignments) == sorted(f"w{i}" for i in range(16))
    assert len(plan_of([(64, 64)] * 16, 1).chunks) == 1


def test_description():
    lines = describe(plan_of([(1000, 2000), (1000, 1000)], 2), element_size=2).splitlines()
    assert len(lines) == 1 + 2 + 2 + 1
    # 2 FLOPs x (2 n^2 m + n^3).
    assert lines[1].split() == ["w0", "1000x2000", "owner", "0", "0", "4", "10"]
    assert lines[2].split() == ["w1", "1000x1000", "owner", "0", "1", "2", "6"]
    assert lines[3] == "rank 0: 10 GFLOP, 4 MB"
    assert lines[-1] == "2 matrices in 1 chunks; the busiest rank has 1.250 times the mean"
    assert describe(make_plan([], [], 2), 4).splitlines()[-1].endswith("idle")


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_rank_may_be_idle(ranks):
    assert plan_of([], ranks).loads() == [0.0] * ranks
    assert plan_of([(2, 2)], ranks).loads()[0] > 0


def complaint(shapes: list[tuple[int, int]]) -> str:
    """What an optimizer says on a rank that holds a matrix of its own shape."""
    mesh = Mesh.build(Config(), torch.device("cpu"))
    facts = meta("w", Role.MLP_OUT, shapes[dist.get_rank()])
    try:
        Muon([(alone(facts, torch.zeros(facts.shape)), numbers())], MuonSettings(), mesh)
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_compare_their_plans(pool):
    assert pool.run(2, complaint, [(4, 6), (4, 6)]) == ["", ""]
    for said in pool.run(2, complaint, [(4, 6), (4, 8)]):
        assert "ranks disagree on the optimizer plan" in said
