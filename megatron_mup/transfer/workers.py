"""Worker processes that train trials for as long as there are some, several on each GPU where models are small.

A process that stays keeps what takes longest in a short trial: imports, the device's context, compiled code of the last
size. Whoever is free takes the next trial, at once; nobody waits for a round to end.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megatron_mup.config import Config
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.transfer.sizes import Growth
from megatron_mup.transfer.trials import FAILED, Trial, configured, run_trial

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A trial of a recipe, and where its curve goes.

    Attributes:
        recipe: base sizes written out, vocabulary size given.
        trial: size, values, seed.
        folder: its curve and log go to ``curves/`` and ``logs/`` in it.
        grow: what grows with the hidden size.
        urgency: the least is done first.
        alone: only for workers that have their GPU to themselves, so that its times are those of a run.
        seconds: how long it may take, until one of its shape has shown it.
    """

    recipe: Config
    trial: Trial
    folder: str
    grow: Growth = "heads"
    urgency: int = 0
    alone: bool = False
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Folder and trial."""
        return f"{Path(self.folder).name}/{self.trial.key}"

    @property
    def shape(self) -> tuple[str, int, int]:
        """What has the same compiled code, about: the recipe's folder, and the size."""
        return self.folder, self.trial.hidden_size, self.trial.num_layers


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Attributes:
        gpu: as in CUDA_VISIBLE_DEVICES; None for the CPU.
        alone: whether no other worker is on that GPU. It takes jobs that ask for that first, then any.
    """

    gpu: str | None = None
    alone: bool = False


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, without touching them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def places_for(count: int) -> list[Place]:
    """So many workers, dealt out over the GPUs."""
    gpus: Sequence[str | None] = visible_gpus() or [None]
    return [Place(gpus[number % len(gpus)]) for number in range(count)]


@dataclass
class _Worker:
    place: Place
    process: BaseProcess
    connection: Connection
    job: Job | None = None
    shape: tuple[str, int, int] | None = None
    began: float = field(default=0.0)


class Workers:
    """Worker processes; as a context they are stopped at its end, whatever they do.

    Args:
        places: one for each worker.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._context = multiprocessing.get_context("spawn")
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // len(places)))
        self._threads = threads
        self._workers = [self._start(place) for place in places]
        self.lasted: dict[tuple[str, int, int], float] = {}

    def _start(self, place: Place) -> _Worker:
        here, there = self._context.Pipe()
        process = self._context.Process(target=serve, args=(there, place.gpu, self._threads), daemon=False)
        process.start()
        there.close()
        return _Worker(place, process, here)

    def run(
        self,
        wanted: Callable[[], Sequence[Job]],
        finished: Callable[[Job, Record], None],
        deadline: float | None = None,
    ) -> bool:
        """Trains until nothing is wanted, nothing fits before the deadline, or all that is left has failed.

        Args:
            wanted: what is to be done as results stand, in order; asked whenever a worker is free.
            finished: takes each record.
            deadline: by `time.monotonic`. No job begins that would end later, by what its like took; what runs then is
                stopped.

        Returns:
            Whether the deadline, or a signal, has left something undone.
        """
        failed: set[str] = set()
        while True:
            busy = {worker.job.name for worker in self._workers if worker.job is not None}
            todo = [job for job in wanted() if job.name not in busy and job.name not in failed]
            fitting = [job for job in todo if deadline is None or time.monotonic() + self._expected(job) < deadline]
            for worker in self._workers:
                if worker.job is None and (job := self._choose(worker, fitting)) is not None:
                    fitting.remove(job)
                    todo.remove(job)
                    self._give(worker, job)
            running = {worker.connection: worker for worker in self._workers if worker.job is not None}
            if not running:
                return bool(todo)
            pause = None if deadline is None else deadline - time.monotonic()
            if pause is not None and pause <= 0:
                return True
            for connection in wait(list(running), pause):
                assert isinstance(connection, Connection)
                worker = running[connection]
                job, record = self._take(worker)
                if record is None:
                    return True
                if record["status"] == FAILED:
                    failed.add(job.name)
                finished(job, record)

    def _expected(self, job: Job) -> float:
        return self.lasted.get(job.shape, job.seconds)

    def _choose(self, worker: _Worker, jobs: Sequence[Job]) -> Job | None:
        """The most urgent job; of several one for which the worker has compiled, or nobody else has."""
        fit = [job for job in jobs if worker.place.alone or not job.alone]
        if not fit:
            return None
        elsewhere = {other.shape for other in self._workers if other is not worker}
        return min(
            fit,
            key=lambda job: (
                job.alone != worker.place.alone,
                job.urgency,
                job.shape != worker.shape,
                job.shape in elsewhere,
            ),
        )

    def _give(self, worker: _Worker, job: Job) -> None:
        worker.job, worker.shape, worker.began = job, job.shape, time.monotonic()
        worker.connection.send(job)

    def _take(self, worker: _Worker) -> tuple[Job, Record | None]:
        """What a worker has found; one that died, or whose device may be broken, is replaced."""
        job, worker.job = worker.job, None
        assert job is not None
        record: Record | None
        try:
            record = worker.connection.recv()
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode
            record = {"trial": job.trial.key, "status": FAILED, "loss": None, "error": f"the worker died: {code}"}
        if record is not None:
            record.setdefault("seconds", round(time.monotonic() - worker.began, 2))
            if record["status"] == FAILED:
                worker.process.terminate()
                fresh = self._start(worker.place)
                worker.process, worker.connection, worker.shape = fresh.process, fresh.connection, None
            else:
                self.lasted[job.shape] = record["seconds"]
        return job, record

    def close(self) -> None:
        """Stops all workers; a trial under way is lost but for its curve."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()

    def __enter__(self) -> Workers:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Closes."""
        self.close()


def serve(connection: Connection, gpu: str | None, threads: int) -> None:
    """A worker's life: takes jobs, sends records, until the other end closes.

    Args:
        connection: jobs in; records out, None where a signal stopped the trial.
        gpu: see `Place`.
        threads: of PyTorch on the CPU.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    mesh: Mesh | None = None
    before: Job | None = None
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            job: Job = connection.recv()
            if before is None:
                device = init_process_group(job.recipe, Launch(0, 0, 1))
            if mesh is None or before is None or job.recipe != before.recipe:
                mesh = Mesh.build(job.recipe, device)
            if before is not None and job.shape != before.shape:
                torch.compiler.reset()
            vocab_size = job.recipe.model.vocab_size
            assert vocab_size is not None
            config = configured(job.recipe, job.trial, job.grow)
            record = run_trial(config, job.trial, vocab_size, mesh, job.folder)
            connection.send(record)
            if record is None:
                return
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            before = job


def told(job: Job, record: Mapping[str, Any]) -> str:
    """A finished trial in a line."""
    loss = "diverged" if record["loss"] is None else f"{record['loss']:.4f}"
    return f"{job.name}: {record.get('error') or loss} ({record['seconds']:.1f} s)"
