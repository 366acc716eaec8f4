"""Ours, a plain yardstick and other trainers, one after the other on one machine, as a table.

    python benchmarks/side_by_side.py [--yardstick PROGRAM] [--presets dense-1b block-8b]
        [--precisions bf16 fp32-master] [--peers torchtitan megatron-core] [--limit SECONDS] [--out NAME]
        [any flag of train_step.py]

The yardstick takes ``--preset``, ``--json`` and ``--fp32-master`` and prints one JSON object with ``tokens_per_s``; it
runs before and after the others, and ratios are to the better of the two. Flags of train_step.py are for ours. Peers
run through ``peers.py``; one that isn't installed, or fails, is a row that says so. ``--out`` writes NAME.md, and every
run's command and JSON, one a line, to NAME.jsonl, both as runs end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The folder of this program is on the path when it is started, the repository's when it is imported.
if __package__:
    from benchmarks.peers import NOT_INSTALLED, PEERS
else:
    from peers import NOT_INSTALLED, PEERS

HERE = Path(os.path.relpath(Path(__file__).parent))


class Runner:
    """Runs programs and keeps what they printed.

    Args:
        raw: file that takes a line for each run, or None.
        limit: seconds for one program, compilation included.
    """

    def __init__(self, raw: Path | None, limit: float = 300) -> None:
        self.raw, self.limit = raw, limit

    def __call__(self, who: str, command: list[str]) -> dict[str, Any]:
        """The program's JSON, with ``who`` and ``command``; ``error`` where there is none."""
        try:
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=self.limit)
        except subprocess.TimeoutExpired:
            found = {"error": f"no answer within {self.limit:g} s"}
        else:
            if done.returncode == NOT_INSTALLED:
                found = {"error": "not installed"}
            elif done.returncode:
                found = {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}
            else:
                found = json.loads(done.stdout.strip().splitlines()[-1])
        found |= {"who": who, "command": shlex.join(["python", *command])}
        print(f"{who}: {found.get('tokens_per_s', found.get('error'))}", file=sys.stderr, flush=True)
        if self.raw is not None:
            with self.raw.open("a") as file:
                file.write(json.dumps(found) + "\n")
        return found


def compare(
    preset: str, precision: str, args: argparse.Namespace, rest: list[str], run: Runner
) -> Iterator[dict[str, Any]]:
    """All programs on one preset in one precision of the optimizer, one after the other."""
    master = ["--fp32-master"] if precision == "fp32-master" else []
    plain = [args.yardstick, "--preset", preset, "--json", *master]
    dtype = "fp32" if master else "bf16"
    ours = [str(HERE / "train_step.py"), "--preset", preset, "--json", "--main-params-dtype", dtype, *rest]
    if args.yardstick:
        yield run("yardstick, before", plain)
    yield run("megatron_mup", ours)
    for peer in args.peers:
        yield run(peer, [str(HERE / "peers.py"), peer, "--preset", preset, "--json", *master])
    if args.yardstick:
        yield run("yardstick, after", plain)


def table(preset: str, precision: str, rows: list[dict[str, Any]]) -> str:
    """Markdown; ratios are to the better run of the yardstick."""
    speeds = [row["tokens_per_s"] for row in rows if row["who"].startswith("yardstick") and "error" not in row]
    lines = [f"## {preset}, {precision}", ""]
    lines += ["| program | tokens/s | ratio | ms per step | in a row | peak GiB |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['who']} | {row['error']} | | | | |")
            continue
        ratio = f"{row['tokens_per_s'] / max(speeds):.3f}" if speeds else ""
        measured = (row.get(name, "") for name in ("ms_per_step", "ms_in_a_row", "peak_gib"))
        lines.append("| " + " | ".join(map(str, (row["who"], row["tokens_per_s"], ratio, *measured))) + " |")
    return "\n".join([*lines, "", *(f"    {row['command']}" for row in rows), ""])


def heading(results: list[dict[str, Any]]) -> str:
    """Hardware and versions, as the runs found them."""
    device = next((row["device"] for row in results if "device" in row), "machine without a GPU")
    versions = {"Python": platform.python_version()}
    for row in results:
        versions |= row.get("versions", {}) | ({"torch": row["torch"]} if "torch" in row else {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"# Side by side\n\nOne {device}; {named}. Each row is one process; nothing else ran on the GPU.\n"


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yardstick", metavar="PROGRAM")
    parser.add_argument("--presets", nargs="+", default=["dense-1b"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32-master"], choices=["bf16", "fp32-master"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for each program")
    parser.add_argument("--out", type=Path, metavar="NAME")
    args, rest = parser.parse_known_args()
    run = Runner(args.out.with_suffix(".jsonl") if args.out else None, args.limit)
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in ((preset, precision) for preset in args.presets for precision in args.precisions):
        rows[case] = []
        for row in compare(*case, args, rest, run):
            rows[case].append(row)
            results = [each for found in rows.values() for each in found]
            text = "\n".join([heading(results), *(table(*which, found) for which, found in rows.items())])
            if args.out:
                args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
