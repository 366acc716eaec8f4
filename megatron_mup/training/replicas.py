"""Whether the replicas of the weights are still the same, to the bit."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_mup.optim.main_params import MainParam
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.guard import BrokenRunError
from megatron_mup.training.rollcall import spans

_CHUNK = 1 << 22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = 0x5851F42D4C957F2D
_MOST = 5


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A number of a tensor's bits and their places, 0-d int64 on its device; of all 2^64 numbers, alike or not."""
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        # Odd factors, so that no single change of a value is lost modulo 2^64.
        total += (part * (places * _FACTOR | 1)).sum()
    return total


def check_replicas(params: Sequence[MainParam], mesh: Mesh, iteration: int) -> None:
    """Compares each parameter of this rank with its replicas on other data-parallel ranks. Collective over all ranks.

    Args:
        params: this rank's.
        mesh: the run's mesh.
        iteration: for the message.

    Raises:
        BrokenRunError: some differ; on all ranks alike, with names and ranks.
    """
    found: list[tuple[str, list[int]]] = []
    for axis in ("dp_replicate", "edp_replicate"):
        mine = [main for main in params if (main.meta.experts is not None) == (axis == "edp_replicate")]
        if mine and mesh.size(axis) > 1:
            found += _differing(mine, mesh.group(axis))
    any_found = torch.tensor(len(found), device=mesh.device)
    dist.all_reduce(any_found)
    if any_found == 0:
        return
    everywhere: list[tuple[str, list[tuple[str, list[int]]]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(everywhere, (socket.gethostname(), found))
    ranks: dict[str, set[int]] = {}
    for _, differences in everywhere:
        for name, holders in differences:
            ranks.setdefault(name, set()).update(holders)
    told = [
        f"{name} on ranks {spans(sorted(holders))} ({', '.join(sorted({everywhere[rank][0] for rank in holders}))})"
        for name, holders in list(ranks.items())[:_MOST]
    ]
    more = f" and {len(ranks) - _MOST} more" if len(ranks) > _MOST else ""
    raise BrokenRunError(
        f"iteration {iteration}: weights differ from those of their replicas: {'; '.join(told)}{more}. The memory or "
        "the network there is suspect; take these hosts out, and go on from a checkpoint before this iteration"
    )


def _differing(params: Sequence[MainParam], group: dist.ProcessGroup) -> list[tuple[str, list[int]]]:
    """Names of parameters of which not all replicas agree, and the ranks of those that most don't agree with: all
    ranks, where no value has a majority.
    """
    mine = torch.stack([fingerprint(main.value) for main in params])
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    found = []
    for main, values in zip(params, torch.stack(parts).t().tolist(), strict=True):
        value, count = Counter(values).most_common(1)[0]
        if count == len(values):
            continue
        alone = 2 * count <= len(values)
        found.append((main.meta.name, [r for r, v in zip(ranks, values, strict=True) if alone or v != value]))
    return found
