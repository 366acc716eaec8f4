"""Every layout computes what one rank computes. The release gate."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.parity import cases

RECOMPUTE = {"": "", "full": "--recompute-granularity full", "selective": "--recompute-granularity selective"}
DAILY = set(cases.LAYOUTS) - {"tp2", "pp2-fsdp2", "tp2-pp2-dp2"}
"""What of `test_layout_matches_one_rank` is in `make test`: axes and pairs of them that no other test there has."""
DAILY_FEATURES = {("pp2", "full")}
"""What of `test_other_features` is in `make test`."""
LOSS_TOLERANCE = {"adam": 1e-5} | {name: 1e-4 for name in cases.OPTIMIZERS if name != "adam"}

COMBINATIONS = cases.combinations()
MATRIX = [
    pytest.param(
        layout,
        scheme,
        optimizer,
        id=f"{layout}-{scheme}-{optimizer}",
        # One combination per layout in `make test`; schemes, AdamW and Muon take turns.
        marks=() if number < 6 and (number + place) % 6 == 0 and layout in DAILY else pytest.mark.long,
    )
    for place, layout in enumerate(cases.LAYOUTS)
    for number, (scheme, optimizer) in enumerate(COMBINATIONS)
]


@pytest.fixture(scope="session")
def reference(pool):
    """What one rank computes, by flags."""

    @functools.cache
    def run(*flags: str):
        return pool.run(1, cases.observe, cases.config_of(*flags))[0]

    return run


def assert_parity(seen, expected, optimizer):
    assert seen["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert torch.equal(seen["weights"][name], value), f"initial {name} differs"
    first, first_expected = seen["losses"][0], expected["losses"][0]
    torch.testing.assert_close(first, first_expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(seen["grad_norm"], expected["grad_norm"], rtol=1e-5, atol=0)
    assert seen["grads"].keys() == expected["grads"].keys()
    # Gradients that are zero in truth have no relative error: a floor far below the whole gradient.
    floor = 1e-7 * expected["grad_norm"]
    for name, value in expected["grads"].items():
        error = (seen["grads"][name] - value).norm()
        assert error <= 1e-5 * value.norm() + floor, f"gradient of {name}: {error / value.norm():.2e}"
    rtol = LOSS_TOLERANCE[optimizer]
    torch.testing.assert_close(seen["losses"], expected["losses"], rtol=rtol, atol=0)
    torch.testing.assert_close(seen["eval"], expected["eval"], rtol=rtol, atol=0)


def compare(pool, reference, case, flags, optimizer):
    config = cases.with_layout(cases.config_of(*flags), case)
    assert_parity(pool.run(case.ranks, cases.observe, config)[0], reference(*flags), optimizer)


@pytest.mark.parametrize(("layout", "scheme", "optimizer"), MATRIX)
def test_layout_matches_one_rank(pool, reference, layout, scheme, optimizer):
    flags = (cases.SCHEMES[scheme], cases.OPTIMIZERS[optimizer])
    compare(pool, reference, cases.LAYOUTS[layout], flags, optimizer)


@pytest.mark.long
def test_twenty_steps_of_muon(pool):
    """Rounding has time to grow: Newton-Schulz turns a difference of 1e-6 into one of 1e-2 in small directions."""
    config, case = cases.config_of(cases.OPTIMIZERS["muon"]), cases.LAYOUTS["tp2-fsdp2"]
    want = pool.run(1, cases.observe, config, 20)[0]
    seen = pool.run(case.ranks, cases.observe, cases.with_layout(config, case), 20)[0]
    torch.testing.assert_close(seen["losses"], want["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(seen["eval"], want["eval"], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        pytest.param(name, recompute, marks=() if (name, recompute) in DAILY_FEATURES else pytest.mark.long)
        for name in cases.LAYOUTS
        for recompute in RECOMPUTE
    ],
)
def test_other_features(pool, reference, layout, recompute):
    """Dropout, document masks, biases, learned positions, untied head, z-loss, recomputation."""
    case = cases.LAYOUTS[layout]
    config = cases.with_layout(cases.config_of(cases.FEATURES, RECOMPUTE[recompute]), case)
    assert_parity(pool.run(case.ranks, cases.observe, config)[0], reference(cases.FEATURES), "adam")


@pytest.mark.parametrize(
    "layout", ["tp2", *(pytest.param(name, marks=pytest.mark.long) for name in ("tp2-sp", "pp2", "fsdp2"))]
)
def test_output_layer_and_loss_in_one(pool, reference, layout):
    """Over chunks that don't divide the tokens, with z-loss, against the two of them on one rank."""
    flags = (cases.FEATURES, "--cross-entropy-fusion-impl linear --loss-chunk-size 6")
    case = cases.LAYOUTS[layout]
    seen = pool.run(case.ranks, cases.observe, cases.with_layout(cases.config_of(*flags), case))[0]
    assert_parity(seen, reference(cases.FEATURES), "adam")


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        pytest.param(s, layout, marks=() if (s, layout) == ("umup", "pp2") else pytest.mark.long)
        for s in cases.UNIT_SCALED
        for layout in cases.UNIT_SCALED_LAYOUTS
    ],
)
def test_unit_scaled_layouts(pool, reference, scheme, layout):
    flags = (cases.UNIT_SCALED[scheme], "--hidden-dropout 0.1 --attention-dropout 0.1")
    compare(pool, reference, cases.LAYOUTS[layout], flags, "adam")


def test_recompute_changes_nothing_on_one_rank(pool, reference):
    for flags in filter(None, RECOMPUTE.values()):
        seen = pool.run(1, cases.observe, cases.config_of(cases.FEATURES, flags), 3)[0]
        assert torch.equal(seen["losses"], reference(cases.FEATURES)["losses"][:3]), "to the bit, so few steps tell"


@pytest.mark.parametrize(
    ("scheme", "optimizer"),
    [pytest.param(*kind, marks=() if number < 6 else pytest.mark.long) for number, kind in enumerate(COMBINATIONS)],
)
def test_training_learns(reference, scheme, optimizer):
    """A reference that stood still would be easy to match."""
    losses = reference(cases.SCHEMES[scheme], cases.OPTIMIZERS[optimizer])["losses"]
    assert losses[-1] < losses[0] - 0.05
