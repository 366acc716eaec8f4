from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from megatron_mup.parametrization.report import format_table, table_rows, to_json
from megatron_mup.parametrization.table import scaling

TOOL = Path(__file__).parents[2] / "tools" / "show_parametrization.py"


@pytest.fixture
def case(grown):
    return grown.change(parametrization={"parametrization": "completep"}, optimizer={"optimizer": "muon"})


@pytest.fixture
def metas(case):
    """Three layers, and the copy of the embedding that a last pipeline stage holds."""
    metas = [replace(m, name=f"{m.name}.{layer}") for m in case.metas.values() for layer in range(3 if m.layer else 1)]
    return [*metas, replace(case.metas["embedding"], name="copy", tied_to="embedding")]


def test_rows_gather_equal_parameters_and_count_each_once(case, metas):
    rows = table_rows(metas, case.config)
    assert [(row["class"], row["count"]) for row in rows] == [
        ("embedding", 1),
        ("position", 1),
        ("norm", 3),
        ("qkv", 3),
        ("bias", 3),
        ("qk norm", 3),
        ("attn out", 3),
        ("mlp in", 3),
        ("mlp out", 3),
        ("final norm", 1),
        ("final bias", 1),
        ("readout", 1),
    ]
    assert sum(row["parameters"] for row in rows) == sum(m.numel for m in metas if m.tied_to is None)
    assert all(row["parameters"] == row["count"] * prod(row["shape"]) for row in rows)


def test_rows_hold_the_tables_numbers(case, metas):
    rows = {row["class"]: row for row in table_rows(metas, case.config)}
    row, m = rows["mlp out"], case.metas["fc2"]
    s = scaling(m, case.config)
    assert (row["shape"], row["fan_in"], row["fan_out"], row["base_ratio"]) == ([1024, 4096], 4096, 1024, 8.0)
    for key in ("init_std", "multiplier", "lr", "weight_decay", "eps", "optimizer"):
        assert row[key] == getattr(s, key)
    assert "CompleteP" in row["source"]


def test_different_shapes_of_one_class_get_their_own_rows(case):
    narrow = replace(case.metas["fc1"], name="narrow", shape=(4096, 1024), fan_out=4096, base_fan_out=512)
    rows = table_rows([case.metas["fc1"], narrow], case.config)
    assert [(row["class"], row["shape"]) for row in rows] == [("mlp in", [8192, 1024]), ("mlp in", [4096, 1024])]


def test_json_holds_full_precision(case, metas):
    rows = table_rows(metas, case.config)
    assert json.loads(to_json(rows)) == rows


def test_text_fits_100_columns_and_is_plain(case, metas):
    wide = replace(
        case.metas["head"], name="wide", shape=(151936, 16384), fan_in=16384, fan_out=151936, base_fan_in=256
    )
    text = format_table(table_rows([*metas, wide], case.config), case.config)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "151936x16384" in text
    for word in ("completep", "width ratio 4", "depth ratio 4, alpha 1", "independent", "attention logits 0.0625"):
        assert word in text
    total = sum(m.numel for m in metas if m.tied_to is None) + 151936 * 16384
    assert f"total: {total:,} parameters in 27 tensors" in text


def test_text_without_configuration_has_no_summary(case, metas):
    text = format_table(table_rows(metas, case.config))
    assert text.rstrip().endswith("tensors")


def run_tool(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *argv], capture_output=True, text=True, check=False)


def test_tool():
    flags = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --parametrization mup --mup-base-hidden-size 32"
    run = run_tool(*flags.split(), "--vocab-size", "100", "--json")
    assert run.returncode == 0, run.stderr
    rows = {row["class"]: row for row in json.loads(run.stdout)}
    assert rows["qkv"]["count"] == 4
    assert rows["qkv"]["base_ratio"] == 2.0
    assert rows["embedding"]["shape"] == [100, 64]

    without_vocabulary = run_tool(*flags.split())
    assert without_vocabulary.returncode == 2
    assert "--vocab-size" in without_vocabulary.stderr
