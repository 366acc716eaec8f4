from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_mup.training.plot import loss_curve, smoothed


def write_run(path, steps=300, evaluations=True):
    noise = np.random.default_rng(0).normal(size=steps + 1)
    with open(path, "w") as file:
        for i in range(1, steps + 1):
            loss = 2.2 + 7 * (1 + i / 6) ** -0.8 + 0.06 * noise[i]
            record = {"iteration": i, "train/lm loss": loss, "train/consumed tokens": i * 16384}
            file.write(json.dumps(record) + "\n")
            if evaluations and i % 50 == 0:
                file.write(json.dumps({"iteration": i, "validation/lm loss": 2.27 + 7 * (1 + i / 6) ** -0.8}) + "\n")
        file.write('{"iteration": 9')


@pytest.mark.parametrize(("steps", "evaluations"), [(300, True), (300, False), (1, False)])
def test_a_picture_is_written(tmp_path, steps, evaluations):
    write_run(tmp_path / "m.jsonl", steps, evaluations)
    png = tmp_path / "sub" / "loss.png"
    loss_curve(str(tmp_path / "m.jsonl"), str(png), "a run")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"iteration": 1, "validation/lm loss": 1.0}\n')
    with pytest.raises(ValueError, match="no training step"):
        loss_curve(str(tmp_path / "m.jsonl"), str(tmp_path / "x.png"), "")


def test_smoothing():
    assert np.allclose(smoothed(np.full(500, 3.0)), 3.0)
    steep = 2 + 7 * (1 + np.arange(300) / 6) ** -0.8
    assert np.abs(smoothed(steep) / steep - 1).max() < 0.07
    noise = np.random.default_rng(1).normal(size=2000)
    assert smoothed(noise)[200:].std() < 0.25
