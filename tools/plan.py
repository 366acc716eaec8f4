"""Tells what a run will need, without GPUs: memory by term and stage, messages, time of a step, layouts that fit.

    python tools/plan.py --config recipe.yaml --vocab-size 128256 --world-size 1024 [any flag of pretrain.py]

What it assumes about the machine stands at the end of its page; the flags below change it. Exit code 0: the
configuration fits; 1: it doesn't; 2: a mistake in the flags.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from megatron_mup.config import ConfigError, parse_config
from megatron_mup.planning.estimate import complete, estimate
from megatron_mup.planning.hardware import GIB, HARDWARE, Hardware
from megatron_mup.planning.inventory import Inventory
from megatron_mup.planning.report import as_data, page, suggestions
from megatron_mup.planning.search import suggest
from megatron_mup.training.trainer import vocabulary_size

RATES = {"memory_rate": "HBM", "node_rate": "links inside a node", "network_rate": "a GPU's share of the network"}
SHARES = {"matmul_share": "matrix products", "attention_share": "attention", "link_share": "links"}


def parser() -> argparse.ArgumentParser:
    """The tool's own flags; all others are `pretrain.py`'s."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    found.add_argument("--world-size", type=int, required=True, help="GPUs")
    found.add_argument("--hardware", choices=HARDWARE, default="h100", help="GPUs and links (default: h100)")
    found.add_argument("--suggest", type=int, default=5, metavar="N", help="layouts to suggest (default: 5)")
    found.add_argument("--json", action="store_true", help="print the estimate and the suggestions as JSON")
    found.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of a GPU")
    found.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs that the fast links join")
    for name, text in RATES.items():
        found.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="GB/S", help=f"rate of {text}")
    for name, text in SHARES.items():
        found.add_argument(f"--{name.replace('_', '-')}", type=float, help=f"share of the best that {text} reach")
    return found


def hardware_of(arguments: argparse.Namespace) -> Hardware:
    """The table's entry with what flags change."""
    changes: dict[str, float] = {
        name: getattr(arguments, name) for name in [*SHARES, "gpus_per_node"] if getattr(arguments, name) is not None
    }
    changes |= {name: 1e9 * getattr(arguments, name) for name in RATES if getattr(arguments, name) is not None}
    if arguments.gpu_memory is not None:
        changes["memory"] = arguments.gpu_memory * GIB
    for name, value in changes.items():
        if value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}", "must be above 0", "give what the machine has")
    return replace(HARDWARE[arguments.hardware], **changes)  # type: ignore[arg-type]


def main(argv: Sequence[str]) -> int:
    """Prints the plan; returns the exit code."""
    arguments, rest = parser().parse_known_args(argv)
    try:
        hardware = hardware_of(arguments)
        config = complete(parse_config(rest).config)
        vocab_size = vocabulary_size(config)
        inventory = Inventory.of(config, vocab_size)
        found = estimate(config, inventory, arguments.world_size, vocab_size, hardware)
        others, tried = [], 0
        if arguments.suggest > 0:
            others, tried = suggest(config, inventory, arguments.world_size, vocab_size, hardware, arguments.suggest)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        data = as_data(found, inventory)
        print(json.dumps(data | {"suggestions": [as_data(other, inventory) for other in others]}, indent=2))
    else:
        print(page(found, inventory, vocab_size))
        if arguments.suggest > 0:
            print(f"\n{suggestions(others, tried)}")
    return 0 if found.fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
