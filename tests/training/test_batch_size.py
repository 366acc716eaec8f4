from __future__ import annotations

import pytest

from megatron_mup.config import Config, ConfigError, TrainingConfig
from megatron_mup.training.batch_size import BatchSizeRamp


def ramp(rampup: tuple[int, int, int] | None, full: int | None, micro: int = 1, dp: int = 1) -> BatchSizeRamp:
    training = TrainingConfig(micro_batch_size=micro, global_batch_size=full, rampup_batch_size=rampup)
    return BatchSizeRamp(Config(training=training), dp)


def test_constant():
    r = ramp(None, None, micro=2, dp=3)
    assert r.full == 6
    assert r.global_batch_size(0) == r.global_batch_size(10**9) == 6
    assert r.samples_after(7) == 42
    assert r.iterations_within(41) == 6


def test_stages_as_in_megatron():
    r = ramp((16, 8, 100), 48)  # 4 stages of 25 samples
    for consumed in range(101):
        assert r.global_batch_size(consumed) == 16 + 8 * int(consumed / 25)
    assert r.global_batch_size(24) == 16
    assert r.global_batch_size(25) == 24
    assert r.global_batch_size(99) == 40
    assert r.global_batch_size(100) == r.global_batch_size(101) == 48


def test_conversions_agree_with_stepping():
    r = ramp((4, 4, 70), 16)
    consumed = 0
    for iteration in range(40):
        assert r.samples_after(iteration) == consumed
        for extra in range(r.global_batch_size(consumed)):
            assert r.iterations_within(consumed + extra) == iteration
        consumed += r.global_batch_size(consumed)


def test_degenerate_ramps():
    assert ramp((8, 4, 50), 8).global_batch_size(10) == 8
    assert ramp((4, 4, 0), 8).global_batch_size(0) == 8


@pytest.mark.parametrize(
    ("rampup", "full", "micro", "dp"),
    [
        (None, 10, 2, 2),
        ((2, 4, 100), 18, 2, 2),  # start
        ((4, 2, 100), 8, 2, 2),  # a stage between
        ((4, 3, 100), 8, 1, 1),  # never arrives
        ((16, 4, 100), 8, 1, 1),  # shrinks
        ((4, 0, 100), 8, 1, 1),
    ],
)
def test_sizes_that_dont_fit(rampup, full, micro, dp):
    with pytest.raises(ConfigError):
        ramp(rampup, full, micro, dp)
