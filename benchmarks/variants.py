"""One preset in many variants, one after the other on the same machine, as a table.

    python benchmarks/variants.py [--preset dense-1b] [--only TEXT] [--out FILE] [any flag of train_step.py]

Each row is one run of ``train_step.py``; the first, plain bf16, runs again at the end, so that a machine that slowed
down shows. A variant that fails is a row that says so. ``--out`` keeps every run's JSON, one a line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

UMUP = "--parametrization umup --no-norm-affine"
LINEAR = "--cross-entropy-fusion-impl linear"
PLAIN = "bf16"
TE = "--transformer-impl transformer_engine"
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
VARIANTS = {
    PLAIN: "",
    "fused loss": LINEAR,
    "fused loss, chunks of 1024": f"{LINEAR} --loss-chunk-size 1024",
    "fused loss, chunks of 4096": f"{LINEAR} --loss-chunk-size 4096",
    "fp32 master weights": "--main-params-dtype fp32",
    "selective recomputation": "--recompute-granularity selective",
    "u-muP": UMUP,
    "u-muP, FP8 hybrid": f"{UMUP} --fp8-format hybrid",
    "u-muP, FP8 e4m3": f"{UMUP} --fp8-format e4m3",
    "u-muP, FP8 hybrid, critical in bf16": f"{UMUP} --fp8-format hybrid --fp8-critical-bf16",
    "u-muP, FP8 hybrid, fused loss": f"{UMUP} --fp8-format hybrid {LINEAR}",
    "TE bf16": TE,
    "TE bf16, not compiled": f"{TE} --no-torch-compile",
    **{f"TE FP8 {recipe}": f"{TE} --fp8-format hybrid --fp8-recipe {recipe}" for recipe in RECIPES},
    **{
        f"TE FP8 {recipe}, not compiled": f"{TE} --fp8-format hybrid --fp8-recipe {recipe} --no-torch-compile"
        for recipe in RECIPES
    },
}
"""Flags by name; ``TE`` is Transformer Engine, whose ``mxfp8`` asks for a Blackwell GPU."""


def run(preset: str, flags: list[str]) -> dict[str, Any]:
    """What one run found, or why it failed."""
    program = Path(__file__).with_name("train_step.py")
    done = subprocess.run(
        [sys.executable, str(program), "--preset", preset, "--json", *flags], capture_output=True, text=True
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown; ratios are to the first row."""
    lines = ["| variant | tokens/s | ratio | MFU, causal half | peak GiB | phases, ms |", "|---|---|---|---|---|---|"]
    first = rows[0][1].get("tokens_per_s")
    for name, found in rows:
        if "error" in found:
            lines.append(f"| {name} | failed: {found['error']} | | | | |")
            continue
        ratio = f"{found['tokens_per_s'] / first:.3f}" if first else ""
        mfu, peak = found.get("mfu_causal_half"), found.get("peak_gib", "")
        phases = ", ".join(f"{phase} {time:g}" for phase, time in found["phases_ms"].items())
        cells = (name, found["tokens_per_s"], ratio, "" if mfu is None else f"{mfu:.1%}", peak, phases)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dense-1b")
    parser.add_argument("--only", default="", help="variants whose name has this text, beside plain bf16")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args, rest = parser.parse_known_args()
    chosen = [name for name in VARIANTS if name == PLAIN or args.only in name]
    rows = []
    for name in [*chosen, PLAIN]:
        found = run(args.preset, [*VARIANTS[name].split(), *rest])
        rows.append((name, found))
        print(f"{name}: {found.get('tokens_per_s', found.get('error'))}", file=sys.stderr, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({"variant": name} | found) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
