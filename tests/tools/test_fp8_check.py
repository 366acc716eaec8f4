"""The FP8 check: the model's shapes, and what it makes of timings (which only a GPU can take)."""

from __future__ import annotations

import json

import pytest

from tools import fp8_check
from tools.fp8_check import Shape

MODEL = (
    "--num-layers 3 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 96 --swiglu "
    "--vocab-size 100 --seq-length 32 --micro-batch-size 2 --tensor-model-parallel-size 2"
)
# Queries, keys and values of 2 heads and 1 group; gate and up of 48 channels.
SHAPES = {Shape(64, 64, 64): 3, Shape(64, 64, 32): 3, Shape(64, 96, 64): 3, Shape(64, 64, 48): 3}
TIMES = {shape: {"bf16": 2.0, "static": 1.0, "delayed": 4.0} for shape in SHAPES}


def test_without_fp8_it_says_so_and_shows_the_shapes(capsys):
    assert fp8_check.main(MODEL.split()) == 3
    out = capsys.readouterr().out
    assert "This machine has no FP8 (no GPU)" in out
    assert all(f"{count:6}  {shape}\n" in out for shape, count in SHAPES.items())


def test_a_mistake(capsys):
    assert fp8_check.main([*MODEL.split(), "--num-attention-heads", "5"]) == 2
    assert "5 heads" in capsys.readouterr().err


@pytest.fixture
def fp8_machine(monkeypatch):
    monkeypatch.setattr(fp8_check, "device_has_fp8", lambda _device: True)
    monkeypatch.setattr(fp8_check.torch.cuda, "get_device_name", lambda: "a GPU")


def test_verdict(fp8_machine, monkeypatch, capsys):
    monkeypatch.setattr(fp8_check, "timed", lambda _counts, _device: TIMES)
    assert fp8_check.main([*MODEL.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speedup"] == {"delayed": 0.5, "static": 2.0}
    assert fp8_check.main(MODEL.split()) == 0
    assert "Fastest: static, 2.00 times bf16" in capsys.readouterr().out
    slow = {shape: {"bf16": 2.0, "delayed": 4.0} for shape in SHAPES}
    monkeypatch.setattr(fp8_check, "timed", lambda _counts, _device: slow)
    assert fp8_check.main(MODEL.split()) == 1
    assert "No recipe is faster" in capsys.readouterr().out


def test_layers_count_by_their_number():
    """A shape that FP8 can't take stays as it is in bf16."""
    one, other = Shape(16, 16, 16), Shape(16, 24, 16)
    times = {one: {"bf16": 3.0, "static": 1.0}, other: {"bf16": 2.0}}
    assert fp8_check.speedups({one: 2, other: 1}, times) == {"static": pytest.approx(8 / 4)}
