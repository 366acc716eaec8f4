"""The benchmark of kernels of several makers: on a CPU ours run, and the others say why they can't."""

from __future__ import annotations

import torch

from benchmarks import fused_kernels, train_step


def test_what_is_missing_is_said(lone_mesh, monkeypatch):
    monkeypatch.setitem(train_step.PRESETS, "toy", (16, 1, 2, 1, 32, 1))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _: None)
    calls = []

    def once(call, *_):
        calls.append(call())
        return 1.0

    monkeypatch.setattr(fused_kernels, "milliseconds", once)
    found = fused_kernels.measure("toy", 8, 16, 1, torch.device("cpu"))
    times = {label: value for label, value in found.items() if "," in label}
    missing = {label for label, value in times.items() if value != 1.0}
    assert missing == {
        "AdamW, apex, fp32",
        "AdamW, transformer_engine, fp32",
        "RMSNorm, apex",
        "LayerNorm, apex",
    }
    assert all("needs an NVIDIA GPU" in times[label] for label in missing)
    assert len(calls) == len(times) - len(missing) == 7
