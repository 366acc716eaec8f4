"""Stopped and resumed, a run goes on as if it had not been: bitwise in its layout, to rounding in another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.runs import pretrain, recorded, saved_tensors, words

FEATURES = (
    "--train-iters 6 --micro-batch-size 1 --global-batch-size 8 --rampup-batch-size 4 4 12 --optimizer muon "
    "--muon-lr 0.02 --swiglu --num-query-groups 2 --qk-layernorm --hidden-dropout 0.1 --attention-dropout 0.1 "
    "--eval-interval 2 --eval-iters 1 --lr-decay-style cosine --lr-warmup-iters 2 --log-interval 1"
)
LAYOUTS = {
    "one": (1, ""),
    "dp2": (2, ""),
    "tp2-sp-pp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
    "cp2-fsdp2": (4, "--context-parallel-size 2 --use-torch-fsdp2"),
}
ENDS = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
for name in ("Interleaved1F1B", "ZBVZeroBubble"):
    LAYOUTS[name] = (2, f"--pipeline-model-parallel-size 2 {ENDS} --pipeline-schedule {name}")
LONG = ("cp2-fsdp2", "Interleaved1F1B", "ZBVZeroBubble")
TRAIN, VALID = "train/lm loss", "validation/lm loss"


def run(pool, layout: str, folder: Path, *flags: str) -> None:
    """Runs main on the layout's ranks, from the folder's checkpoint if there is one."""
    ranks, parallel = LAYOUTS[layout]
    files = f"--save {folder}/run --load {folder}/run --metrics-file {folder}/metrics.jsonl"
    for outcome in pool.launch(ranks, pretrain, words(FEATURES, parallel, files, *flags)):
        assert outcome.code == 0, outcome.err


def curve(folder: Path, name: str = TRAIN) -> dict[int, float]:
    return recorded(folder / "metrics.jsonl", name)


@pytest.fixture(scope="module")
def unbroken(pool, tmp_path_factory):
    """Folders of runs that nothing stopped, by layout."""
    folders = {}

    def folder(layout: str) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp(layout)
            run(pool, layout, folders[layout])
        return folders[layout]

    return folder


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in LAYOUTS]
)
def test_resumes_bitwise_in_the_same_layout(pool, unbroken, tmp_path, layout):
    """Stopped inside the ramp and again after it."""
    whole = unbroken(layout)
    run(pool, layout, tmp_path, "--exit-interval 2")
    assert list(curve(tmp_path)) == [1, 2]
    run(pool, layout, tmp_path, "--exit-interval 5")
    assert list(curve(tmp_path)) == [1, 2, 3, 4, 5]
    run(pool, layout, tmp_path)
    assert curve(tmp_path) == curve(whole)
    assert len(set(curve(whole).values())) == 6
    assert curve(tmp_path, VALID) == curve(whole, VALID)
    tensors, want = (saved_tensors(path / "run" / "iter_0000006") for path in (tmp_path, whole))
    assert tensors.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(tensors[key], value), key


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("dp2", "one"),
        ("one", "tp2-sp-pp2"),
        pytest.param("cp2-fsdp2", "dp2", marks=pytest.mark.long),
        pytest.param("tp2-sp-pp2", "cp2-fsdp2", marks=pytest.mark.long),
        pytest.param("tp2-sp-pp2", "Interleaved1F1B", marks=pytest.mark.long),
        pytest.param("Interleaved1F1B", "ZBVZeroBubble", marks=pytest.mark.long),
        pytest.param("ZBVZeroBubble", "one", marks=pytest.mark.long),
    ],
)
def test_resumes_in_another_layout(pool, unbroken, tmp_path, before, after):
    run(pool, before, tmp_path, "--exit-interval 3")
    run(pool, after, tmp_path, "--exit-interval 4")
    assert curve(tmp_path)[4] == pytest.approx(curve(unbroken(before))[4], rel=1e-6)


def test_layouts_agree(unbroken):
    for layout in ("dp2", "tp2-sp-pp2"):
        for iteration, loss in curve(unbroken("one")).items():
            assert curve(unbroken(layout))[iteration] == pytest.approx(loss, rel=1e-4)


def test_sigterm_saves_and_the_run_goes_on(tmp_path):
    folder, metrics = tmp_path / "run", tmp_path / "metrics.jsonl"
    flags = words(f"--train-iters 100000 --log-interval 1 --save {folder} --load {folder} --metrics-file {metrics}")
    program = str(Path(__file__).parents[2] / "pretrain.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, program, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 240
        while not metrics.is_file() or len(recorded_lines(metrics)) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the run doesn't get going"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "SIGTERM" in out + err
    assert "Traceback" not in err
    done = max(recorded(metrics, TRAIN))
    assert [path.name for path in folder.glob("iter_*")] == [f"iter_{done:07}"]

    outcome = pretrain([*flags, "--exit-interval", "1"])
    assert outcome.code == 0, outcome.err
    assert f"iteration {done}" in outcome.out
    assert list(recorded(metrics, TRAIN)) == list(range(1, done + 2))


def recorded_lines(file: Path) -> list[str]:
    """Whole lines of a file that is being written."""
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
