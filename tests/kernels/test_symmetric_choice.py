"""Which of the kernels of symmetric products runs, without any."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_mup.kernels import symmetric


def test_hoppers_kernel_waits_for_no_messages_and_takes_no_gaps(monkeypatch):
    used = []

    def kernels_of(name: str) -> SimpleNamespace:
        return SimpleNamespace(launch=lambda *_: used.append(name))

    monkeypatch.setattr(symmetric, "kernels_of", kernels_of)
    monkeypatch.setattr(symmetric, "kernel_takes", lambda *_: True)
    monkeypatch.setattr(symmetric, "_kernel_of", lambda _: "symmetric_hopper")
    x = torch.zeros(1, 8, 8, dtype=torch.bfloat16)
    for yes in (True, False):
        with symmetric.beside_messages(yes):
            symmetric.symmetric_product(x, x, "rows")
    symmetric.symmetric_product(x, x, "rows")
    part = torch.zeros(1, 8, 16, dtype=torch.bfloat16)[..., :8]
    symmetric.symmetric_product(part, part, "rows")
    assert used == ["symmetric", "symmetric_hopper", "symmetric_hopper", "symmetric"]
