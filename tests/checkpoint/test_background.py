"""Saving in the background saves what was there when it began; a kill at any moment costs one interval at most."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_mup import checkpoint
from megatron_mup.checkpoint import dcp, files, local
from megatron_mup.checkpoint.background import BackgroundSaver
from megatron_mup.checkpoint.verify import verify
from megatron_mup.config import ConfigError
from tests.checkpoint.cases import Run, config_of, fill, known, load_latest, wrong
from tests.runs import Outcome, pretrain, saved_tensors, words


def begin(saver: BackgroundSaver, run: Run, folder: str, iteration: int, done: list[Path]) -> None:
    saver.start(folder, run.pieces(), run.manifest(iteration), None, None, done.append)


def copies_of(saver: BackgroundSaver) -> dict[Any, torch.Tensor]:
    return saver._copies._tensors


def save_and_change(folder: str) -> list[str]:
    """Saves three iterations; values change as soon as each save has begun."""
    run, saver, done = Run(config_of("fsdp2")), BackgroundSaver(), []
    places = set()
    for iteration in (1, 2, 3):
        fill(run.pieces(), iteration)
        begin(saver, run, folder, iteration, done)
        saver.before_update()
        fill(run.pieces(), 99)
        places.add(tuple(copy.data_ptr() for copy in copies_of(saver).values()))
    saver.finish()
    saver.finish()
    # One copy in host memory, used again.
    assert len(places) == 1
    shards = {(p.key, p.offsets): p.tensor.nbytes for p in run.pieces() if p.is_saved}
    assert sum(copy.nbytes for copy in copies_of(saver).values()) == sum(shards.values())
    # What is no longer saved, after a change of optimizers for instance, takes no memory.
    saver.start(f"{folder}/weights", run.pieces(optimizer=False), run.manifest(4), None, None, done.append)
    saver.finish()
    assert {key for key, _ in copies_of(saver)} == {piece.key for piece in run.pieces(optimizer=False)}
    return [path.name for path in done]


def test_what_was_there_at_the_beginning_is_saved(pool, tmp_path):
    names = ["iter_0000001", "iter_0000002", "iter_0000003"]
    assert pool.run(2, save_and_change, str(tmp_path)) == [[*names, "iter_0000004"]] * 2
    assert not verify(tmp_path / names[1]).problems
    assert pool.run(2, load_latest, "tp2", str(tmp_path)) == [(names[2], [])] * 2


def save_failing(folder: str) -> tuple[str, list[str]]:
    """The disk of one rank is full while iteration 2 is written."""
    run, saver, done = Run(config_of("fsdp2")), BackgroundSaver(), []
    fill(run.pieces(), 1)
    begin(saver, run, folder, 1, done)
    saver.finish()
    whole = dcp.FileSystemWriter.write_data
    if dist.get_rank() == 1:

        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "__1_0.distcp")

        dcp.FileSystemWriter.write_data = fail
    begin(saver, run, folder, 2, done)
    try:
        saver.finish()
    except ConfigError as error:
        message = str(error)
    finally:
        dcp.FileSystemWriter.write_data = whole
    fill(run.pieces(), 3)
    begin(saver, run, folder, 3, done)
    saver.finish()
    return message, [path.name for path in done]


def test_a_failure_is_told_at_the_next_save(pool, tmp_path):
    results = pool.run(2, save_failing, str(tmp_path))
    assert results[0] == results[1]
    message, done = results[0]
    assert "on rank 1, No space left on device" in message
    assert done == ["iter_0000001", "iter_0000003"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == done


def pretrain_with_late_copies(argv: list[str]) -> Outcome:
    """A run that begins to copy what it saves when the next step is about to change it, or when nothing more comes."""
    reached, replaced = threading.Event(), {}

    def then(name: str, first: Callable[[], object]) -> None:
        method = replaced[name] = getattr(BackgroundSaver, name)
        setattr(BackgroundSaver, name, lambda *arguments: (first(), method(*arguments))[1])

    then("_run", reached.clear)
    then("_copied_pieces", lambda: reached.wait(10))
    then("before_update", reached.set)
    then("finish", reached.set)
    try:
        return pretrain(argv)
    finally:
        for name, method in replaced.items():
            setattr(BackgroundSaver, name, method)


def test_a_run_saves_the_same_either_way(pool, tmp_path):
    for name, flag, job in (("plain", "", pretrain), ("async", "--async-save", pretrain_with_late_copies)):
        flags = f"--save {tmp_path}/{name} --save-interval 2 --train-iters 6 {flag}"
        outcomes = pool.launch(2, job, words(flags, "--data-parallel-sharding-strategy optim_grads_params"))
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
        assert "iter_0000006" in outcomes[0].out + outcomes[0].err
    for iteration in ("iter_0000002", "iter_0000006"):
        plain, background = (saved_tensors(tmp_path / name / iteration) for name in ("plain", "async"))
        assert plain.keys() == background.keys()
        assert all(torch.equal(plain[key], background[key]) for key in plain)
    states = [
        torch.load(tmp_path / name / "iter_0000004" / "rng.pt", weights_only=True)[0]["torch"]
        for name in ("plain", "async")
    ]
    assert torch.equal(*states)
    resume = f"--load {tmp_path}/async --save {tmp_path}/async --train-iters 8 --async-save --save-retain-interval 4"
    outcomes = pool.launch(1, pretrain, words(resume))
    assert outcomes[0].code == 0, outcomes
    assert sorted(path.name for path in (tmp_path / "async").glob("iter_*")) == ["iter_0000004", "iter_0000008"]


def save_for_ever(rank: int, store: str, folder: str, kind: str) -> None:
    """Saves iteration after iteration; after each it leaves a file that names it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    run, saver = Run(config_of("fsdp2")), BackgroundSaver()

    def told(path: Path) -> None:
        if rank == 0:
            Path(store + ".now").write_text(path.name)
            os.replace(store + ".now", store + ".done")

    for iteration in range(1, 1000):
        saver.before_update()
        fill(run.pieces(), iteration)
        if kind == "local":
            local.save(folder, run.pieces(), run.manifest(iteration), "run")
            told(files.checkpoints(local.rank_folder(folder, "run"))[iteration])
        elif kind == "background":
            saver.start(folder, run.pieces(), run.manifest(iteration), 2, None, told)
        else:
            told(run.save(folder, iteration, keep_last=2))


