"""The quickstart from end to end; `.ci/run` runs its short form with every change too."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", str(ROOT / "tools" / "quickstart.py"), "--short", "--folder", str(folder), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder: Path, *flags: str) -> str:
    process = start(folder, *flags)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart") / "work"
    return folder, run(folder)


def test_it_ends_with_bits_per_byte_plot_checkpoint_and_sample(finished):
    folder, output = finished
    closing = output.splitlines()[-1]
    found = re.match(r"validation bits per byte: (\d\.\d{3}) ", closing)
    assert found is not None, closing
    # A vocabulary of 4096 ids and 3.85 bytes per token: 3.1 before training.
    assert 2 < float(found[1]) < 3.1
    assert (folder / "loss.png").stat().st_size > 10_000
    assert "the model continues 'class Stack:" in output
    assert str(folder / "checkpoints") in output


def test_a_second_run_says_that_it_is_done_and_the_same_again(finished):
    folder, output = finished
    again = run(folder)
    assert again.startswith("done already")
    assert again.splitlines()[-1] == output.splitlines()[-1]


def test_an_interrupted_run_goes_on(finished, tmp_path):
    for name in ("corpus", "data"):
        shutil.copytree(finished[0] / name, tmp_path / name)
    shutil.copy(finished[0] / "tokenizer.model", tmp_path)
    process = start(tmp_path, "--train-iters", "12")
    while process.poll() is None and not (tmp_path / "checkpoints" / "iter_0000004").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "the same command goes on" in output
    output = run(tmp_path, "--train-iters", "12")
    assert re.search(r"resumed from .*: iteration \d", output)
    assert "(1.3 M parameters, 12 iterations)" in output.splitlines()[-1]
