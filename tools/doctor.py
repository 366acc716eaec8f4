"""Looks at this machine: versions, packages, GPUs and links, communication, limits, disk and data, on one page.

    python tools/doctor.py [--save FOLDER] [--data-path PREFIX ...]

Exit code 0: nothing is bad; 1: something is, and a run would fail or be far slower than it should.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from megatron_mup.planning.findings import Finding, healthy, show
from megatron_mup.planning.machine import check_data, check_gpus, check_limits, check_python, check_save
from megatron_mup.planning.packages import check_packages
from megatron_mup.planning.smoke import check_backend


def examine(arguments: argparse.Namespace) -> list[Finding]:
    """All findings, in the order in which they are shown."""
    findings = [*check_python(), *check_packages(), *check_gpus(), *check_limits()]
    findings += [check_save(Path(folder)) for folder in arguments.save]
    findings += [check_data(prefix) for prefix in arguments.data_path]
    if not arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            findings.append(check_backend("gloo", 2, folder, arguments.timeout))
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if gpus:
                findings.append(check_backend("nccl", gpus, folder, arguments.timeout))
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", nargs="+", default=[], metavar="FOLDER", help="where checkpoints will go")
    parser.add_argument("--data-path", nargs="+", default=[], metavar="PREFIX", help="datasets, without .bin and .idx")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that processes get to find each other")
    parser.add_argument("--quick", action="store_true", help="start no processes")
    findings = examine(parser.parse_args(argv))
    show(findings, Console())
    return 0 if healthy(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
