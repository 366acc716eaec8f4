from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.parallel.mesh import Mesh


@pytest.fixture(scope="module")
def lone_mesh() -> Iterator[Mesh]:
    """The mesh of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Mesh.build(Config(), torch.device("cpu"))
    dist.destroy_process_group()
