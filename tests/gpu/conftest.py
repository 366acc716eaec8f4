from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.parallel.mesh import Mesh
from tests.pool import Pool


@pytest.fixture(scope="session")
def gpus() -> Iterator[Pool]:
    """Worker processes with a GPU each, under NCCL."""
    pool = Pool("nccl")
    yield pool
    pool.close()


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone, for either device."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def meshes(process_group: None) -> dict[str, Mesh]:
    """Meshes of this process alone, on either device."""
    return {kind: Mesh.build(Config(), torch.device(kind)) for kind in ("cpu", "cuda")}
