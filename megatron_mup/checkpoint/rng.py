"""The random generators' states: one small file with those of every rank."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

FILE = "rng.pt"


def rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's, PyTorch's and the current CUDA device's generators, of plain types and tensors."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts the generators back to what `rng_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_states(folder: Path, states: list[dict[str, Any]]) -> None:
    """Writes the states of all ranks, in their order."""
    torch.save(states, folder / FILE)


def read_state(folder: Path, rank: int) -> dict[str, Any]:
    """The state of one rank."""
    states: list[dict[str, Any]] = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    return states[rank]
