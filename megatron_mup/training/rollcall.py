"""Where all ranks are, told through the store at which they met: it answers while their collectives hang."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch.distributed.distributed_c10d import Store

_MOST = 4
"""Ranks whose process and host are told one by one."""


class Seen(NamedTuple):
    """What a rank last said: how many words it has said, its host and process, and where it is."""

    words: int
    host: str
    process: int
    where: str


class RollCall:
    """Says every few seconds where this rank is, and compares what all say when asked.

    A rank that no longer says anything is stopped, dead or cut off. That is found by counting its words, not by
    clocks, which may differ between hosts.

    Args:
        store: where all ranks read and write; best a clone, since a store serves one call at a time.
        rank, size: this rank, and number of ranks.
        where: tells where this rank is.
        period: seconds between two words.
        patience: seconds in which a rank must be heard, and the store must answer.
    """

    def __init__(
        self, store: Store, rank: int, size: int, where: Callable[[], str], period: float, patience: float
    ) -> None:
        self._store, self._rank, self._size, self._where = store, rank, size, where
        self._period, self._patience = period, patience
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._speak, name="roll call", daemon=True)

    def start(self) -> None:
        """Begins to speak."""
        self._thread.start()

    def stop(self) -> None:
        """Says nothing more. A store that hangs isn't waited for."""
        self._ended.set()
        self._thread.join(self._patience)

    def ask(self, about: str) -> str | None:
        """Where all ranks are, in lines; None if another rank has asked the same. Takes up to twice the patience.

        Args:
            about: what makes it ask, e.g. the iteration.
        """
        answers: list[str | None] = []

        def answer() -> None:
            try:
                answers.append(self._compare() if self._store.add(f"asked/{about}", 1) == 1 else None)
            except RuntimeError as error:
                answers.append(f"The store that all ranks share is gone: {error}")

        asker = threading.Thread(target=answer, name="roll call asks", daemon=True)
        asker.start()
        asker.join(2 * self._patience)
        if answers:
            return answers[0]
        return (
            "The store that all ranks share doesn't answer: the process that serves it (rank 0, or torchrun on its "
            "host) is stopped, or its host is cut off."
        )

    def _speak(self) -> None:
        words = 0
        try:
            while True:
                words += 1
                seen = Seen(words, socket.gethostname(), os.getpid(), self._where())
                self._store.set(f"rank/{self._rank}", json.dumps(seen))
                if self._ended.wait(self._period):
                    return
        except RuntimeError:
            return  # the store is gone, and the run with it

    def _compare(self) -> str:
        before = self._read()
        self._ended.wait(self._patience)
        return describe(before, self._read())

    def _read(self) -> list[Seen | None]:
        keys = [f"rank/{rank}" for rank in range(self._size)]
        return [Seen(*json.loads(self._store.get(key))) if self._store.check([key]) else None for key in keys]


def describe(before: Sequence[Seen | None], after: Sequence[Seen | None]) -> str:
    """What two looks at all ranks say, the culprits first: ranks that are silent, that don't wait for others, others.

    Args:
        before, after: what each rank said last; None for one that never spoke.
    """
    places: dict[tuple[int, str], list[int]] = defaultdict(list)
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        if new is None:
            places[0, "never reached the first step"].append(rank)
        elif old is not None and old.words == new.words:
            said = f"silent: its process is stopped, or its host dead or cut off. Last heard of in {new.where}"
            places[0, said].append(rank)
        else:
            places[2 if "waits in" in new.where else 1, new.where].append(rank)
    lines = ["All ranks:"]
    for (_, where), ranks in sorted(places.items(), key=lambda item: (item[0][0], len(item[1]))):
        lines.append(f"  {_names(ranks, after)}: {where}")
    return "\n".join(lines)


def _names(ranks: Sequence[int], seen: Sequence[Seen | None]) -> str:
    """``rank 1 (process 7 on node3)``, or ``ranks 0-5, 7`` where they are many."""
    if len(ranks) <= _MOST:
        told = ((rank, seen[rank]) for rank in ranks)
        return ", ".join(f"rank {r} (process {s.process} on {s.host})" if s else f"rank {r}" for r, s in told)
    return f"ranks {spans(ranks)}"


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, those in a row as ``first-last``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
