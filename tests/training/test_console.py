from __future__ import annotations

import io
import re
import sys
from dataclasses import replace

import pytest
from rich.console import Console as RichConsole

from megatron_mup.config import Config, LoggingConfig
from megatron_mup.training.console import Interval, LogLines, ProgressBar, open_console, short

INTERVAL = Interval(
    iteration=20,
    consumed_samples=640,
    batch_size=32,
    loss=3.14159,
    grad_norm=0.5,
    learning_rates={"embedding": 3e-3, "qkv": 1e-3, "mlp_in": 2e-3},
    step_seconds=1.5,
    tokens_per_s=24680.0,
    tokens_per_s_per_device=12340.0,
    tflops={"causal half": 343.0, "causal full": 386.0},
    mfu={"causal half": 0.347, "causal full": 0.39},
)


def test_log_line(capsys):
    console = LogLines(100)
    console.advance(20)
    console.interval(INTERVAL)
    console.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration       20/     100 \| ", line)
    for part in (
        "consumed samples:          640",
        "elapsed time per iteration (ms): 1500.0",
        "tokens/s per device: 12340.0",
        "TFLOP/s per device (causal half): 343.0 | TFLOP/s per device (causal full): 386.0",
        "MFU (causal half): 34.7% | MFU (causal full): 39.0%",
        "learning rate: 1.000000E-03 to 3.000000E-03",
        "global batch size:    32",
        "lm loss: 3.141590E+00",
        "grad norm: 0.500",
        "time left: 0:02:00 |",
    ):
        assert f"| {part}" in line


def test_small_models_have_digits(capsys):
    LogLines(100).interval(replace(INTERVAL, tflops={"causal half": 0.0021649}, mfu={"causal half": 0.000012345}))
    line = capsys.readouterr().out
    assert "TFLOP/s per device (causal half): 0.00216 | MFU (causal half): 0.00123% |" in line


def test_log_line_of_one_learning_rate_without_peak(capsys):
    LogLines(100).interval(replace(INTERVAL, learning_rates={"a": 1e-3, "b": 1e-3}, mfu={}))
    line = capsys.readouterr().out
    assert "learning rate: 1.000000E-03 |" in line
    assert "MFU" not in line


def test_log_line_of_an_evaluation(capsys):
    LogLines(100).evaluation(40, "validation", {"lm loss": 2.5, "perplexity": 12.182494})
    assert (
        "] iteration       40/     100 | validation lm loss: 2.500000 | validation perplexity: 12.182494 |"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("width", [80, 140])
def test_bar(width):
    file = io.StringIO()
    console = ProgressBar(100, 10, RichConsole(file=file, force_terminal=True, width=width, color_system=None))
    console.advance(20)
    console.interval(INTERVAL)
    console.evaluation(20, "validation", {"lm loss": 2.5, "bits per byte": 1.75})
    console.message("[not markup] saved")
    console.close()
    shown = file.getvalue()
    last = [line for line in re.split(r"[\r\n]", shown) if "/100" in line][-1]
    assert "validation lm loss: 2.500000 | validation bits per byte: 1.750000" in shown
    assert "[not markup] saved" in shown
    for part in ("20/100", "loss 3.142", "val 2.500", "24.7k tokens/s", "ETA 0:02:00"):
        assert part in last, last


def test_bar_only_on_a_terminal(monkeypatch):
    config = Config()
    assert isinstance(open_console(config, 10, 0), LogLines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    bar = open_console(config, 10, 0)
    assert isinstance(bar, ProgressBar)
    bar.close()
    assert isinstance(open_console(Config(logging=LoggingConfig(progress=False)), 10, 0), LogLines)


def test_short():
    assert [short(n) for n in (7.0, 950.0, 12345.0, 4.56e6, 2e9)] == ["7", "950", "12.3k", "4.56M", "2G"]
