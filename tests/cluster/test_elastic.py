"""Runs under torchrun that lose a process, a host or the network: they go on, and compute what an unbroken run does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.following import iterations, starts, wait_for
from tests.cluster.hosts import ADDRESSES, DEVICE, TwoHosts, why_not
from tests.runs import pretrain, recorded, words

SCRIPTS = Path(__file__).parents[2] / "examples" / "torchrun"
INTERVAL, ITERATIONS, SOON = 5, 30, 8
FLAGS = (
    f"--train-iters {ITERATIONS} --global-batch-size 32 --micro-batch-size 1 --lr 1e-3 --save-interval {INTERVAL} "
    "--log-interval 1 --no-progress --distributed-timeout-minutes 2 --distributed-timeout-seconds-after-init 20 "
    "--watchdog-minutes 0.05"
)
LOSS = "train/lm loss"

pytestmark = pytest.mark.long


def flags(folder: Path) -> list[str]:
    """A run in a folder."""
    return words(FLAGS, f"--save {folder}/run --load {folder}/run --metrics-file {folder}/metrics.jsonl")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[int, float]:
    """Losses of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert pretrain(flags(folder)).code == 0
    return recorded(folder / "metrics.jsonl", LOSS)


def environment(**variables: str) -> dict[str, str]:
    """What the scripts read."""
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "TORCH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}


def assert_nothing_is_lost(folder: Path, unbroken: dict[int, float], lost_at: int) -> None:
    """All iterations are there once, with the losses of the unbroken run, and at most an interval was done again."""
    metrics = folder / "metrics.jsonl"
    assert iterations(metrics) == list(range(1, ITERATIONS + 1))
    for iteration, loss in recorded(metrics, LOSS).items():
        assert loss == pytest.approx(unbroken[iteration], rel=1e-5), f"iteration {iteration}"
    first, *others = starts(metrics)
    assert first == 0
    assert others, "it never stopped"
    assert lost_at - INTERVAL <= others[0] < ITERATIONS


def ranks_at_the_end(folder: Path) -> int:
    """Data-parallel ranks that wrote the last checkpoint."""
    manifest = json.loads((folder / "run" / f"iter_{ITERATIONS:07}" / "manifest.json").read_text())
    return int(manifest["layout"]["dp_replicate"])


def worker(torchrun: int, rank: int) -> int:
    """Process of a rank that torchrun has started."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=lambda fault: fault.name)
def test_a_process_dies_or_stops(tmp_path, unbroken, fault):
    metrics, log = tmp_path / "metrics.jsonl", tmp_path / "log"
    with open(log, "wb") as output:
        job = subprocess.Popen(
            [str(SCRIPTS / "single.sh"), *flags(tmp_path)],
            env=environment(PROCESSES_PER_NODE="2", RESTARTS="1"),
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(lambda: len(iterations(metrics)) >= SOON or job.poll() is not None, "training", log)
        process, lost_at = worker(job.pid, 1), iterations(metrics)[-1]
        os.kill(process, fault)
        wait_for(lambda: job.poll() is not None, "end", log)
    finally:
        job.terminate()
        job.wait()
    said = log.read_text()
    assert job.returncode == 0, said[-6000:]
    assert_nothing_is_lost(tmp_path, unbroken, lost_at)
    if fault == signal.SIGSTOP:
        assert re.search(rf"rank 1 \(process {process} on \S+\): silent", said)
        assert re.search(r"rank 0 .* has been in [\w-]+ of iteration \d+ for \d+ s; it waits in gloo:", said)
        assert said.index("silent") < said.index("Timed out"), "named before the collective gives up"


class Job:
    """The run on both hosts."""

    def __init__(self, hosts: TwoHosts, folder: Path, nodes: str) -> None:
        self.hosts, self.folder, self.nodes = hosts, folder, nodes
        self.metrics = folder / "metrics.jsonl"
        self.logs = [folder / f"log{host}" for host in range(2)]
        self.processes = [self.start(host) for host in range(2)]

    def start(self, host: int) -> subprocess.Popen[bytes]:
        """Starts the script on a host."""
        variables = environment(
            NODES=self.nodes,
            HEAD=ADDRESSES[0],
            ADDRESS=ADDRESSES[host],
            PROCESSES_PER_NODE="1",
            LAST_CALL="3",
            GLOO_SOCKET_IFNAME=DEVICE,
        )
        return self.hosts.start(host, [str(SCRIPTS / "elastic.sh"), *flags(self.folder)], variables, self.logs[host])

    def ended(self) -> bool:
        """Whether the first host's part has."""
        return self.processes[0].poll() is not None

    def wait(self, there, what: str) -> None:
        """Waits for something, or the end."""
        wait_for(lambda: there() or self.ended(), what, *self.logs)


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    if reason := why_not():
        pytest.skip(reason)
    with TwoHosts() as made:
        yield made


@pytest.mark.parametrize("nodes", ["1:2", "2"])
def test_a_host_dies(hosts, tmp_path, unbroken, nodes):
    """With 1:2 the other one goes on alone; with 2 it waits for the host to come back."""
    job = Job(hosts, tmp_path, nodes)
    job.wait(lambda: len(iterations(job.metrics)) >= SOON, "training")
    hosts.cut()
    hosts.kill(1)
    lost_at = iterations(job.metrics)[-1]
    if nodes == "2":
        hosts.mend()
        job.processes[1] = job.start(1)
    job.wait(lambda: False, "end")
    assert job.processes[0].returncode == 0, job.logs[0].read_text()[-6000:]
    assert_nothing_is_lost(tmp_path, unbroken, lost_at)
    assert ranks_at_the_end(tmp_path) == (1 if nodes == "1:2" else 2)


def test_the_network_is_cut_for_a_while(hosts, tmp_path, unbroken):
    """Both sides say what hangs and give up; with the cable plugged in again they find together."""
    job = Job(hosts, tmp_path, "2")
    job.wait(lambda: len(iterations(job.metrics)) >= SOON, "training")
    hosts.cut()
    lost_at = iterations(job.metrics)[-1]
    job.wait(lambda: all("Timed out" in log.read_text() for log in job.logs), "timeout on both sides")
    hosts.mend()

    def over() -> bool:
        if job.processes[1].poll():  # its torchrun gave up too: it is started again, as an operator would
            job.processes[1] = job.start(1)
        return job.ended()

    job.wait(over, "end")
    assert job.processes[0].returncode == 0, job.logs[0].read_text()[-6000:]
    assert_nothing_is_lost(tmp_path, unbroken, lost_at)
    assert ranks_at_the_end(tmp_path) == 2
    told = "".join(log.read_text() for log in job.logs)
    assert re.search(r"rank \d .* has been in [\w-]+ of iteration \d+ for \d+ s; it waits in gloo:", told)
    assert re.search(r"rank \d .*: silent", told)
    assert "The store that all ranks share" in told
