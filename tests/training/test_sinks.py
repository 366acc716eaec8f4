from __future__ import annotations

import json
import math
import re
import socket
import sys
import urllib.request
from types import SimpleNamespace

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from megatron_mup.config import Config, ConfigError, LoggingConfig, from_dict
from megatron_mup.training import sinks
from megatron_mup.training.about import about_run
from megatron_mup.training.prometheus import Prometheus, metric_of
from megatron_mup.training.sinks import JsonLines, check_sinks, open_sinks
from tests.runs import pretrain, words


def about(config=None):
    mesh = SimpleNamespace(device=torch.device("cpu"), world=SimpleNamespace(size=lambda: 2))
    return about_run(config or Config(), mesh)


def read(path):
    """Records without the lines of starts."""
    return [record for line in path.read_text().splitlines() if "run" not in (record := json.loads(line))]


def starts(path):
    return [record for line in path.read_text().splitlines() if "run" in (record := json.loads(line))]


def write(path, start, iterations, value=1.0):
    sink = JsonLines(str(path), start, about())
    for iteration in iterations:
        sink.write(iteration, {"train/lm loss": value})
    sink.close()


def test_json_lines(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonLines(str(path), 0, about())
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
    assert [record["iteration"] for record in starts(path)] == [0, 4]
    assert from_dict(starts(path)[1]["run"]["configuration"], "record") == Config()


def test_torn_line_within_the_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2')
    write(path, 5, [6])
    assert [r["iteration"] for r in read(path)] == [1, 6]
    assert starts(path)[0]["iteration"] == 5


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
        JsonLines(str(path), 5, about())
    assert line in path.read_text()


def points(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_tensorboard_hides_what_is_repeated(tmp_path):
    config = Config(logging=LoggingConfig(tensorboard_dir=str(tmp_path)))
    for start, iterations, value in ((0, (1, 2, 3, 4), 1.0), (2, (3, 4, 5), 2.0)):
        (sink,) = open_sinks(config, start, about(config))
        for iteration in iterations:
            sink.write(iteration, {"train/lm loss": value, "throughput/TFLOP/s per device (causal half)": 1.0})
        sink.flush()
        sink.close()
    assert points(tmp_path, "train/lm loss") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert len(points(tmp_path, "throughput/TFLOP/s per device (causal half)")) == 5


def test_tensorboard_has_charts_and_the_configuration(tmp_path):
    config = Config(logging=LoggingConfig(tensorboard_dir=str(tmp_path), log_interval=7))
    (sink,) = open_sinks(config, 0, about(config))
    sink.write(1, {"train/lm loss": 1.0})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (text,) = events.Tensors("run/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    found = yaml.safe_load(shown.removeprefix("```yaml\n").removesuffix("```"))
    assert from_dict(found["configuration"], "text") == config
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for category in layout.category for chart in category.chart}
    names = ["train/lm loss", "validation/lm loss", "test/lm loss", "train/lm loss of another"]
    assert [any(re.match(tag, n) for tag in charts["loss (nats per token)"]) for n in names] == [True] * 3 + [False]


class WandbRun:
    def __init__(self):
        self.calls = []

    def define_metric(self, name, **arguments):
        self.calls.append(("define", name, arguments))

    def log(self, scalars):
        self.calls.append(("log", scalars))

    def finish(self):
        self.calls.append(("finish",))


def test_wandb(tmp_path, monkeypatch):
    run, given = WandbRun(), {}

    def init(**arguments):
        given.update(arguments)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    folder = tmp_path / "wandb"
    config = Config(
        logging=LoggingConfig(
            wandb_project="p", wandb_exp_name="n", wandb_entity="e", wandb_save_dir=str(folder), log_interval=7
        )
    )
    check_sinks(config)
    (sink,) = open_sinks(config, 3, about(config))
    sink.write(4, {"train/lm loss": 1.0})
    sink.flush()
    sink.close()
    wanted = {"project": "p", "name": "n", "entity": "e", "dir": str(folder)}
    assert {name: given[name] for name in wanted} == wanted
    assert given["config"]["logging"]["log_interval"] == 7
    assert given["config"]["run"]["ranks"] == 2
    assert ("define", "*", {"step_metric": "iteration"}) in run.calls
    assert run.calls[-2:] == [("log", {"iteration": 4, "train/lm loss": 1.0}), ("finish",)]
    assert folder.is_dir()


@pytest.mark.parametrize(("flags", "extra"), [("--wandb-project p", "wandb"), ("--prometheus-port 9400", "prometheus")])
def test_a_missing_package_ends_the_run_before_it_starts(monkeypatch, flags, extra):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    outcome = pretrain(words(flags))
    assert outcome.code == 2
    assert flags in outcome.err
    assert f"megatron-mup[{extra}]" in outcome.err
    check_sinks(Config())


def fetched(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_prometheus_shows_the_latest_values_until_it_closes():
    pytest.importorskip("prometheus_client")
    sink = Prometheus(0, about())
    try:
        sink.write(1, {"train/lm loss": 3.0, "lr/qkv": 0.5, "lr/mlp_in": 0.25})
        sink.write(2, {"train/left out": 1.0, "lr/qkv": 0.125})
        sink.write(3, {"train/lm loss": math.nan})
        found = fetched(sink.port)
    finally:
        sink.close()
    assert found["megatron_mup_iteration"] == "3.0"
    assert found["megatron_mup_train_lm_loss"] == "NaN"
    assert found['megatron_mup_lr{class="qkv"}'] == "0.125"
    assert found['megatron_mup_lr{class="mlp_in"}'] == "0.25"
    assert found["megatron_mup_train_left_out_total"] == "1.0"
    assert any(line.startswith("megatron_mup_run_info{") and torch.__version__ in line for line in found)
    with pytest.raises(OSError, match="refused"):
        fetched(sink.port)


@pytest.mark.parametrize(
    ("name", "metric", "labels"),
    [
        ("throughput/TFLOP/s per device (causal half)", "throughput_TFLOP_s_per_device_causal_half", {}),
        ("moe/layer 3/z loss", "moe_layer_z_loss", {"layer": "3"}),
        ("moe/layer 3/tokens of expert 5", "moe_layer_tokens_of_expert", {"layer": "3", "expert": "5"}),
        ("diagnostics/activation rms/qkv", "diagnostics_activation_rms", {"class": "qkv"}),
        ("diagnostics/head norm", "diagnostics_head_norm", {}),
    ],
)
def test_names_for_prometheus(name, metric, labels):
    assert metric_of(name) == (f"megatron_mup_{metric}", labels)


def test_a_port_that_is_taken():
    pytest.importorskip("prometheus_client")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--prometheus-port {port}(.|\n)*another port"):
            Prometheus(port, about())


def test_no_sinks():
    assert open_sinks(Config(), 0, about()) == []
