"""Whether processes of this machine can talk to each other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Literal

import torch
import torch.distributed as dist

from megatron_mup.planning.findings import Finding, Verdict

Backend = Literal["gloo", "nccl"]

PROGRAM = (
    "import sys; from megatron_mup.planning.smoke import talk; talk(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
)


def talk(backend: str, rank: int, world_size: int) -> None:
    """One of the processes: joins, and sums a number over all of them."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meeting = f"file://{os.environ['MUP_SMOKE_STORE']}"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world_size)
    total = torch.full((1 << 16,), rank + 1.0, device=device)
    dist.all_reduce(total)
    assert (total == world_size * (world_size + 1) / 2).all(), "a sum over the processes is wrong"
    dist.destroy_process_group()


def check_backend(backend: Backend, world_size: int, folder: str, seconds: float) -> Finding:
    """Lets processes sum a tensor, and ends those that don't get there.

    Args:
        backend: the library.
        world_size: processes.
        folder: an empty one, which they meet in.
        seconds: time that they get.
    """
    environment = {**os.environ, "MUP_SMOKE_STORE": os.path.join(folder, backend), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, backend, str(rank), str(world_size)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    complaint = ""
    try:
        for process in processes:
            _, said = process.communicate(timeout=max(0.1, started + seconds - time.monotonic()))
            if process.returncode and not complaint:
                complaint = (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        complaint = f"no answer within {seconds:g} s"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if complaint:
        return Finding(backend, Verdict.BAD, f"{world_size} processes can't talk: {complaint}")
    return Finding(backend, Verdict.GOOD, f"{world_size} processes summed a tensor")
