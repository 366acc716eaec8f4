"""The three forms of muP are one training: initial values, factors, learning rate, decay and epsilon shift together."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from megatron_mup.parametrization import table
from megatron_mup.parametrization.schemes import SCHEMES, Kind
from tests.runs import batch_of, config_of, step_of, values

STEPS = 20
MODEL = (
    "--num-layers 3 --hidden-size 32 --num-attention-heads 4 --kv-channels 8 --num-query-groups 2 --swiglu "
    "--mup-base-hidden-size 8 --mup-base-head-dim 4 --base-num-layers 1 "
    # Epsilon and decay large enough to show; clipping would see each form's own gradients.
    "--lr 1e-2 --weight-decay 1 --decay-embeddings --adam-eps 1e-3 --clip-grad 0"
)
UNTIED = "--untie-embeddings-and-output-weights"


def trained(mesh, *flags):
    """Losses of the steps and logits after them."""
    config = config_of(MODEL, *flags)
    step = step_of(config, mesh)
    losses = torch.stack([step(batch_of(config, number), 1.0).loss for number in range(STEPS)])
    with torch.no_grad():
        return losses, step.model(batch_of(config, STEPS)["tokens"]), values(step)


def same(one, other) -> bool:
    """Losses and logits within 1e-4."""
    apart = (one[1] - other[1]).norm() / other[1].norm()
    return torch.allclose(one[0], other[0], rtol=1e-4, atol=0) and apart.item() < 1e-4


@pytest.mark.parametrize("scheme", ["mup", "depth-mup", "completep"])
@pytest.mark.parametrize("rule", ["independent", "coupled"])
def test_forms_train_alike(lone_mesh, scheme, rule):
    flags = (f"--parametrization {scheme} --weight-decay-rule {rule}", UNTIED)
    a, b, c = (trained(lone_mesh, *flags, f"--mup-form {form}") for form in "ABC")
    assert b[0][-1] < b[0][0] - 0.1
    assert same(a, b)
    assert same(c, b)
    # Stored weights do differ, by the form's factor: 4 of width ratio in A, its root in C.
    head, table_ = "output_layer.weight", "embedding.word_embeddings.weight"
    torch.testing.assert_close(a[2][head] * 4, b[2][head], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(c[2][head] * 2, b[2][head], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(c[2][table_] * 2, b[2][table_], rtol=1e-3, atol=1e-5)


def test_tied_form_c_trains_like_b(lone_mesh):
    b, c = (trained(lone_mesh, f"--parametrization mup --mup-form {form}") for form in "BC")
    assert same(c, b)


def test_forms_train_alike_under_muon(lone_mesh):
    flags = ("--parametrization completep --optimizer muon --muon-lr 0.02", UNTIED)
    a, b, c = (trained(lone_mesh, *flags, f"--mup-form {form}") for form in "ABC")
    assert same(a, b)
    assert same(c, b)


@pytest.mark.parametrize("cell", ["init", "lr_width", "eps"])
@pytest.mark.parametrize("form", ["A", "C"])
def test_each_part_of_the_shift_is_seen(lone_mesh, monkeypatch, form, cell):
    """A head whose initial value, learning rate (with decay) or epsilon doesn't shift trains otherwise."""
    flags = ("--parametrization mup", UNTIED)
    b = trained(lone_mesh, *flags)
    name = f"mup {form}"
    row = SCHEMES[name].rows[Kind.READOUT]
    was, stored = getattr(row, cell), row.stored
    undo = (lambda r: was(r) * stored(r)) if cell == "eps" else (lambda r: was(r) / stored(r))
    rows = {**SCHEMES[name].rows, Kind.READOUT: replace(row, **{cell: undo})}
    monkeypatch.setattr(
        table, "SCHEMES", MappingProxyType({**SCHEMES, name: replace(SCHEMES[name], rows=MappingProxyType(rows))})
    )
    assert not same(trained(lone_mesh, *flags, f"--mup-form {form}"), b)
