"""A rank that hangs says where."""

from __future__ import annotations

import time

from megatron_mup.training.step import untimed
from megatron_mup.training.trainer import Trainer
from megatron_mup.training.watchdog import Watchdog
from tests.runs import pretrain, words


def in_the_middle_of_nowhere(seconds: float) -> None:
    time.sleep(seconds)


def test_a_phase_that_lasts(capsys):
    with Watchdog(0.2 / 60, 3, lambda: 6) as dog:
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
