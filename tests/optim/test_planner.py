from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from optim_cases import GATE_UP_BLOCKS, alone, meta, numbers

from megatron_mup.config import Config
from megatron_mup.optim import costs, planner
from megatron_mup.optim.dion import Dion, DionSettings
from megatron_mup.optim.muon import Muon, MuonSettings, NorMuon, NorMuonSettings
from megatron_mup.optim.planner import Plan, describe, make_plan, newton_schulz_cost
from megatron_mup.optim.sphere import SpectralSphere, SphereSettings
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
    assert describe(make_plan([], [], 2), 4) == "no hidden matrices to orthonormalize"


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


# ---- Measured costs


def test_measured_times_move_homes():
    metas = [meta(f"w{i}", Role.MLP_OUT, (8, 8)) for i in range(4)]
    flops = make_plan(metas, [4.0, 1.0, 1.0, 1.0], 2)
    timed = make_plan(metas, [4.0, 1.0, 1.0, 1.0], 2, times=[0.2, 0.2, 0.2, 0.6])

    def homes(plan: Plan) -> dict[str, int]:
        return {a.meta.name: a.home for a in plan.assignments}

    assert homes(flops) == {"w0": 0, "w1": 1, "w2": 1, "w3": 1}
    assert homes(timed) == {"w3": 0, "w0": 1, "w1": 1, "w2": 1}
    assert flops.times() is None
    assert timed.times() == pytest.approx([0.6, 0.6])
    assert timed.loads() == [1.0, 6.0]
    assert flops.digest() != timed.digest()
    assert make_plan(metas, [1.0] * 4, 2, times=[0.2, 0.2, 0.2, 0.6]).digest() == timed.digest()
    lines = describe(timed, element_size=4).splitlines()
    assert lines[0].split()[-1] == "ms"
    assert lines[1].split()[-1] == "0.6"
    assert lines[5].endswith("0.6 ms")
    assert lines[-1].endswith("has 1.714 times the mean by FLOPs, 1.000 times the mean by measured time")


@pytest.mark.parametrize(
    "content", ["", "[1, 2]", '{"a": "b"}', '{"a": null}', "\0", '{"good": 2.0, "bad": -1, "no": 1e999}']
)
def test_a_file_that_makes_no_sense_counts_for_nothing(tmp_path, content):
    path = tmp_path / "deep" / "costs.json"
    assert costs.read_costs(path) == {}
    path.parent.mkdir()
    path.write_text(content)
    assert costs.read_costs(path) == ({"good": 2.0} if "good" in content else {})
    costs.add_costs(path, {"new": 3.0})
    assert costs.read_costs(path)["new"] == 3.0
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    costs.add_costs(tmp_path / "file" / "costs.json", {"a": 1.0})


def test_a_full_disk_keeps_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "costs.json"
    costs.add_costs(path, {"old": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        costs.add_costs(path, {"new": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert costs.read_costs(path) == {"old": 1.0}
    assert [file.name for file in tmp_path.iterdir()] == ["costs.json"]


def test_without_a_home_times_are_among_temporary_files(tmp_path, monkeypatch):
    def nobody(_user: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert costs.cost_file() == tmp_path / "megatron_mup" / "optimizer_costs.json"


def measured_plan(base: Path, device_name: str, kind: str = "muon") -> tuple[list[int], list[float] | None, int]:
    """Homes and times by rank, where times differ between ranks, and how many shapes this rank measured."""
    rank, seen = dist.get_rank(), []

    def time_of(work, device, replayed):
        work()
        seen.append(work)
        return (0.11 if rank else 0.3) * len(seen)

    cls, settings = OPTIMIZERS[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base / str(rank)))
        patch.setattr(costs, "time_of", time_of)
        patch.setattr(costs, "machine", lambda device: device_name)
        mesh = Mesh.build(Config(), torch.device("cpu"))
        shapes = [(4, 6), (6, 6), (6, 6), (8, 6)]
        params = [alone(meta(f"w{i}", Role.MLP_OUT, s), torch.zeros(s)) for i, s in enumerate(shapes)]
        plan = cls([(p, numbers()) for p in params], settings, mesh).plan
    return [a.home for a in sorted(plan.assignments, key=lambda a: a.meta.name)], plan.times(), len(seen)


OPTIMIZERS = {
    "muon": (Muon, MuonSettings(measured_costs=True)),
    "normuon": (NorMuon, NorMuonSettings(measured_costs=True)),
    "spectral_sphere": (SpectralSphere, SphereSettings(measured_costs=True)),
    "dion": (Dion, DionSettings(rank_fraction=0.5, measured_costs=True)),
}


def test_ranks_plan_by_the_times_of_the_first(pool, tmp_path):
    first, second = pool.run(2, measured_plan, tmp_path, "a GPU")
    # By shape 0.3, 0.6 and 0.9 ms; dealt from the dearest.
    assert first == ([0, 1, 1, 0], pytest.approx([1.2, 1.2]), 3)
    assert second == ([0, 1, 1, 0], pytest.approx([1.2, 1.2]), 0), "the first rank alone measures, each shape once"
    again = pool.run(2, measured_plan, tmp_path, "a GPU")
    assert again == [(*first[:2], 0), (*second[:2], 0)], "all is on disk"
    assert [plan[2] for plan in pool.run(2, measured_plan, tmp_path, "another GPU")] == [3, 0]
    for kind in OPTIMIZERS:
        if kind != "muon":
            assert [plan[2] for plan in pool.run(2, measured_plan, tmp_path, "a GPU", kind)] == [3, 0]


def without_matrices() -> list[int]:
    """Matrices of plans by measured times, where there are none and ranks can't send anything."""
    mesh, found = Mesh.build(Config(), torch.device("cpu")), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast", None)
        for optimizer, settings in (
            (Muon, MuonSettings(measured_costs=True)),
            (SpectralSphere, SphereSettings(measured_costs=True)),
            (Dion, DionSettings(rank_fraction=0.5, measured_costs=True)),
        ):
            empty = optimizer([], settings, mesh)
            empty.step(1.0)
            found.append(len(empty.plan.chunks))
    return found


def test_ranks_without_matrices_measure_nothing(pool):
    assert pool.run(2, without_matrices) == [[0, 0, 0]] * 2
