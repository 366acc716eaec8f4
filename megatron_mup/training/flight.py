"""PyTorch's flight recorder: which collectives this process has entered, and which of them it still waits for."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d

_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""New and old name of the same variable; both are read."""
_ENTRIES = "2000"
FOLDER = "flight-recorder"
"""Folder of dumps, in the folder of checkpoints."""


def record_collectives(save: str | None) -> None:
    """Sets the recorder's variables, where the user hasn't; before the process group starts, which reads them.

    Under NCCL each rank then writes its last collectives to a file when one of them times out, which
    ``torchfrtrace`` compares.

    Args:
        save: folder of checkpoints, in whose :data:`FOLDER` the files go; None leaves them to PyTorch's default.
    """
    _set(_SIZE, _ENTRIES)
    _set(("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1")
    if save is not None:
        _set(_FILE, str(Path(save).absolute() / FOLDER / "rank_"))


def _set(names: tuple[str, ...], value: str) -> None:
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = value


def last_collective() -> str:
    """The collective that this process waits for, otherwise the last one that it was through with, in words.

    Gloo's sends and receives aren't recorded.
    """
    # NCCL has a recorder of its own.
    dump = getattr(_distributed_c10d, "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace")
    entries = pickle.loads(dump(True, False, False)).get("entries", [])
    if not entries:
        return "no collective yet"
    waiting = next((entry for entry in entries if not entry["retired"]), None)
    entry = waiting or entries[-1]
    name, description = entry["process_group"]
    number = entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"]
    group = description if description != "undefined" else name
    said = f"{entry['profiling_name']} number {number} of group {group}, shapes {entry['input_sizes']}"
    return f"waits in {said}" if waiting else f"last was in {said}"
