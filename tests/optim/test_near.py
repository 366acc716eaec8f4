"""Whole runs whose ranks read and write each other's memory: the same as by messages, experts and replicas too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mup.config import parse_config, validate
from megatron_mup.parallel.mesh import Mesh
from tests.pool import Pool
from tests.runs import batch_of, step_of, values, words
from tests.shared_file import shared_through

STEPS = 3
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --swiglu --disable-bias-linear"
CASES = {
    "fsdp2": (2, "--use-torch-fsdp2 --optimizer muon"),
    "sphere": (2, "--tensor-model-parallel-size 2 --optimizer spectral_sphere"),
    "dion": (2, "--use-torch-fsdp2 --optimizer dion"),
    "local": (4, "--tensor-model-parallel-size 2 --optimizer muon --muon-distributed-mode local"),
    "gram": (4, "--use-torch-fsdp2 --tensor-model-parallel-size 2 --optimizer muon --muon-distributed-mode gram"),
    "experts": (4, f"{EXPERTS} --use-torch-fsdp2 --expert-model-parallel-size 2 --optimizer normuon"),
    "replicas": (4, "--use-torch-fsdp2 --num-distributed-optimizer-instances 2 --optimizer muonsphere"),
    "pipeline": (4, "--pipeline-model-parallel-size 2 --use-torch-fsdp2 --optimizer muon"),
    "switched": (2, "--use-torch-fsdp2 --optimizer muon --optimizer-switch-at 1 --train-iters 3"),
}
QUICK = ("fsdp2", "sphere")


def train(folder: Path | None, flags: str) -> tuple[list[float], dict[str, torch.Tensor], str | None]:
    """Losses of a few steps, the values at their end, and what the matrices went by."""
    config = parse_config(words(flags)).config
    validate(config, torch.distributed.get_world_size())
    with shared_through(folder) if folder else pytest.MonkeyPatch.context():
        mesh = Mesh.build(config, torch.device("cpu"))
        step = step_of(config, mesh)
        losses = []
        for number in range(STEPS):
            step.optimizer.advance(number)
            batch = {name: part.chunk(mesh.dp_size)[mesh.dp_rank] for name, part in batch_of(config, number).items()}
            losses.append(step(batch, 1.0).loss.item())
        torch.distributed.barrier()  # a file may be written anew when all have read it
        return losses, values(step), step.optimizer.transport()


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_equal_to_messages(pool: Pool, tmp_path: Path, case: str) -> None:
    ranks, flags = CASES[case]
    flags = f"{flags} --micro-batch-size 1 --global-batch-size 4"
    near = pool.run(ranks, train, tmp_path, flags)
    far = pool.run(ranks, train, tmp_path, f"{flags} --optimizer-transport collective")
    for (losses, ends, transport), (wanted, wanted_ends, other) in zip(near, far, strict=True):
        assert losses == wanted
        for name, value in wanted_ends.items():
            assert torch.equal(ends[name], value), name
        assert (transport, other) == ("loads and stores in each other's memory", "collectives")
    assert list(tmp_path.iterdir())
