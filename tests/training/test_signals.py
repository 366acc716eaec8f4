from __future__ import annotations

import os
import signal

import pytest
import torch

from megatron_mup.training import signals
from megatron_mup.training.signals import EXIT_FINISHED, EXIT_STOPPED, StopRequest

CPU = torch.device("cpu")


def test_nothing_asked():
    with StopRequest(None, CPU) as stop:
        assert stop.local() == 0
        stop.submit(torch.tensor(0))
        assert stop.agreed() is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_is_noticed_and_handlers_come_back(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopRequest(None, CPU) as stop:
        assert signal.getsignal(number) != before
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # torchrun and the batch system may both send it
        stop.submit(torch.tensor(stop.local()))
        assert stop.agreed() == name
    assert signal.getsignal(number) == before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopRequest(None, CPU):
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def test_time_limit(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with StopRequest(2.0, CPU) as stop:
        now[0] = 219.0
        assert stop.local() == 0
        now[0] = 220.0
        stop.submit(torch.tensor(stop.local()))
        assert stop.agreed() == "--exit-duration-in-mins"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("reduce", [torch.sum, torch.amax])
def test_the_strongest_reason_wins_in_sums_and_maxima(dtype, reduce):
    wishes = {}
    for name in ("SIGUSR1", "SIGTERM"):
        with StopRequest(None, CPU) as stop:
            os.kill(os.getpid(), signal.Signals[name])
            wishes[name] = stop.local()
    with StopRequest(0.0, CPU) as stop:
        wishes["--exit-duration-in-mins"] = stop.local()
        for reason, others in (
            ("SIGTERM", ["SIGUSR1"] * 50000 + ["--exit-duration-in-mins"] * 50000),
            ("SIGUSR1", ["--exit-duration-in-mins"] * 100000),
            ("--exit-duration-in-mins", ["--exit-duration-in-mins"] * 100000),
        ):
            ranks = torch.tensor([0, wishes[reason], *(wishes[other] for other in others)], dtype=dtype)
            stop.submit(reduce(ranks, dim=0))
            assert stop.agreed() == reason


def test_exit_codes_differ():
    assert EXIT_FINISHED == 0
    assert EXIT_STOPPED == os.EX_TEMPFAIL
