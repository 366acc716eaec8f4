"""Presets in many variants, one after the other on the same machine, as tables.

    python benchmarks/variants.py [--preset dense-1b ...] [--only PATTERN ...] [--steps 8] [--out FILE] [any flag]

Each row is a run of ``train_step.py``'s measurement in this process; the first of a preset, plain bf16, runs again at
its end, so that a machine that slowed down shows. A variant that fails is a row that says so. ``--out`` keeps every
row's JSON, one a line, and what lies there already isn't measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mup.config.cli import parse_config
from megatron_mup.config.validate import validate
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.training.precision import settle_attention, settle_fp8

# The folder of this program is on the path when it is started, the repository's when it is imported.
if __package__:
    from benchmarks.train_step import measure, preset
else:
    from train_step import measure, preset

UMUP = "--parametrization umup --no-norm-affine --weight-decay 1.2e-4"
"""Its decay is a share of the weights in every step, whatever the rate: 0.1 would leave nothing of them."""
LINEAR = "--cross-entropy-fusion-impl linear"
PLAIN = "bf16"
GRAPH = "--cuda-graph-impl local"
MASTER = "--main-params-dtype fp32"
BATCH_4 = "--micro-batch-size 4"
TE = "--transformer-impl transformer_engine"
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
VARIANTS = {
    PLAIN: "",
    "bf16, graph": GRAPH,
    **{f"bf16, graph, {name}": f"{GRAPH} --optimizer {name}" for name in ("muon", "spectral_sphere", "dion")},
    "bf16, graph, muon by squaring": f"{GRAPH} --optimizer muon --muon-coefficient-type squaring",
    "bf16, clipping": "--clip-grad 1.0",
    "fused loss": LINEAR,
    "fused loss, chunks of 1024": f"{LINEAR} --loss-chunk-size 1024",
    "fused loss, chunks of 4096": f"{LINEAR} --loss-chunk-size 4096",
    "fp32 master weights": MASTER,
    "fp32 master weights, graph": f"{MASTER} {GRAPH}",
    "fp32 master weights, clipping": f"{MASTER} --clip-grad 1.0",
    "micro-batch 4": BATCH_4,
    "micro-batch 4, selective recomputation": f"{BATCH_4} --recompute-granularity selective",
    "micro-batch 4, budget 0.7": f"{BATCH_4} --activation-memory-budget 0.7",
    "selective recomputation": "--recompute-granularity selective",
    "u-muP": UMUP,
    "u-muP, FP8 hybrid": f"{UMUP} --fp8-format hybrid",
    "u-muP, FP8 hybrid, graph": f"{UMUP} --fp8-format hybrid {GRAPH}",
    "u-muP, FP8 e4m3": f"{UMUP} --fp8-format e4m3",
    "u-muP, FP8 hybrid, critical in bf16": f"{UMUP} --fp8-format hybrid --fp8-critical-bf16",
    "u-muP, FP8 hybrid, fused loss": f"{UMUP} --fp8-format hybrid {LINEAR}",
    "TE bf16": TE,
    "TE bf16, not compiled": f"{TE} --no-torch-compile",
    **{f"TE FP8 {recipe}": f"{TE} --fp8-format hybrid --fp8-recipe {recipe}" for recipe in RECIPES},
    **{
        f"TE FP8 {recipe}, graph": f"{TE} --fp8-format hybrid --fp8-recipe {recipe} {GRAPH}"
        for recipe in RECIPES
        if recipe != "mxfp8"
    },
    **{
        f"TE FP8 {recipe}, not compiled": f"{TE} --fp8-format hybrid --fp8-recipe {recipe} --no-torch-compile"
        for recipe in RECIPES
    },
}
"""Flags by name; ``TE`` is Transformer Engine, whose ``mxfp8`` asks for a Blackwell GPU."""


def run(flags: list[str], steps: int) -> dict[str, Any]:
    """What one run found, or why it failed."""
    torch._dynamo.reset()  # or the limit of recompilations would silently make later rows eager
    try:
        launch = Launch.from_environment()
        config = parse_config(flags).config
        validate(config, launch.world_size)
        config, _ = settle_fp8(settle_attention(config))
        device = init_process_group(config, launch)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return measure(config, steps, device)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def clean() -> None:
    """Frees what a row held, once nothing refers to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    parser.add_argument("--preset", nargs="+", default=["dense-1b"])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="variants whose name has one of these, beside plain bf16"
    )
    parser.add_argument("--alone", action="store_true", help="leave plain bf16 out")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args, rest = parser.parse_known_args()
    names = list(dict.fromkeys(n for each in args.only for n in VARIANTS if n != PLAIN and fnmatchcase(n, each)))
    names = names if args.alone else [PLAIN, *names, f"{PLAIN} again"]
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    for preset_name in args.preset:
        rows = []
        for name in names:
            what = {"preset": preset_name, "variant": name}
            found = next((row for row in known if row.items() >= what.items()), None)
            if found is None:
                flags = VARIANTS[name.removesuffix(" again")].split()
                found = (
                    what | {"flags": " ".join(flags + rest)} | run([*preset(preset_name), *flags, *rest], args.steps)
                )
                clean()
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(found) + "\n")
            rows.append((name, found))
            print(
                f"{preset_name}, {name}: {found.get('tokens_per_s', found.get('error'))}", file=sys.stderr, flush=True
            )
        print(f"{preset_name}\n\n{table(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
