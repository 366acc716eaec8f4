"""Time that messages between GPUs take in a step, and what of it hides behind no computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType

KERNELS = ("nccl", "Memcpy PtoP", "c10d::symmetric_memory")
"""What names of messages on the GPU begin with: NCCL's kernels, copies from one GPU to another, waiting for a peer."""

Span = tuple[float, float]
"""Begin and end."""


def covered(spans: Iterable[Span]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def split(spans: Iterable[tuple[str, Span]]) -> dict[str, float]:
    """``all``: time in which messages were under way; ``alone``: that in which nothing else ran.

    Args:
        spans: what ran on the GPU, by name.
    """
    messages, others = [], []
    for name, span in spans:
        (messages if name.startswith(KERNELS) else others).append(span)
    return {"all": covered(messages), "alone": covered(messages + others) - covered(others)}


def of_a_step(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of messages in one step on this GPU, profiled: see `split`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    ran = [e for e in profile.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    found = split((e.name, (e.time_range.start, e.time_range.end)) for e in ran)
    return {name: round(micros / 1e3, 2) for name, micros in found.items()}
