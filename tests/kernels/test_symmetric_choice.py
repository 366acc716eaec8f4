"""Which of the kernels of symmetric products runs, and how, without any."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_mup.kernels import symmetric


def test_hoppers_kernel_beside_messages(monkeypatch):
    used = []

    def kernels_of(name: str) -> SimpleNamespace:
        return SimpleNamespace(launch=lambda _, **options: used.append((name, options)))

    monkeypatch.setattr(symmetric, "kernels_of", kernels_of)
    monkeypatch.setattr(symmetric, "kernel_takes", lambda *_: True)
    x = torch.zeros(1, 8, 8, dtype=torch.bfloat16)
    for kernel in ("symmetric_hopper", "symmetric"):
        monkeypatch.setattr(symmetric, "_kernel_of", lambda *_, kernel=kernel: kernel)
        for yes in (True, False):
            with symmetric.beside_messages(yes):
                symmetric.symmetric_product(x, x, "rows")
    assert used == [
        ("symmetric_hopper", {"one_each": True}),
        ("symmetric_hopper", {}),
        ("symmetric", {}),
        ("symmetric", {}),
    ]


@pytest.mark.parametrize(
    ("matrices", "n", "few"),
    [
        (1, 2048, True),  # 136 cells, 16 on the diagonal
        (1, 1920, False),  # 120
        (1, 2176, False),  # 153, 17 on the diagonal: four too many
        (2, 2048, False),
        (2, 1408, False),  # 132
        (3, 1100, True),  # 135, 27 on diagonals
    ],
)
def test_just_more_cells_than_multiprocessors(matrices, n, few):
    assert symmetric.just_more_cells(matrices, n, 132) is few
