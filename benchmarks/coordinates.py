"""Coordinate check of every parametrization with every optimizer, over the sizes that the parametrization promises.

    python benchmarks/coordinates.py --output OUT [--optimizer spectral_sphere,muon] [--axis width,depth,both]
                                     [--parametrization completep,mup] [--seconds N]

One process for all, on a GPU or a CPU. Writes a line per check to OUT/cases.csv and a line per quantity to
OUT/verdicts.csv as checks end; what is there already is left out, and nothing begins after --seconds. The standard
parametrization promises nothing and must fail. Exit code 1: a check didn't end as it must.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mup.config import Config, ParametrizationConfig, parse_config
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.transfer.check import CheckPlan, check_plan, exponents_of, promises
from megatron_mup.transfer.coordinates import measure_sizes
from megatron_mup.transfer.verdict import Verdict, judge

TOY = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 128 --swiglu "
    "--disable-bias-linear --untie-embeddings-and-output-weights --seq-length 16 --vocab-size 64 "
    "--make-vocab-size-divisible-by 8 --micro-batch-size 2 --global-batch-size 2 --mock-data --num-workers 0 "
    "--init-method-std 0.1 --embedding-init-method-std 0.3 --weight-decay 0 --lr 1e-2 --muon-lr 2e-2 "
    "--sphere-solver-steps 3"
)
"""Few tokens, so that gradients are of low rank and small widths are near their limit."""
PLANS = {
    "width": CheckPlan(widths=(128, 256, 512, 1024, 2048), depths=(2,), steps=4),
    "depth": CheckPlan(widths=(64,), depths=(2, 4, 8, 16, 32, 64), steps=6),
    "both": CheckPlan(widths=(64, 128, 256), depths=(2, 4, 8, 16), steps=6),
}
SCHEMES = {
    "completep": "",
    # Learning rates near 1: at a hundredth of that logits stay what the first weights make of them.
    "umup": "--lr 0.1",
    "mup": "",
    "munit": "--norm-position post-branch --residual-tau 0.4",
    "spectral": "",
    "standard": "",
}
OPTIMIZERS = {
    # Each model takes a few steps: too few to record them.
    "spectral_sphere": "--muon-ns-dtype fp32 --no-optimizer-cuda-graph",
    "muon": "--muon-ns-dtype fp32 --no-optimizer-cuda-graph",
    "adam": "",
}


@dataclass(frozen=True)
class Case:
    """One check: a parametrization and an optimizer, and which sizes grow (keys of the tables above)."""

    parametrization: str
    optimizer: str
    axis: str

    def __str__(self) -> str:
        """Its name."""
        return f"{self.axis}-{self.parametrization}-{self.optimizer}"

    @property
    def flags(self) -> list[str]:
        """Of the recipe."""
        own = f"{SCHEMES[self.parametrization]} {OPTIMIZERS[self.optimizer]}"
        names = f"--parametrization {self.parametrization} --optimizer {self.optimizer}"
        return f"{TOY} {names} {own} --train-iters 1".split()

    @property
    def promised(self) -> bool:
        """Whether the parametrization says that it holds over these sizes."""
        followed = promises(Config(parametrization=ParametrizationConfig(parametrization=self.parametrization)))
        return set(PLANS[self.axis].axes) <= set(followed)

    def run(self, mesh: Mesh, plan: CheckPlan, flags: Sequence[str] = ()) -> list[Verdict]:
        """Trains the models of a plan; failures first."""
        config = check_plan(parse_config([*self.flags, *flags]).config, plan, 1)
        assert config.model.vocab_size is not None
        seeds = [config.training.seed]
        rows = measure_sizes(config, config.model.vocab_size, mesh, plan.sizes, plan.steps, seeds, plan.grow)
        return judge(list(rows), exponents_of(config), plan.tolerance)


def cases(
    schemes: Iterable[str] = SCHEMES, optimizers: Iterable[str] = OPTIMIZERS, axes: Iterable[str] = PLANS
) -> Iterator[Case]:
    """What is promised, and the standard parametrization over width and over depth."""
    for optimizer, axis, scheme in itertools.product(optimizers, axes, schemes):
        case = Case(scheme, optimizer, axis)
        if case.promised or (scheme == "standard" and axis != "both"):
            yield case


CASE_COLUMNS = [
    "parametrization", "optimizer", "axis", "widths", "depths", "steps", "failed", "checked", "farthest", "slope",
    "as it must", "seconds", "device",
]  # fmt: skip
VERDICT_COLUMNS = [
    "parametrization", "optimizer", "widths", "depths", "axis", "quantity", "class", "step", "slope", "low", "high",
    "first", "last", "passed",
]  # fmt: skip


def case_line(case: Case, plan: CheckPlan, found: Sequence[Verdict]) -> list[object]:
    """Up to ``as it must``: failures, and the quantity that is farthest from where it must be."""
    failed = [verdict for verdict in found if not verdict.passed]
    far = max(found, key=lambda v: max(v.slope - v.high, v.low - v.slope))
    good = bool(failed) == (case.parametrization == "standard")
    own = [case.parametrization, case.optimizer, case.axis, _span(plan.widths), _span(plan.depths), plan.steps]
    return [*own, len(failed), len(found), f"{far.quantity} of {far.name}", f"{far.slope:.2f}", good]


def verdict_line(case: Case, plan: CheckPlan, v: Verdict) -> list[object]:
    """A quantity of a case."""
    own = [case.parametrization, case.optimizer, _span(plan.widths), _span(plan.depths), v.axis, v.quantity, v.name]
    return [*own, v.step, f"{v.slope:.3f}", v.low, v.high, f"{v.first:.4g}", f"{v.last:.4g}", v.passed]


def _span(sizes: Sequence[int]) -> str:
    return "-".join(map(str, sorted({sizes[0], sizes[-1]})))


def main(argv: Sequence[str]) -> int:
    """Runs what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known in (("parametrization", SCHEMES), ("optimizer", OPTIMIZERS), ("axis", PLANS)):
        parser.add_argument(f"--{name}", default=",".join(known), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    begin, folder = time.monotonic(), arguments.output
    wanted = cases(*(arguments.__dict__[name].split(",") for name in ("parametrization", "optimizer", "axis")))
    done = _done(folder / "cases.csv")
    missing = [case for case in wanted if (case.parametrization, case.optimizer, case.axis) not in done]
    if not missing:
        return 0
    config = parse_config(missing[0].flags).config
    mesh = Mesh.build(config, init_process_group(config, Launch.from_environment()))
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "CPU"
    good = True
    for case in missing:
        start = time.monotonic()
        if start - begin > arguments.seconds:
            break
        plan = PLANS[case.axis]
        found = case.run(mesh, plan)
        line = case_line(case, plan, found)
        good &= bool(line[-1])
        line += [f"{time.monotonic() - start:.1f}", device]
        _append(folder / "verdicts.csv", VERDICT_COLUMNS, [verdict_line(case, plan, verdict) for verdict in found])
        _append(folder / "cases.csv", CASE_COLUMNS, [line])
        print(*line, sep=", ", flush=True)
    dist.destroy_process_group()
    return int(not good)


def _done(path: Path) -> set[tuple[str, ...]]:
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        return {tuple(row[:3]) for row in csv.reader(file)}


def _append(path: Path, columns: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    """Adds lines to a table; makes it, and its folder, if it isn't there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([*([columns] if new else []), *lines])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
