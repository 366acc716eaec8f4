"""A record that can't be written is told once, and training goes on. Limits on files stand for disks."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_mup.config import ConfigError
from megatron_mup.training.sinks import Dispensable, JsonLines
from tests.runs import pretrain, recorded, words

LOSS = "train/lm loss"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes; what fits of a write is written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_until_there_is_room(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(str(path), 0, {"about": "run"})
    with largest_file(path.stat().st_size + 30):
        for iteration in range(1, 4):
            sink.write(iteration, {LOSS: 0.5})
            sink.flush()
        assert not path.read_text().endswith("\n"), "torn"
        assert len(recorded_lines(path.read_text())) == 1
    sink.write(4, {LOSS: 0.5})
    sink.close()
    assert recorded(path, LOSS) == dict.fromkeys(range(1, 5), 0.5)
    err = capsys.readouterr().err
    assert err.count("warning: ") == err.count(f"warning: --metrics-file {path}: File too large; lines wait") == 1


def recorded_lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
def test_a_run_goes_on_when_nothing_can_be_recorded(tmp_path):
    flags = f"--metrics-file {tmp_path}/m.jsonl --tensorboard-dir {tmp_path}/tb --log-interval 1"
    with largest_file(500):
        outcome = pretrain(words(flags))
    assert outcome.code == 0, outcome.err
    for flag in ("--metrics-file", "--tensorboard-dir"):
        assert outcome.err.count(f"warning: {flag} {tmp_path}") == 1
    assert "Traceback" not in outcome.err


class Failing:
    """A sink that fails from some call on."""

    def __init__(self, good: int) -> None:
        self.left, self.written = good, 0

    def write(self, iteration, scalars):
        self._fail()
        self.written += 1

    def flush(self):
        self._fail()

    def close(self):
        self._fail()

    def _fail(self):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the writer's thread is dead")


def test_a_library_that_fails_is_given_up(capsys):
    failing = Failing(2)
    sink = Dispensable("--wandb-save-dir x", lambda: failing)
    for iteration in range(4):
        sink.write(iteration, {})
        sink.flush()
    sink.close()
    assert failing.written == 1
    err = capsys.readouterr().err
    assert err == "warning: --wandb-save-dir x: the writer's thread is dead; nothing more is recorded there\n"


def test_what_fails_to_open(capsys):
    def opening(code: int):
        def make():
            raise OSError(code, "it can't")

        return make

    Dispensable("--tensorboard-dir x", opening(errno.ENOSPC)).write(1, {})
    assert "--tensorboard-dir x: it can't; nothing" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--tensorboard-dir x: can't be written: it can't"):
        Dispensable("--tensorboard-dir x", opening(errno.EACCES))
