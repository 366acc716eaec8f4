"""The scripts in examples/slurm, on a SLURM that the test starts: submit, train, stop, requeue, resume, finish."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.following import iterations, wait_for
from tests.cluster.slurm import Slurm, why_not
from tests.runs import words

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "examples" / "slurm").iterdir(), *(ROOT / "examples" / "torchrun").iterdir()])
ITERATIONS = 400


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, Slurm(Path(folder)) as running:
        running.environment |= {"PYTHON": sys.executable, "PROCESSES_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
        yield running


@pytest.mark.long
def test_the_doctor_looks_at_each_node_once_and_tasks_get_their_cores(slurm, tmp_path):
    stub, log = tmp_path / "python", tmp_path / "job.out"
    stub.write_text('#!/bin/sh\necho "$1 with $SRUN_CPUS_PER_TASK"\n')
    stub.chmod(0o755)
    options = ["--ntasks-per-node=2", "--nodes=1", "--cpus-per-task=1", "--gres=none", "--overcommit"]
    job = slurm.submit(
        ROOT / "examples" / "slurm" / "multi-node.sbatch",
        options=[*options, f"--output={log}", f"--export=ALL,PYTHON={stub}"],
        folder=ROOT,
    )
    wait_for(lambda: ended(slurm, job), "end", log)
    said = [line for line in log.read_text().splitlines() if " with " in line]
    assert sorted(said) == ["pretrain.py with 1"] * 2 + ["tools/doctor.py with 1"], log.read_text()


def ended(slurm: Slurm, job: str) -> bool:
    return slurm.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "tasks", "signal"), [("single.sbatch", 2, "TERM"), ("multi-node-torchrun.sbatch", 1, "USR1")]
)
def test_a_stopped_job_goes_back_into_the_queue_resumes_and_finishes(slurm, tmp_path, script, tasks, signal):
    metrics, runs, log = tmp_path / "metrics.jsonl", tmp_path / "runs", tmp_path / "job.out"
    flags = words(f"--save {runs} --load {runs} --metrics-file {metrics} --log-interval 1 --train-iters {ITERATIONS}")
    options = [f"--ntasks-per-node={tasks}", "--nodes=1", "--cpus-per-task=1", "--gres=none", f"--output={log}"]
    options += ["--overcommit"]
    job = slurm.submit(ROOT / "examples" / "slurm" / script, *flags, options=options, folder=ROOT)
    wait_for(lambda: len(iterations(metrics)) >= 20 or ended(slurm, job), "training", log)
    assert not ended(slurm, job), log.read_text()
    slurm.run("scancel", f"--signal={signal}", job)
    wait_for(lambda: slurm.job(job)["Restarts"] == "1" or ended(slurm, job), "return to the queue", log)
    stopped = iterations(metrics)[-1]
    assert stopped < ITERATIONS, "it was over before it could be stopped"
    wait_for(lambda: ended(slurm, job), "end", log)
    assert slurm.job(job)["JobState"] == "COMPLETED", log.read_text()
    assert iterations(metrics) == list(range(1, ITERATIONS + 1)), "an iteration was lost or done twice"
    assert (runs / f"iter_{ITERATIONS:07}").is_dir()
