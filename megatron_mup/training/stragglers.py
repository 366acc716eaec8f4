"""Ranks that are slower than the others: the times of all ranks, compared at the end of log intervals."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

PROBE, DATA = "probe", "data"
_ALONE = (DATA, PROBE)
"""Work in which no rank waits for another, so that its time is the rank's own."""
_RATIO, _SHARE, _MOST = 1.25, 0.02, 8
"""A straggler takes so much longer than the median, and that is so much of a step; so many are told at most."""
_TRIALS = 5


class Stragglers:
    """Compares ranks' times of a step's phases, and of a matrix product of one size that each does for itself.

    Most phases end where ranks wait for each other, and so last equally long on all: they are recorded, but accuse
    nobody. What a rank does alone does: waiting for data, and the product, which shows a slow or throttled device.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        size = 4096 if cuda else 256
        self._matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
        self._hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self._hosts, socket.gethostname())

    def compare(self, phases: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Slowest rank over median rank by phase, and a line for each straggler. Collective over all ranks.

        Args:
            phases: seconds per step of this rank, the same names on all.
        """
        names = [*sorted(phases), PROBE]
        mine = torch.tensor(
            [*(phases[name] for name in names[:-1]), self._probe()], dtype=torch.float64, device=self._device
        )
        parts = [torch.empty_like(mine) for _ in self._hosts]
        dist.all_gather(parts, mine)
        table = torch.stack(parts).t().tolist()
        return summary(dict(zip(names, table, strict=True)), self._hosts)

    def _probe(self) -> float:
        """Seconds of a product, the median of a few."""
        seconds = []
        for _ in range(_TRIALS):
            self._synchronize()
            begin = time.perf_counter()
            self._matrix @ self._matrix
            self._synchronize()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def summary(times: Mapping[str, Sequence[float]], hosts: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """What `Stragglers.compare` gives, from all ranks' times by phase and their hosts."""
    ratios, lines = {}, []
    step = sum(statistics.median_low(seconds) for name, seconds in times.items() if name != PROBE)
    for name, seconds in times.items():
        # Of two ranks, one slow, the median is the other.
        median = statistics.median_low(seconds)
        ratios[f"{name} slowest over median"] = max(seconds) / max(median, 1e-9)
        if name not in _ALONE:
            continue
        least = _RATIO * median if name == PROBE else max(_RATIO * median, median + _SHARE * step)
        slow = [rank for rank, taken in enumerate(seconds) if taken > least]
        for rank in sorted(slow, key=lambda rank: -seconds[rank])[:_MOST]:
            taken = f"{1e3 * seconds[rank]:.3g} ms, the median {1e3 * median:.3g} ms"
            lines.append(f"straggler: rank {rank} on {hosts[rank]}, {name} took {taken}")
    return ratios, lines
