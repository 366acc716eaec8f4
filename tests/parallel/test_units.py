"""What FSDP2 gathers and reduces by itself."""

from __future__ import annotations

import pytest

from tests.runs import config_of, model_of

UNTIED = "--untie-embeddings-and-output-weights"
EVEN = "--make-vocab-size-divisible-by 1"


@pytest.mark.parametrize(
    ("flags", "apart"),
    [
        (f"{UNTIED} {EVEN}", True),
        (EVEN, False),  # its weight is the embedding's
        (UNTIED, False),  # rows of padding: its result is a view
        (f"{UNTIED} {EVEN} --cross-entropy-loss-fusion --cross-entropy-fusion-impl linear", False),  # is no module then
    ],
)
def test_the_output_layer_is_a_unit_where_it_can_be(flags, apart):
    model = model_of(config_of(flags))
    assert model.heads() == ([model.output_layer] if apart else [])
