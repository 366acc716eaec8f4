"""The step benchmark on a CPU: what it prints hangs together."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.train_step import PRESETS, measure, preset
from benchmarks.variants import VARIANTS, table
from megatron_mup.config import parse_config, validate

SMALL = "--no-torch-compile --seq-length 32 --vocab-size 64 --micro-batch-size 1 --global-batch-size 2"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    parsed = parse_config(preset(name))
    assert validate(parsed.config, 1, parsed.explicit) == []


def test_phases_and_trace(lone_mesh, tmp_path):
    config = parse_config([*preset("toy"), *SMALL.split()]).config
    found = measure(config, 2, torch.device("cpu"), str(tmp_path / "trace.json"))
    phases = found["phases_ms"]
    assert set(phases) == {"forward-backward", "forward", "backward", "gradients", "optimizer"}
    assert min(phases.values()) > 0
    assert phases["forward"] + phases["backward"] == pytest.approx(phases["forward-backward"], abs=0.02)
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "aten::mm" in names


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_valid(name):
    parsed = parse_config([*preset("dense-1b"), *VARIANTS[name].split()])
    assert validate(parsed.config, 1, parsed.explicit) == []


def test_table_of_variants():
    found = {"tokens_per_s": 50, "phases_ms": {"forward": 1.5}}
    rows = [("bf16", found), ("fast", found | {"tokens_per_s": 75, "mfu_causal_half": 0.5}), ("bad", {"error": "boom"})]
    assert table(rows).splitlines()[2:] == [
        "| bf16 | 50 | 1.000 |  |  | forward 1.5 |",
        "| fast | 75 | 1.500 | 50.0% |  | forward 1.5 |",
        "| bad | failed: boom | | | | |",
    ]
