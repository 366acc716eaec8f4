"""Steps that all ranks pass, or that fail on all of them with the same error."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_mup.config import ConfigError

T = TypeVar("T")


class Alone:
    """The group of a rank that acts by itself."""


ALONE = Alone()
Group = dist.ProcessGroup | Alone | None


def rank_of(group: Group) -> int:
    """This process's rank in the group (None: the whole world); 0 without a process group."""
    return 0 if isinstance(group, Alone) or not dist.is_initialized() else dist.get_rank(group)


def size_of(group: Group) -> int:
    """Number of ranks in the group."""
    return 1 if isinstance(group, Alone) or not dist.is_initialized() else dist.get_world_size(group)


def gathered(value: T, group: Group) -> list[T]:
    """The value of every rank, on every rank."""
    if isinstance(group, Alone) or not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_all(action: Callable[[], T], group: Group) -> T:
    """What the action returns here, once it has succeeded everywhere; the lowest failing rank's error otherwise."""
    value, error = _tried(action)
    raise_first(gathered(error, group))
    return value  # type: ignore[return-value]


def on_first(action: Callable[[], T], group: Group) -> T:
    """What the action returns on rank 0, which alone runs it; its error otherwise."""
    result: list[Any] = [_tried(action) if rank_of(group) == 0 else None]
    if dist.is_initialized() and not isinstance(group, Alone):
        dist.broadcast_object_list(result, src=dist.get_global_rank(group, 0) if group else 0, group=group)
    value, error = result[0]
    raise_first([error])
    return value  # type: ignore[no-any-return]


def raise_first(errors: list[Exception | None]) -> None:
    """Raises the first error of a list, if it has one."""
    for error in errors:
        if error is not None:
            raise error


def reason(error: BaseException) -> str:
    """What went wrong in a file operation, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except ConfigError as error:
        return None, error
    except Exception:
        # Other exceptions may not survive pickling.
        return None, RuntimeError(f"on one rank:\n{traceback.format_exc()}")
