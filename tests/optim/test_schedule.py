from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_mup.config import Config, ConfigError, OptimizerConfig, ScheduleConfig, TrainingConfig
from megatron_mup.optim.schedule import LRSchedule

LR, MIN = 2e-3, 2e-4


def schedule(style: str, lr: float = LR, min_lr: float = MIN, samples: bool = False, **fields: object) -> LRSchedule:
    training = TrainingConfig(train_samples=1000) if samples else TrainingConfig(train_iters=100)
    config = Config(
        optimizer=OptimizerConfig(lr=lr, min_lr=min_lr),
        schedule=ScheduleConfig(lr_decay_style=style, **fields),  # type: ignore[arg-type]
        training=training,
    )
    return LRSchedule.from_config(config, global_batch_size=8)


def megatron(style: str, n: int, *, warmup: float, length: int, tail: int = 0, tail_style: str = "", init: float = 0.0):
    """Learning rate after n steps, branch by branch as Megatron-LM documents it."""
    if warmup > 0 and n <= warmup:
        return init + (LR - init) * n / warmup
    if style == "constant":
        return LR
    if n > length:
        return MIN
    if style == "inverse-square-root":
        return max(MIN, LR * warmup**0.5 / n**0.5)
    r = (n - warmup) / (length - warmup)
    if style == "linear":
        c = 1 - r
    elif style == "cosine":
        c = (1 + math.cos(math.pi * r)) / 2
    else:
        r = max(0.0, (n - (length - tail)) / tail)
        c = {
            "linear": 1 - r,
            "cosine": (1 + math.cos(math.pi * r)) / 2,
            "exponential": 2 * 0.5**r - 1,
            "minus_sqrt": 1 - math.sqrt(r),
        }[tail_style]
    return MIN + c * (LR - MIN)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root"])
@pytest.mark.parametrize("init", [0.0, 1e-4])
def test_plain_styles(style, init):
    s = schedule(style, lr_warmup_iters=10, lr_decay_iters=80, lr_warmup_init=init)
    for n in range(100):
        want = megatron(style, n, warmup=10, length=80, init=init)
        assert s.factor(n) * LR == pytest.approx(want, rel=1e-12, abs=1e-18), n


@pytest.mark.parametrize("tail_style", ["exponential", "linear", "cosine", "minus_sqrt"])
def test_wsd(tail_style):
    s = schedule("WSD", lr_warmup_iters=10, lr_wsd_decay_iters=30, lr_wsd_decay_style=tail_style)
    for n in range(120):
        want = megatron("WSD", n, warmup=10, length=100, tail=30, tail_style=tail_style)
        assert s.factor(n) * LR == pytest.approx(want, rel=1e-12), n
    assert s.factor(10) == s.factor(70) == 1.0
    assert s.factor(71) < 1.0
    assert s.factor(100) == pytest.approx(MIN / LR)


def test_edges():
    s = schedule("linear", lr_warmup_iters=10, min_lr=0.0)
    assert s.factor(0) == 0.0
    assert s.factor(10) == 1.0
    assert s.factor(100) == s.factor(101) == 0.0
    assert schedule("linear").factor(0) == 1.0
    assert schedule("cosine").factor(50) == pytest.approx((1 + MIN / LR) / 2)
    assert schedule("WSD", lr_wsd_decay_iters=50, min_lr=0.0).factor(75) == pytest.approx(math.sqrt(2) - 1)


def test_fraction_of_warmup_may_end_between_steps():
    s = schedule("cosine", lr_warmup_fraction=0.025)
    assert s.factor(2) == pytest.approx(0.8)
    assert s.factor(3) == pytest.approx(megatron("cosine", 3, warmup=2.5, length=100) / LR)


def test_samples():
    s = schedule("cosine", samples=True, lr_warmup_samples=100, lr_decay_samples=900)
    for n in (0, 50, 100, 500, 900, 950):
        assert s.factor(n) * LR == pytest.approx(megatron("cosine", n, warmup=100, length=900))


def test_power_leaves_the_peak_where_warmup_ends():
    s = schedule("power", lr_warmup_iters=10, min_lr=0.0)
    assert s.factor(5) == 0.5
    assert s.factor(10) == pytest.approx(1.0)
    assert s.factor(90) == pytest.approx(9**-0.51)
    assert schedule("power", lr_warmup_iters=10, min_lr=LR / 2).factor(90) == 0.5


def test_power_scale_counts_samples_in_either_unit():
    fields = {"min_lr": 0.0, "lr_power_scale": 5.0, "lr_power_exponent": -0.5}
    iterations = schedule("power", lr_warmup_iters=5, **fields)
    samples = schedule("power", samples=True, lr_warmup_samples=40, **fields)
    for n in (0, 3, 5, 20, 100):
        assert iterations.factor(n) == pytest.approx(samples.factor(8 * n))
    assert iterations.factor(20) == pytest.approx(5 / math.sqrt(160))
    assert iterations.factor(5) == pytest.approx(5 / math.sqrt(40)), "warm-up ends on the curve, below the peak"


def test_power_with_a_tail():
    s = schedule("power", lr_warmup_iters=10, lr_wsd_decay_iters=20, lr_wsd_decay_style="linear", min_lr=0.0)
    assert s.factor(80) == pytest.approx(8**-0.51)
    assert s.factor(90) == pytest.approx(8**-0.51 / 2)
    assert s.factor(100) == 0.0


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD", "power"])
def test_always_between_0_and_1(style):
    s = schedule(style, lr_warmup_iters=7, lr_wsd_decay_iters=9)
    assert all(0.0 <= s.factor(n) <= 1.0 for n in range(130))


@pytest.mark.parametrize(
    ("style", "fields", "says"),
    [
        ("WSD", {}, "--lr-wsd-decay-iters"),
        ("cosine", {"lr_warmup_iters": 100}, "warm-up"),
        ("cosine", {"lr_warmup_fraction": 1.5}, "warm-up"),
        ("WSD", {"lr_warmup_iters": 50, "lr_wsd_decay_iters": 60}, "remain after warm-up"),
        ("cosine", {"min_lr": 1.0}, "--min-lr"),
        ("cosine", {"lr_warmup_init": 1.0}, "--lr-warmup-init"),
        ("power", {}, "--lr-power-scale"),
    ],
)
def test_lengths_that_dont_fit(style, fields, says):
    with pytest.raises(ConfigError, match=says):
        schedule(style, **fields)


def test_no_length():
    with pytest.raises(ConfigError, match="--train-iters"):
        LRSchedule.from_config(replace(Config(), training=TrainingConfig()), 8)
