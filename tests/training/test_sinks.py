from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mup.config import Config, ConfigError, LoggingConfig
from megatron_mup.training import sinks
from megatron_mup.training.sinks import JsonLines, check_sinks, open_sinks


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, start, iterations, value=1.0):
    sink = JsonLines(str(path), start)
    for iteration in iterations:
        sink.write(iteration, {"train/lm loss": value})
    sink.close()


def test_json_lines(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonLines(str(path), 0)
    sink.write(1, {"train/lm loss": 0.1 + 0.2, "train/batch size": 4})
    sink.write(1, {"validation/lm loss": math.nan})
    sink.flush()
    assert read(path) == [
        {"iteration": 1, "train/lm loss": 0.1 + 0.2, "train/batch size": 4},
        {"iteration": 1, "validation/lm loss": None},
    ]
    sink.close()


def test_json_lines_stay_one_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [1, 2, 3, 4, 4, 5])
    with open(path, "a") as file:
        file.write('{"iteration": 6, "trai')
    write(path, 4, [5, 6], value=2.0)
    assert [(r["iteration"], r["train/lm loss"]) for r in read(path)] == [
        *((i, 1.0) for i in (1, 2, 3, 4, 4)),
        *((i, 2.0) for i in (5, 6)),
    ]


def test_torn_line_within_the_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2')
    write(path, 5, [6])
    assert [r["iteration"] for r in read(path)] == [1, 6]


def test_new_run_keeps_an_older_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for value in (1.0, 2.0, 3.0):
        write(path, 0, [1], value)
    assert read(path)[0]["train/lm loss"] == 3.0
    assert read(tmp_path / "metrics.jsonl.1")[0]["train/lm loss"] == 1.0
    assert read(tmp_path / "metrics.jsonl.2")[0]["train/lm loss"] == 2.0


@pytest.mark.parametrize("line", ["hello", "[1]", "{}"])
def test_going_on_with_a_foreign_file(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 1}}\n{line}\n')
    with pytest.raises(ConfigError, match="line 2"):
        JsonLines(str(path), 5)
    assert line in path.read_text()


def points(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_tensorboard_hides_what_is_repeated(tmp_path):
    config = Config(logging=LoggingConfig(tensorboard_dir=str(tmp_path)))
    for start, iterations, value in ((0, (1, 2, 3, 4), 1.0), (2, (3, 4, 5), 2.0)):
        (sink,) = open_sinks(config, start)
        for iteration in iterations:
            sink.write(iteration, {"train/lm loss": value, "throughput/TFLOP/s per device (causal half)": 1.0})
        sink.flush()
        sink.close()
    assert points(tmp_path, "train/lm loss") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert len(points(tmp_path, "throughput/TFLOP/s per device (causal half)")) == 5


def test_wandb(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, scalars, step):
            calls.append(("log", scalars, step))

        def finish(self):
            calls.append(("finish",))

    def init(**arguments):
        calls.append(("init", arguments))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    folder = tmp_path / "wandb"
    config = Config(
        logging=LoggingConfig(
            wandb_project="p", wandb_exp_name="n", wandb_entity="e", wandb_save_dir=str(folder), log_interval=7
        )
    )
    check_sinks(config)
    (sink,) = open_sinks(config, 3)
    sink.write(4, {"train/lm loss": 1.0})
    sink.flush()
    sink.close()
    (_, arguments), log, finish = calls
    assert {k: arguments[k] for k in ("project", "name", "entity", "dir")} == {
        "project": "p",
        "name": "n",
        "entity": "e",
        "dir": str(folder),
    }
    assert arguments["config"]["logging"]["log_interval"] == 7
    assert log == ("log", {"train/lm loss": 1.0}, 4)
    assert finish == ("finish",)
    assert folder.is_dir()


def test_wandb_missing(monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--wandb-project p(.|\n)*megatron-mup\[wandb\]"):
        check_sinks(Config(logging=LoggingConfig(wandb_project="p")))
    check_sinks(Config())


def test_no_sinks():
    assert open_sinks(Config(), 0) == []
