"""Coordinate check: does what the model computes keep its size when the model grows?

    python tools/coord_check.py --widths 128,256,512 --config recipe.yaml [flags of pretrain.py]
    python tools/coord_check.py --widths 128,256 --depths 2,8 --parametrization mup,completep --optimizer adam,muon
    python tools/coord_check.py --widths 128,256 --experts 4,8,16 --config moe-recipe.yaml
    torchrun --nproc-per-node 2 tools/coord_check.py --widths 128,256 --tensor-model-parallel-size 2 ...

Trains the recipe for a few steps at every size, with the run's own model, step and optimizer, in fp32 and at the peak
learning rate, and follows activations, updates, spectral norms and epsilon over the sizes. Writes tables and pictures
to --output; prints what failed. docs/transfer.md says how to read them.

Exit code: 0 all passed, 1 something failed, 2 a mistake in the flags.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_mup.config import Config, ConfigError, check_paths, parse_config
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.training.trainer import vocabulary_size
from megatron_mup.transfer.check import (
    CheckPlan,
    Outcome,
    check_plan,
    coordinate_check,
    format_outcomes,
    outcomes,
    write_outcomes,
)
from megatron_mup.transfer.sizes import sizes_of
from megatron_mup.transfer.verdict import TOLERANCE, format_verdicts


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags of the tool, and the rest, which are those of `pretrain.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--widths", type=sizes_of, default=(), help="hidden sizes; default: the recipe's")
    parser.add_argument("--depths", type=sizes_of, default=(), help="numbers of layers; default: the recipe's")
    parser.add_argument("--experts", type=sizes_of, default=(), help="numbers of experts; default: the recipe's")
    parser.add_argument("--parametrization", type=_words, default=(), help="one or several; default: the recipe's")
    parser.add_argument("--optimizer", type=_words, default=(), help="one or several; default: the recipe's")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each model (default: 6)")
    parser.add_argument("--seeds", type=int, default=1, help="models per size (default: 1)")
    parser.add_argument(
        "--grow", choices=("heads", "head-dim"), default="heads", help="what grows with the width (default: heads)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"slope that counts as flat (default: {TOLERANCE})"
    )
    parser.add_argument("--output", default="coord_check", help="folder of tables and pictures (default: coord_check)")
    parser.add_argument("--verbose", action="store_true", help="print what passed too")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.steps < 1 or arguments.seeds < 1 or arguments.tolerance <= 0:
        parser.error("--steps and --seeds must be at least 1, --tolerance above 0")
    return arguments, rest


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns its exit code."""
    arguments, rest = parse_arguments(argv)
    launch = Launch.from_environment()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        found = _checks(arguments, rest, launch)
    except ConfigError as error:
        if launch.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if launch.rank == 0:
        print(format_outcomes(found))
        write_outcomes(os.path.join(arguments.output, "summary.csv"), found)
    return int(any(outcome.failures for outcome in found))


def _checks(arguments: argparse.Namespace, rest: list[str], launch: Launch) -> list[Outcome]:
    """Every parametrization with every optimizer; a pair that is refused is reported where there are several."""
    pairs = list(itertools.product(arguments.parametrization or (None,), arguments.optimizer or (None,)))
    mesh: Mesh | None = None
    found: list[Outcome] = []
    for parametrization, optimizer in pairs:
        flags = list(rest)
        for flag, value in (("--parametrization", parametrization), ("--optimizer", optimizer)):
            flags += [flag, value] if value else []
        try:
            config, plan = _prepare(flags, arguments, launch)
        except ConfigError as error:
            if len(pairs) == 1:
                raise
            found.append(Outcome(str(parametrization), str(optimizer), "-", False, 0, 0, str(error.why)))
            continue
        if mesh is None:
            mesh = Mesh.build(config, init_process_group(config, launch))
        name, optimizer = config.parametrization.parametrization, config.optimizer.optimizer
        folder = os.path.join(arguments.output, f"{name}-{optimizer}")
        vocab_size = config.model.vocab_size
        assert vocab_size is not None
        verdicts = coordinate_check(config, vocab_size, mesh, plan, folder)
        shown = verdicts if arguments.verbose else [verdict for verdict in verdicts if not verdict.passed]
        if launch.rank == 0 and shown:
            print(f"{name}, {optimizer}\n{format_verdicts(shown)}\n", flush=True)
        found += outcomes(config, verdicts)
    return found


def _prepare(flags: list[str], arguments: argparse.Namespace, launch: Launch) -> tuple[Config, CheckPlan]:
    config = parse_config([*flags, "--train-iters", str(arguments.steps)]).config
    plan = CheckPlan(
        widths=arguments.widths or (config.model.hidden_size,),
        depths=arguments.depths or (config.model.num_layers,),
        experts=arguments.experts,
        steps=arguments.steps,
        seeds=arguments.seeds,
        grow=arguments.grow,
        tolerance=arguments.tolerance,
    )
    config = replace(config, model=replace(config.model, vocab_size=vocabulary_size(config)))
    config = check_plan(config, plan, launch.world_size)
    check_paths(config)
    return config, plan


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
