"""What a machine has: GPUs and their links, memory to share, disk, limits, data."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
from pathlib import Path

import torch

from megatron_mup.config import ConfigError
from megatron_mup.data.indexed_dataset import IndexedDataset
from megatron_mup.planning.findings import Finding, Verdict

GIB = 2**30
ENOUGH_SHARED, ENOUGH_DISK, ENOUGH_FILES = GIB, 20 * GIB, 4096
"""Bytes of /dev/shm, bytes on the disk of checkpoints, open files: less is worth a word."""
SMALLEST_LINK = 20e9
"""Bytes/s between two GPUs; less means that they talk through the host's memory, or worse."""


def check_python() -> list[Finding]:
    """Versions of what everything stands on."""
    torch_version = torch.__version__.partition("+")[0]
    known = (2, 11) <= tuple(map(int, torch_version.split(".")[:2])) < (2, 14)
    text = f"Python {platform.python_version()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if known:
        return [Finding("versions", Verdict.GOOD, text)]
    return [Finding("versions", Verdict.BAD, f"{text}: this package is made for PyTorch 2.11 to 2.13")]


def check_gpus() -> list[Finding]:
    """Each GPU with its memory and clocks, and the links between neighbours."""
    if not torch.cuda.is_available():
        return [Finding("GPUs", Verdict.NOTE, "PyTorch sees none: runs use the CPU and gloo")]
    count, clocks = torch.cuda.device_count(), _clocks()
    findings = []
    for device in range(count):
        free, total = torch.cuda.mem_get_info(device)
        text = f"{torch.cuda.get_device_name(device)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        text += clocks.get(device, "")
        findings.append(Finding(f"GPU {device}", Verdict.GOOD if free > 0.9 * total else Verdict.NOTE, text))
    for first in range(count - 1):
        findings.append(_link(first, first + 1))
    return findings


def _clocks() -> dict[int, str]:
    """Clocks and throttling by device, as far as nvidia-smi tells."""
    query = "index,clocks.sm,clocks.max.sm,clocks_throttle_reasons.hw_slowdown"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    clocks = {}
    for line in done.stdout.splitlines():
        index, now, best, slowed = (part.strip() for part in line.split(","))
        slow = ", SLOWED DOWN by its hardware" if slowed == "Active" else ""
        clocks[int(index)] = f", {now} of {best} MHz{slow}"
    return clocks


def _link(first: int, second: int) -> Finding:
    """Peer access between two GPUs, and the rate of a copy of 256 MiB."""
    name = f"GPU {first} to {second}"
    if not torch.cuda.can_device_access_peer(first, second):
        return Finding(name, Verdict.BAD, "no peer access: tensor parallelism will be slow")
    source = torch.empty(1 << 28, dtype=torch.uint8, device=f"cuda:{first}")
    target = torch.empty_like(source, device=f"cuda:{second}")
    target.copy_(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(first):
        torch.cuda.synchronize(first)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
    rate = source.nbytes / (start.elapsed_time(end) / 1e3)
    return Finding(name, Verdict.GOOD if rate > SMALLEST_LINK else Verdict.NOTE, f"peer access, {rate / 1e9:.0f} GB/s")


def check_limits(shared: Path = Path("/dev/shm")) -> list[Finding]:
    """Memory that processes share, open files, locked memory."""
    findings = []
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        small = free < ENOUGH_SHARED
        text = f"{free / GIB:.1f} GiB free" + (": NCCL may fail; start containers with --ipc=host" if small else "")
        findings.append(Finding(str(shared), Verdict.BAD if small else Verdict.GOOD, text))
    else:
        findings.append(Finding(str(shared), Verdict.BAD, "missing: processes of one machine can't share memory"))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    few = files != resource.RLIM_INFINITY and files < ENOUGH_FILES
    findings.append(
        Finding("open files", Verdict.NOTE if few else Verdict.GOOD, f"{files}" + (": raise ulimit -n" if few else ""))
    )
    bounded = locked != resource.RLIM_INFINITY
    said = "unlimited" if not bounded else f"{locked / GIB:.2g} GiB: InfiniBand wants ulimit -l unlimited"
    findings.append(Finding("locked memory", Verdict.NOTE if bounded else Verdict.GOOD, said))
    return findings


def check_save(folder: Path) -> Finding:
    """Whether checkpoints can be written to a folder, and how much room there is."""
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding("checkpoints", Verdict.BAD, f"{place} can't be written")
    free = shutil.disk_usage(place).free
    verdict = Verdict.GOOD if free > ENOUGH_DISK else Verdict.NOTE
    return Finding("checkpoints", verdict, f"{free / GIB:,.1f} GiB free at {place}")


def check_data(prefix: str) -> Finding:
    """Whether a dataset is there and its two files agree."""
    try:
        dataset = IndexedDataset(prefix)
    except ConfigError as error:
        return Finding("data", Verdict.BAD, str(error))
    return Finding(
        "data", Verdict.GOOD, f"{prefix}: {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens"
    )
