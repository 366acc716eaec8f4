from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.parallel.mesh import Mesh
from tests.pool import Pool

# Tiny models, and workers beside this process: more threads would only wait for each other.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs more GPUs than there are."""
    needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
    if needed and (found := torch.cuda.device_count() if torch.cuda.is_available() else 0) < needed:
        pytest.skip(f"needs {needed} CUDA device(s), {found} found")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes, shared by all tests of a session."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def lone_mesh() -> Iterator[Mesh]:
    """The mesh of this process alone, on its CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Mesh.build(Config(), torch.device("cpu"))
    dist.destroy_process_group()
