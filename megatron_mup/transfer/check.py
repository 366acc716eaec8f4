"""The coordinate check of one or several parametrizations and optimizers, from recipe to files and a verdict."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_mup.config import Config, ConfigError, validate
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.schemes import Kind, Operations
from megatron_mup.parametrization.table import scheme_of
from megatron_mup.transfer.coordinates import measure_sizes
from megatron_mup.transfer.sizes import Growth, Size, pin_base, resize
from megatron_mup.transfer.verdict import TOLERANCE, Axis, Exponents, Verdict, judge, write_csv


@dataclass(frozen=True, kw_only=True)
class CheckPlan:
    """What a coordinate check trains.

    Attributes:
        widths, depths: hidden sizes and numbers of layers; every pair is trained.
        experts: numbers of experts, each with every pair; none: the recipe's.
        steps: optimizer steps of each model.
        seeds: number of seeds, from the recipe's on.
        grow: what grows with the hidden size.
        tolerance: slope up to which a quantity counts as flat.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    experts: tuple[int, ...] = ()
    steps: int = 6
    seeds: int = 1
    grow: Growth = "heads"
    tolerance: float = TOLERANCE

    @property
    def sizes(self) -> list[Size]:
        """Every width with every depth and number of experts."""
        return [Size(*size) for size in itertools.product(self.widths, self.depths, self.experts or (None,))]

    @property
    def axes(self) -> list[Axis]:
        """What grows."""
        several: dict[Axis, tuple[int, ...]] = {"width": self.widths, "depth": self.depths, "experts": self.experts}
        return [axis for axis, sizes in several.items() if len(sizes) > 1]


def check_plan(config: Config, plan: CheckPlan, world_size: int) -> Config:
    """The recipe as it is checked: base sizes written out, in fp32 and uncompiled; every size is validated.

    Raises:
        ConfigError: fewer than two sizes, or one that cannot work.
    """
    if not plan.axes:
        raise ConfigError(
            "--widths, --depths, --experts", "slopes need at least two sizes", "give --widths 128,256,512"
        )
    if plan.experts and config.moe.num_experts is None:
        raise ConfigError("--experts", "the recipe has no experts", "give --num-experts, or drop it")
    training = replace(
        config.training, bf16=False, torch_compile=False, eval_interval=None, train_iters=plan.steps, train_samples=None
    )
    # A run of a few steps has no room for the schedule of the real one, and takes every step at the peak.
    schedule = type(config.schedule)(lr_decay_style="constant")
    config = pin_base(replace(config, training=training, schedule=schedule))
    for size in plan.sizes:
        validate(resize(config, size.hidden_size, size.num_layers, plan.grow, size.num_experts), world_size)
    return config


def coordinate_check(config: Config, vocab_size: int, mesh: Mesh, plan: CheckPlan, folder: str) -> list[Verdict]:
    """Measures all sizes, and writes ``coordinates.csv``, ``verdicts.csv`` and a picture per axis on rank 0.

    Args:
        config: what :func:`check_plan` gave.
        vocab_size: number of token ids.
        mesh: the run's mesh; collective over its ranks.
        plan: what to train.
        folder: where files go.
    """
    seeds = [config.training.seed + number for number in range(plan.seeds)]
    rows = list(measure_sizes(config, vocab_size, mesh, plan.sizes, plan.steps, seeds, plan.grow))
    verdicts = judge(rows, exponents_of(config), plan.tolerance)
    if mesh.world.get_rank() == 0:
        from megatron_mup.transfer.plots import coordinate_curves

        write_csv(os.path.join(folder, "coordinates.csv"), rows)
        write_csv(os.path.join(folder, "verdicts.csv"), verdicts)
        title = f"{config.parametrization.parametrization}, {config.optimizer.optimizer}, {plan.steps} steps"
        for axis in plan.axes:
            coordinate_curves(rows, verdicts, axis, os.path.join(folder, f"{axis}.png"), f"{title}, {plan.seeds} seeds")
    return verdicts


def exponents_of(config: Config) -> Exponents:
    """What the recipe's parametrization means to follow size."""
    scheme = scheme_of(config)
    if scheme.operations is Operations.UMUP:
        return Exponents(depth_alpha=0.5, embedding=-0.5)
    return Exponents(config.parametrization.depth_alpha if scheme.alpha is None else scheme.alpha)


def promises(config: Config) -> list[Axis]:
    """The sizes over which the recipe's parametrization says that hyperparameters carry over."""
    scheme = scheme_of(config)
    routers = scheme.width and Kind.ROUTER in scheme.rows
    followed: dict[Axis, bool] = {"width": scheme.width, "depth": scheme.depth, "experts": routers}
    return [axis for axis, follows in followed.items() if follows]


@dataclass(frozen=True)
class Outcome:
    """Verdict over one axis for one parametrization and optimizer.

    Attributes:
        promised: whether the parametrization says that it holds over this axis.
        failures: quantities beyond the tolerance, of ``checked`` ones.
        worst: the quantity that is farthest out, or the reason of a refusal.
    """

    parametrization: str
    optimizer: str
    axis: str
    promised: bool
    failures: int
    checked: int
    worst: str

    @property
    def word(self) -> str:
        """``passed``, ``FAILED`` or ``refused``."""
        return "refused" if not self.checked else "FAILED" if self.failures else "passed"


def outcomes(config: Config, verdicts: Sequence[Verdict]) -> list[Outcome]:
    """One :class:`Outcome` per axis."""
    parametrization, optimizer = config.parametrization.parametrization, config.optimizer.optimizer
    found = []
    for axis in sorted({verdict.axis for verdict in verdicts}, reverse=True):
        mine = [verdict for verdict in verdicts if verdict.axis == axis]
        bad = [verdict for verdict in mine if not verdict.passed]
        worst = f"{bad[0].quantity} of {bad[0].name}: slope {bad[0].slope:.2f}" if bad else ""
        promised = axis in promises(config)
        found.append(Outcome(parametrization, optimizer, axis, promised, len(bad), len(mine), worst))
    return found


def format_outcomes(found: Sequence[Outcome]) -> str:
    """The summary over parametrizations and optimizers as text."""
    lines = [f"{'parametrization':17} {'optimizer':16} {'axis':7} {'verdict':8} {'failed':>8}  worst"]
    for o in found:
        note = "" if o.promised or not o.checked else " (not promised)"
        lines.append(
            f"{o.parametrization:17} {o.optimizer:16} {o.axis:7} {o.word:8} {f'{o.failures}/{o.checked}':>8}  "
            f"{o.worst}{note}"
        )
    return "\n".join(lines)


def write_outcomes(path: str, found: Sequence[Outcome]) -> None:
    """Writes the summary as CSV; makes the folder."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["parametrization", "optimizer", "axis", "promised", "verdict", "failures", "checked", "worst"])
        for o in found:
            writer.writerow(
                [o.parametrization, o.optimizer, o.axis, o.promised, o.word, o.failures, o.checked, o.worst]
            )