MOMENTS = [pytest.param(number, marks=[pytest.mark.long] if number >= 5 else []) for number in range(40)]


def save_until_killed(folder: Path, store: str, kind: str, moment: int) -> int:
    """Kills two ranks that save for ever; the last iteration that they told to be saved."""
    draw = random.Random(moment)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.test_background"])
    arguments = [(rank, store, str(folder), kind) for rank in range(2)]
    ranks = [context.Process(target=save_for_ever, args=a, daemon=True) for a in arguments]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 120
    while not Path(store + ".done").exists():
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in ranks)
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.5))
    for process in draw.sample(ranks, 2):
        # The other rank may have ended over the loss of its peer.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(draw.choice([0, 0.05]))
    for process in ranks:
        process.join()
    return int(Path(store + ".done").read_text().removeprefix("iter_"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment(moment):
    with tempfile.TemporaryDirectory() as scratch:
        folder, kind = Path(scratch) / "checkpoints", "plain" if moment % 2 else "background"
        saved = save_until_killed(folder, f"{scratch}/store", kind, moment)
        files.sweep(folder)
        path = checkpoint.find(folder)
        assert path is not None
        assert not verify(path).problems
        assert int(path.name.removeprefix("iter_")) >= saved
        iteration = int(path.name.removeprefix("iter_"))
        assert all(torch.equal(v, known(k, tuple(v.shape), iteration)) for k, v in saved_tensors(path).items())
        leftovers = [p.name for p in folder.iterdir() if p.name.startswith(".") and p.is_dir()]
        assert leftovers == []


def load_own(folder: str) -> tuple[int, list[str]]:
    """The iteration of the newest local checkpoint that is whole, and what is wrong in it."""
    run = Run(config_of("fsdp2"))
    path = local.find(folder, "run", checkpoint.layout_sizes(run.mesh))
    assert path is not None
    pieces = run.pieces()
    iteration = local.load(path, pieces, run.config).iteration
    return iteration, wrong(pieces, iteration)


@pytest.mark.parametrize("moment", [pytest.param(n, marks=[pytest.mark.long] if n else []) for n in range(8)])
def test_a_kill_while_ranks_save_for_themselves(pool, moment):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "disk"
        saved = save_until_killed(folder, f"{scratch}/store", "local", 100 + moment)
        (first, bad), second = pool.run(2, load_own, str(folder))
        assert (first, bad) == second
        assert bad == []
        assert first >= saved
