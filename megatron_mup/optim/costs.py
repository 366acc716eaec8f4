"""What a step on one matrix of each shape costs on this GPU: measured at start, kept on disk, the same for all ranks.

Few shapes, a few repetitions of each, where the machine has no file yet. Times say how work is dealt out
(`optim.planner`) and nothing else, so a wrong one costs time, never a result.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_mup
from megatron_mup.optim.graphs import Replays, Work

Shape = tuple[int, int]

REPETITIONS = 3

COSTLY = ("num_ns_steps", "coefficients", "ns_dtype", "cuda_graph", "rank_fraction", "solver_steps")
"""Settings of any optimizer that the time of its arithmetic depends on."""


def cost_file() -> Path:
    """Where times are kept between runs: ``optimizer_costs.json`` below ``XDG_CACHE_HOME`` or ``~/.cache``.

    A user without a home, as containers have them, keeps them among temporary files.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        base = tempfile.gettempdir()
    return Path(base) / "megatron_mup" / "optimizer_costs.json"


def read_costs(path: Path) -> dict[str, float]:
    """The times of a file, milliseconds by key; none if there is no such file, or it isn't one of times."""
    try:
        found = json.loads(path.read_text())
        costs = {str(key): float(value) for key, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {key: value for key, value in costs.items() if 0 < value < math.inf}


def add_costs(path: Path, new: Mapping[str, float]) -> None:
    """Adds times to a file, which is replaced as a whole; where that can't be done, the next run measures again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # nothing stays on a full disk
            file = Path(folder) / path.name
            file.write_text(json.dumps({**read_costs(path), **new}, indent=1, sort_keys=True))
            file.replace(path)


def kind_of(optimizer: object, settings: object) -> str:
    """What a matrix optimizer's arithmetic is, as a part of a key."""
    given = (f"{name} {getattr(settings, name)}" for name in COSTLY if hasattr(settings, name))
    return f"{type(optimizer).__name__}, {', '.join(given)}"


def machine(device: torch.device) -> str:
    """What times depend on, but for the work itself."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, megatron_mup {megatron_mup.__version__}"


def time_of(work: Work, device: torch.device, replayed: bool) -> float:
    """Milliseconds of some work on a GPU, after a first time that compiles its kernels; the median of a few.

    Args:
        work: launches it, and waits for nothing.
        device: a GPU.
        replayed: whether to replay it from a CUDA graph, as a step does.
    """
    replays, times = Replays(device, replayed), []
    for _ in range(2):
        replays("work", work)
    for _ in range(REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replays("work", work)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def counted_together(
    counts: Iterable[Mapping[Shape, int]], ranks: int, at_once: Callable[[Shape], int]
) -> dict[Shape, int]:
    """How many matrices of each shape to measure at once: as many as a home gets, if all are dealt out evenly.

    Args:
        counts: matrices of each shape in each tensor.
        ranks: that share the tensors.
        at_once: how many of a shape a home takes at once at most.
    """
    totals = Counter[Shape]()
    for count in counts:
        totals.update(count)
    return {shape: min(math.ceil(total / ranks), at_once(shape)) for shape, total in totals.items()}


def shared_costs(
    together: Mapping[Shape, int],
    kind: str,
    work: Callable[[int, Shape], Work],
    device: torch.device,
    group: dist.ProcessGroup | None,
    replayed: bool,
) -> dict[Shape, float]:
    """Milliseconds per matrix by shape, the same on all ranks of a group: those of its first rank. Collective.

    That rank takes them from its disk, and measures what isn't there.

    Args:
        together: how many matrices of each shape are measured at once.
        kind: what else a time depends on: arithmetic and precision.
        work: of so many matrices of a shape, what does it once.
        device: where it is measured.
        group: the ranks.
        replayed: see `time_of`.
    """
    if not together:  # nothing to plan, and nothing to tell which device the ranks talk through
        return {}
    shapes = sorted(together)
    table = torch.zeros(len(shapes), dtype=torch.float64, device=device)
    if dist.get_rank(group) == 0:
        keys = {(m, n): f"{machine(device)}, {kind}, {together[m, n]} x {m} x {n}" for m, n in shapes}
        known, new = read_costs(cost_file()), dict[str, float]()
        for shape, key in keys.items():
            if key not in known:
                # Two digits: what varies from run to run should not move homes.
                new[key] = float(f"{time_of(work(together[shape], shape), device, replayed) / together[shape]:.2g}")
        if new:
            add_costs(cost_file(), new)
        table.copy_(torch.tensor([(known | new)[keys[shape]] for shape in shapes], dtype=torch.float64))
    dist.broadcast(table, group=group, group_src=0)
    return dict(zip(shapes, table.tolist(), strict=True))
