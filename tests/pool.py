"""Worker processes that stay alive over many tests: importing PyTorch eight times at once takes half a minute.

They are forks of a process that has imported it: those of another pool, or after an error, start at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

PRELOADED = ["megatron_mup.training.main", "megatron_mup.training.trainer", "torch.distributed.checkpoint"]
"""What the process that workers are forks of imports. None of it looks for GPUs, or forks couldn't use them."""


class Pool:
    """Processes that run functions as the ranks of a process group.

    One pool serves every world size: each call starts a group of as many ranks as it needs, and workers start when
    they are first needed. After an error all of them are replaced, for the others may wait for the one that failed.
    Under NCCL they are replaced after each call: a process that splits communicators of a second group dies (PyTorch
    2.11).

    Args:
        backend: ``gloo``, or ``nccl`` with one GPU per worker.
    """

    def __init__(self, backend: str = "gloo") -> None:
        self._backend = backend
        self._context: Any = mp.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._tasks: list[Any] = []
        self._workers: list[Any] = []
        self._results = self._context.Queue()

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        """What ``function(*args)`` returns on each of ``world_size`` ranks; an error of any rank is raised here."""
        return self._run(world_size, True, function, args, timeout)

    def launch(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        """The same without a process group: the function finds torchrun's variables and starts its own."""
        return self._run(world_size, False, function, args, timeout)

    def _run(
        self, world_size: int, grouped: bool, function: Callable[..., Any], args: tuple[Any, ...], timeout: float
    ) -> list[Any]:
        self._grow(world_size)
        port = _free_port()
        for rank in range(world_size):
            self._tasks[rank].put((world_size, port, grouped, function, args))
        results: dict[int, Any] = {}
        try:
            while len(results) < world_size:
                rank, value, error = self._next_result(world_size, timeout)
                if error is not None:
                    raise RuntimeError(f"rank {rank} of {world_size}:\n{error}")
                results[rank] = value
        except BaseException:
            self.close()
            raise
        if self._backend == "nccl":
            self.close()
        return [results[rank] for rank in range(world_size)]

    def _next_result(self, world_size: int, timeout: float) -> tuple[int, Any, str | None]:
        """What the next rank to finish says.

        Raises:
            RuntimeError: a worker died, or none finished in time; the workers' stacks are on stderr then.
        """
        end = time.monotonic() + timeout
        while True:
            with contextlib.suppress(queue.Empty):
                return self._results.get(timeout=1)
            late = time.monotonic() > end
            codes = [worker.exitcode for worker in self._workers[:world_size]]
            if late or any(code is not None for code in codes):
                for worker in self._workers:
                    if worker.is_alive():
                        os.kill(worker.pid, signal.SIGUSR2)
                        time.sleep(0.2)  # one after the other, so that they stay readable
                reason = f"gave nothing for {timeout} s" if late else f"have these exit codes: {codes}"
                raise RuntimeError(f"{world_size} ranks {reason}; stacks are on stderr")

    def _grow(self, size: int) -> None:
        for rank in range(len(self._workers), size):
            self._tasks.append(self._context.SimpleQueue())
            arguments = (rank, self._backend, self._tasks[rank], self._results)
            self._workers.append(self._context.Process(target=_work, args=arguments, daemon=True))
            self._workers[rank].start()

    def close(self) -> None:
        """Ends the processes; a later call starts new ones."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        self._workers, self._tasks, self._results = [], [], self._context.Queue()


def _free_port() -> int:
    """A port that nobody listens on, below the range from which systems give out ports unasked: it stays free."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _work(rank: int, backend: str, tasks: Any, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        while True:
            world_size, port, grouped, function, args = tasks.get()
            try:
                names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                values = (rank, rank, world_size, "127.0.0.1", port)
                os.environ.update(zip(names, map(str, values), strict=True))
                if grouped:
                    dist.init_process_group(backend, rank=rank, world_size=world_size, device_id=device)
                value = function(*args)
                if grouped:
                    dist.barrier()
                    dist.destroy_process_group()
                results.put((rank, value, None))
            except BaseException:
                results.put((rank, None, traceback.format_exc()))
