"""The benchmark that puts programs side by side: what can be seen of it without a GPU."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks.side_by_side import Runner, compare, heading, table

YARDSTICK = """
import json, sys
print(json.dumps({"tokens_per_s": 100, "ms_per_step": 5.0, "peak_gib": 1.0, "device": "a toy", "asked": sys.argv[1:]}))
"""


@pytest.mark.long
def test_every_run_is_kept_and_failures_are_rows(tmp_path):
    program, raw = tmp_path / "plain.py", tmp_path / "raw.jsonl"
    program.write_text(YARDSTICK)
    args = argparse.Namespace(yardstick=str(program), peers=["megatron-core"])
    # A flag that there is not: ours fails at once, with its message.
    rows = list(compare("toy", "fp32-master", args, ["--no-such-flag"], Runner(raw)))
    assert [row["who"] for row in rows] == ["yardstick, before", "megatron_mup", "megatron-core", "yardstick, after"]
    assert rows[0]["asked"] == ["--preset", "toy", "--json", "--fp32-master"]
    assert "--main-params-dtype fp32 --no-such-flag" in rows[1]["command"]
    assert "see --help" in rows[1]["error"]
    assert [json.loads(line) for line in raw.read_text().splitlines()] == rows
    assert rows[1]["error"] in table("toy", "fp32-master", rows)
    assert heading(rows).count("One a toy; Python") == 1


def test_ratios_are_to_the_better_run_of_the_yardstick():
    found = [("yardstick, before", 90), ("megatron_mup", 110), ("torchtitan", 0), ("yardstick, after", 100)]
    rows = [{"who": who, "command": "c", "tokens_per_s": speed, "ms_per_step": 1.0} for who, speed in found]
    rows[2] = {"who": "torchtitan", "command": "c", "error": "not installed"}
    lines = table("dense-1b", "bf16", rows).splitlines()
    assert "| megatron_mup | 110 | 1.100 | 1.0 |  |  |" in lines
    assert "| yardstick, before | 90 | 0.900 | 1.0 |  |  |" in lines
    assert "| torchtitan | not installed | | | | |" in lines
