"""Worker processes that stay alive over many tests: importing PyTorch eight times at once takes half a minute."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


class Pool:
    """Processes that run functions as the ranks of a gloo process group.

    One pool serves every world size up to its own: each call starts a group of as many ranks as it needs.

    Args:
        size: number of processes.
    """

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        self._tasks = [context.SimpleQueue() for _ in range(size)]
        self._results = context.Queue()
        self._workers = [
            context.Process(target=_work, args=(rank, self._tasks[rank], self._results), daemon=True)
            for rank in range(size)
        ]
        for worker in self._workers:
            worker.start()

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        """What ``function(*args)`` returns on each of ``world_size`` ranks; an error of any rank is raised here."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(world_size):
            self._tasks[rank].put((world_size, port, function, args))
        results: dict[int, Any] = {}
        while len(results) < world_size:
            rank, value, error = self._results.get(timeout=timeout)
            if error is not None:
                self.close()
                raise RuntimeError(f"rank {rank} of {world_size}:\n{error}")
            results[rank] = value
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.kill()
            worker.join()


def _work(rank: int, tasks: Any, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        while True:
            world_size, port, function, args = tasks.get()
            try:
                dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
                value = function(*args)
                dist.barrier()
                dist.destroy_process_group()
                results.put((rank, value, None))
            except BaseException:
                results.put((rank, None, traceback.format_exc()))
