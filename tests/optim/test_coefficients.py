from __future__ import annotations

import pytest
import torch

from megatron_mup.optim.coefficients import NAMES, best_quintic, coefficient_schedule, generate

# arXiv 2505.16932, and microsoft/dion (the same made for 1.02 times the interval); what emerging-optimizers calls CANS.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
DION = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
ROUNDED = ((8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250), (3.2856, -2.4153, 0.4853))


def close(got, want, tolerance):
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance)


def value(schedule, x: torch.Tensor) -> torch.Tensor:
    for a, b, c in schedule:
        x = a * x + b * x**3 + c * x**5
    return x


def test_generated_sets_are_the_published_ones():
    close(generate(1e-3, 7), POLAR_EXPRESS, 1e-10)
    close(generate(1e-3, 5, cushion=0.02, safety=1.02), DION, 1e-10)
    close(coefficient_schedule("cans", 5), CANS, 5.1e-5)
    close(coefficient_schedule("polar_express", 4), ROUNDED, 1e-4)


def test_polar_express_at_any_safety():
    for name, safety in (("polar_express", 1.01), ("polar_express:1.05", 1.05)):
        schedule = coefficient_schedule(name, 10)
        divided = [(a / safety, b / safety**3, c / safety**5) for a, b, c in POLAR_EXPRESS]
        close(schedule[:7], divided, 1e-10)
        close(schedule[7:], [(1.875, -1.25, 0.375)] * 3, 1e-8)
    assert coefficient_schedule("polar_express", 5) == coefficient_schedule("polar_express", 10)[:5]


def test_fixed_sets():
    jordan, quintic = coefficient_schedule("jordan", 3), coefficient_schedule("quintic", 7)
    assert jordan == ((3.4445, -4.7750, 2.0315),) * 3
    assert quintic[5:] == quintic[:2]
    assert len(set(quintic[:5])) == 5


@pytest.mark.parametrize(("low", "high"), [(1e-3, 1.0), (0.02, 1.0), (0.3, 1.7), (0.999, 1.001)])
def test_best_quintic_equioscillates(low, high):
    x = torch.linspace(low, high, 200_001, dtype=torch.float64)
    error = value([best_quintic(low, high)], x) - 1
    worst = error.abs().max()
    # Four extremes of alternating sign and one size (Chebyshev): no odd quintic does better.
    signs = [
        part.sign().item()
        for part in (error[0], error[: len(error) // 2].max(), error[len(error) // 3 :].min(), error[-1])
    ]
    assert signs == [-1, 1, -1, 1]
    for extreme in (-error[0], error.max(), -error.min(), error[-1]):
        assert extreme == pytest.approx(worst.item(), rel=1e-5)
    assert value([best_quintic(1.0, 1.0)], torch.ones(1)) == 1


@pytest.mark.parametrize("lower", [1e-4, 1e-2, 0.3])
def test_generated_for_an_interval(lower):
    inside = torch.logspace(torch.log10(torch.tensor(lower)).item(), 0, 2001, dtype=torch.float64)
    worst = [(value(coefficient_schedule(f"generated:{lower}:1.0", steps), inside) - 1).abs().max() for steps in (3, 9)]
    assert worst[1] < 1e-3
    assert worst[1] < worst[0]
    # Better on its interval than a set for a wider one.
    if lower > 1e-3:
        steps = 4
        own, other = (
            (value(schedule, inside) - 1).abs().max()
            for schedule in (generate(lower, steps, cushion=0.0), coefficient_schedule("cans", steps))
        )
        assert own < other
    # Rounding may push values above 1; with safety the next step takes them back.
    safe = coefficient_schedule(f"generated:{lower}:1.05", 9)
    assert (value(safe, torch.tensor(1.05, dtype=torch.float64)) - 1).abs() < 1e-2


def test_every_name_has_a_schedule():
    numbers = {"generated": ":0.001:1.01"}
    for name in NAMES:
        assert len(coefficient_schedule(name + numbers.get(name, ""), 6)) == 6
    for wrong in ("aol", "jordan:1.02", "generated"):
        with pytest.raises(ValueError, match="no Newton-Schulz coefficients"):
            coefficient_schedule(wrong, 5)
