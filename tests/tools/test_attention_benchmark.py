"""The benchmark of attention kernels, on a CPU with a clock that stands still."""

import torch

from benchmarks import attention


def test_rows_have_errors_against_the_formula(monkeypatch):
    monkeypatch.setattr(attention, "milliseconds", lambda call, _: len(call()))
    rows = attention.measure("toy", ["unfused", "flash4"], 16, 1, torch.device("cpu"))
    assert [row["backend"] for row in rows] == ["unfused", "flash4"]
    assert all(0 < error < 0.02 for error in rows[0]["errors"].values())
    assert "sees none" in rows[1]["error"]
