"""Worker processes of sweeps: who takes what, and what becomes of time limits and failures."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace

import pytest

from megatron_mup.config import parse_config
from megatron_mup.transfer import workers as module
from megatron_mup.transfer.sizes import pin_base
from megatron_mup.transfer.trials import DIVERGED, FAILED, FINISHED, Trial
from megatron_mup.transfer.workers import Job, Place, Workers, places_for, visible_gpus

FLAGS = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length 16 --vocab-size 64 "
    "--mock-data --num-workers 0 --train-iters 4 --distributed-backend gloo"
)
RECIPE = pin_base(parse_config(FLAGS.split()).config)


def job(number: int, width: int = 32, **more) -> Job:
    return Job(RECIPE, Trial(width, 1, (("lr", 1e-3 * (1 + number)),), 1), "sweep", **more)


def answer(connection, gpu, _threads):
    """Stands in for `serve`: says which worker did it, or misbehaves as the learning rate asks."""
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        ((_, rate),) = asked.trial.values
        if rate > 50:
            os._exit(3)
        if rate > 5:
            time.sleep(60)
        status = FAILED if rate > 1 else FINISHED
        connection.send({"trial": asked.trial.key, "status": status, "loss": 1.0, "seconds": 0.5, "gpu": gpu})


@pytest.fixture
def quick(monkeypatch):
    """Workers that answer at once, as forks of this process."""
    monkeypatch.setattr(module, "serve", answer)
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda _: fork)


def run(places, jobs, deadline=None):
    done: dict[str, dict] = {}
    order = []

    def finished(one, record):
        done[one.name] = record
        order.append(one)

    with Workers(places) as workers:
        left = workers.run(lambda: [j for j in jobs if j.name not in done], finished, deadline)
    return left, done, order


def test_everything_is_done_once_and_the_most_urgent_first(quick):
    jobs = [job(n, urgency=n % 2) for n in range(6)]
    left, done, order = run([Place()], jobs)
    assert not left
    assert len(done) == len(order) == 6
    assert [one.urgency for one in order] == [0, 0, 0, 1, 1, 1]


def test_a_worker_stays_with_a_size(quick):
    jobs = [job(n, width) for n in range(3) for width in (32, 64)]
    _, _, order = run([Place()], jobs)
    assert [one.trial.hidden_size for one in order] == [32, 32, 32, 64, 64, 64]


def test_jobs_that_ask_for_a_gpu_of_their_own_get_it(quick):
    jobs = [job(n, alone=n < 3) for n in range(8)]
    _, done, order = run([Place("0", alone=True), Place("1"), Place("1")], jobs)
    assert len(order) == 8
    assert {done[one.name]["gpu"] for one in order if one.alone} == {"0"}
    left, _, order = run([Place("1")], jobs)
    assert left
    assert not any(one.alone for one in order)


def test_failures_are_told_and_not_repeated(quick):
    _, done, order = run([Place()], [job(2000), job(100_000), job(0)])
    assert [done[one.name]["status"] for one in order] == [FAILED, FAILED, FINISHED]
    assert "the worker died: 3" in done[order[1].name]["error"]


def test_the_deadline(quick):
    begin = time.monotonic()
    left, done, _ = run([Place(), Place()], [job(0), job(10_000)], time.monotonic() + 3)
    assert left
    assert len(done) == 1, "what runs then is stopped"
    assert time.monotonic() - begin < 40
    slow = replace(job(1), seconds=1e6)
    left, done, _ = run([Place()], [slow], time.monotonic() + 60)
    assert (left, done) == (True, {}), "begins nothing that would end later"


def test_places(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert visible_gpus() == ["5", "7"]
    assert [place.gpu for place in places_for(3)] == ["5", "7", "5"]
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 0)
    assert [place.gpu for place in places_for(2)] == [None, None]


@pytest.mark.long
def test_real_trials_in_two_processes(tmp_path):
    """The same losses as trials one after the other have."""
    jobs = [replace(job(n, width), folder=str(tmp_path)) for n in range(2) for width in (32, 64)]
    seen = {}
    for places in ([Place(), Place()], [Place()]):
        left, done, _ = run(places, jobs)
        assert not left
        assert {record["status"] for record in done.values()} <= {FINISHED, DIVERGED}
        seen[len(places)] = {name: record["loss"] for name, record in done.items()}
    assert seen[1] == seen[2]
    assert len(set(seen[1].values())) == 4
