"""A checkpoint of any layout loads bitwise in any other, and each tensor is in it once."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_mup import checkpoint
from megatron_mup.checkpoint.dcp import read_metadata
from megatron_mup.config import Config, MoEConfig, ParallelConfig
from megatron_mup.parallel.mesh import Mesh
from tests.checkpoint.cases import LAYOUTS, Run, config_of, fill, known, load_all, save_known


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory) -> dict[str, str]:
    """Checkpoints of the same values, one of each layout."""
    folder = tmp_path_factory.mktemp("layouts")
    return {name: pool.run(ranks, save_known, name, str(folder / name), [7])[0] for name, (ranks, _) in LAYOUTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_from_other_layouts(pool, saved, layout):
    # Every second pair: each layout is loaded from half of the others, and the one rank from all.
    names = list(LAYOUTS)
    chosen = {n: p for n, p in saved.items() if layout == "one" or (names.index(n) + names.index(layout)) % 2}
    for rank, found in enumerate(pool.run(LAYOUTS[layout][0], load_all, layout, chosen, 7)):
        assert found == {name: [] for name in chosen}, f"rank {rank}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_element_is_written_once(saved, layout):
    metadata = read_metadata(Path(saved[layout])).state_dict_metadata
    reference = read_metadata(Path(saved["one"])).state_dict_metadata
    assert {k: v.size for k, v in metadata.items()} == {k: v.size for k, v in reference.items()}
    assert "model/output_layer.weight" not in metadata
    assert metadata["model/embedding.word_embeddings.weight"].size == (101, 24)
    for key, tensor in metadata.items():
        assert sum(chunk.sizes.numel() for chunk in tensor.chunks) == tensor.size.numel(), key
    payload = sum(path.stat().st_size for path in Path(saved[layout]).glob("*.distcp"))
    assert all(path.stat().st_size for path in Path(saved[layout]).iterdir())
    # Each shard is a small zip archive of its own; replicas written twice would double the whole.
    elements = sum(4 * tensor.size.numel() for tensor in metadata.values())
    shards = sum(len(tensor.chunks) for tensor in metadata.values())
    assert payload < elements + 2500 * shards


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_dcp_reads_it(saved):
    shapes = {key: tensor.size for key, tensor in read_metadata(Path(saved["tp2-pp2"])).state_dict_metadata.items()}
    state = {key: torch.empty(size) for key, size in shapes.items()}
    dcp.load(state, checkpoint_id=saved["tp2-pp2"], no_dist=True)
    for key, value in state.items():
        assert torch.equal(value, known(key, tuple(shapes[key]), 7)), key


def sizes(expert_tensor: int) -> dict[str, int]:
    parallel = ParallelConfig(expert_tensor_parallel_size=expert_tensor)
    config = Config(parallel=parallel, moe=MoEConfig(num_experts=2))
    return checkpoint.layout_sizes(Mesh.build(config, torch.device("cpu")))


def test_a_layout_names_ranks_that_share_experts_where_there_are_some(pool):
    """Older checkpoints, which don't, are of the layout without."""
    assert (pool.run(2, sizes, 1)[0].get("etp"), pool.run(2, sizes, 2)[0].get("etp")) == (None, 2)


def test_without_a_process_group(tmp_path):
    pieces = [checkpoint.Piece("model/a", torch.arange(6.0).view(2, 3), (2, 3), (0, 0))]
    manifest = checkpoint.Manifest(iteration=1, consumed_samples=0, config={}, parametrization=[], layout={})
    path = checkpoint.save(tmp_path, pieces, manifest)
    pieces[0].tensor.zero_()
    checkpoint.load(path, pieces)
    assert pieces[0].tensor.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def resume(layout: str, folder: str) -> list[str]:
    """Steps after a resume, bitwise those of the unbroken run: values, optimizer state and random numbers."""
    config = config_of(layout)
    run = Run(config)
    run.main.initialise()
    for number in range(2):
        run.step(number)
    random.seed(torch.distributed.get_rank())
    np.random.seed(torch.distributed.get_rank())
    torch.manual_seed(torch.distributed.get_rank())
    random.gauss(0, 1)
    np.random.randn()
    run.save(folder, 2)
    drawn = draws()
    for number in range(2, 4):
        run.step(number)

    again = Run(config)
    path = checkpoint.find(folder)
    manifest = checkpoint.load(path, again.pieces(), config)
    again.optimizer.load_state_scalars(manifest.optimizer)
    restored = checkpoint.load_rng(path, checkpoint.layout_sizes(again.mesh))
    problems = [] if restored and draws() == drawn else ["random numbers"]
    for number in range(manifest.iteration, 4):
        again.step(number)
    pairs = zip(run.pieces(), again.pieces(), strict=True)
    return problems + [a.key for a, b in pairs if not torch.equal(a.tensor, b.tensor)]


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.randn(()).item()]


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2-fsdp2", "pp2-fsdp2"])
def test_resumes_bitwise_in_the_same_layout(pool, tmp_path, layout):
    ranks = LAYOUTS[layout][0]
    assert pool.run(ranks, resume, layout, str(tmp_path)) == [[]] * ranks


def rng_elsewhere(layout: str, path: str) -> bool:
    run = Run(config_of(layout))
    before = torch.get_rng_state()
    restored = checkpoint.load_rng(path, checkpoint.layout_sizes(run.mesh))
    return restored or not torch.equal(before, torch.get_rng_state())


def test_rng_stays_in_another_layout(pool, saved):
    assert pool.run(2, rng_elsewhere, "dp2", saved["tp2"]) == [False, False]
    assert pool.run(1, rng_elsewhere, "one", saved["tp2"]) == [False]


def weights_only(layout: str, path: str, folder: str) -> list[bool]:
    run = Run(config_of(layout))
    weights = run.pieces(optimizer=False)
    checkpoint.load(path, weights, run.config)
    state = [piece for piece in run.pieces() if piece.key.startswith("optimizer/")]
    loaded = all(torch.equal(p.tensor, p.tensor * 0) for p in state)
    run.save(folder, 1, optimizer=False)
    again = Run(config_of(layout))
    fill(again.pieces(), 3)
    checkpoint.load(Path(folder) / "iter_0000001", again.pieces(optimizer=False))
    pairs = zip(weights, again.pieces(optimizer=False), strict=True)
    return [loaded, all(torch.equal(a.tensor, b.tensor) for a, b in pairs)]


def test_weights_alone(pool, saved, tmp_path):
    assert pool.run(2, weights_only, "fsdp2", saved["tp2-pp2"], str(tmp_path)) == [[True, True]] * 2
