"""A rank that hangs says where."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from unittest import mock

import torch.distributed as dist

from megatron_mup.training.rollcall import RollCall, Seen, describe, spans
from megatron_mup.training.step import untimed
from megatron_mup.training.trainer import Trainer
from megatron_mup.training.watchdog import Watchdog
from tests.runs import Outcome, pretrain, words


def in_the_middle_of_nowhere(seconds: float) -> None:
    time.sleep(seconds)


def test_a_phase_that_lasts(capsys):
    with Watchdog(0.2 / 60, 3, lambda: 7) as dog:
        timer = dog.over(untimed)
        with timer("optimizer"):
            in_the_middle_of_nowhere(0.6)
    err = capsys.readouterr().err
    assert "rank 3 (process" in err
    assert "in optimizer of iteration 7" in err
    assert "in_the_middle_of_nowhere" in err
    assert err.count("It is here") == 1, "one report for each phase"
    assert "rank 3 left optimizer" in err


def test_short_phases_say_nothing(capsys):
    with Watchdog(0.4 / 60, 0, lambda: 0) as dog:
        for _ in range(30):
            with dog.phase("data"):
                time.sleep(0.02)
    assert capsys.readouterr().err == ""


def test_zero_watches_nothing(capsys):
    with Watchdog(0, 0, lambda: 0) as dog, dog.phase("data"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_run_is_watched(monkeypatch):
    batch = Trainer.batch

    def late_batch(self: Trainer, consumed_samples: int, size: int):
        if consumed_samples:
            in_the_middle_of_nowhere(0.6)
        return batch(self, consumed_samples, size)

    monkeypatch.setattr(Trainer, "batch", late_batch)
    outcome = pretrain(words("--watchdog-minutes 0.005 --train-iters 2"))
    assert outcome.code == 0
    assert "in data of iteration 2" in outcome.err
    assert "in_the_middle_of_nowhere" in outcome.err


def stop_and_go_on(argv: list[str]) -> Outcome:
    """A run whose second rank is stopped before its second step, and goes on once it has been found."""
    rank, batch, ask = int(os.environ["RANK"]), Trainer.batch, RollCall.ask

    def stopping(self: Trainer, consumed_samples: int, size: int):
        if rank == 1 and self.progress.iteration == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return batch(self, consumed_samples, size)

    def awaking(self: RollCall, about: str) -> str | None:
        said = ask(self, about)
        if said and (found := re.search(r"rank 1 \(process (\d+) on \S+\): silent", said)):
            os.kill(int(found.group(1)), signal.SIGCONT)
        return said

    with mock.patch.object(Trainer, "batch", stopping), mock.patch.object(RollCall, "ask", awaking):
        return pretrain(argv)


def test_a_rank_that_is_stopped_is_named_with_the_collective_that_waits_for_it(pool):
    waiting, stopped = pool.launch(2, stop_and_go_on, words("--watchdog-minutes 0.02 --train-iters 2"))
    assert (waiting.code, stopped.code) == (0, 0), waiting.err + stopped.err
    assert "rank 0 (process" in waiting.err
    assert re.search(
        r"in forward-backward of iteration 2 for \d+ s; it waits in gloo:all_reduce number \d+ of group default_pg",
        waiting.err,
    )
    assert "in _agree" in waiting.err, "the stack"
    assert re.search(r"rank 1 .* on .*: silent: its process is stopped", waiting.err)


class HangingStore:
    """The store of a process that is stopped."""

    def add(self, *_: object) -> int:
        threading.Event().wait()
        return 0


def test_a_store_that_does_not_answer():
    call = RollCall(HangingStore(), 1, 2, lambda: "data", period=0.1, patience=0.1)  # type: ignore[arg-type]
    assert "doesn't answer" in call.ask("3")


def test_one_rank_alone_compares():
    store = dist.HashStore()
    calls = [RollCall(store, rank, 3, lambda rank=rank: f"data {rank}", 0.05, 1.0) for rank in range(3)]
    for call in calls[:2]:
        call.start()
    answers = [call.ask("iteration 3") for call in calls]
    for call in calls[:2]:
        call.stop()
    assert answers[1:] == [None, None]
    assert "rank 2: never reached the first step" in answers[0]
    assert "data 0" in answers[0]
    assert "silent" not in answers[0]


def test_what_all_ranks_say_together():
    wait = "forward-backward of iteration 5, waits in nccl:all_reduce number 7"
    before = [Seen(1, f"node{rank // 4}", rank, wait) for rank in range(8)]
    after = [seen._replace(words=2) for seen in before]
    after[6] = after[6]._replace(where="data of iteration 5")
    after[7] = before[7]
    lines = describe(before, after).splitlines()
    assert lines[1].startswith("  rank 7 (process 7 on node1): silent")
    assert lines[2] == "  rank 6 (process 6 on node1): data of iteration 5"
    assert lines[3] == f"  ranks 0-5: {wait}"
    assert spans([0, 2, 3, 4, 7, 9]) == "0, 2-4, 7, 9"
