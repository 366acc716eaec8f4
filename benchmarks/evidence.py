"""The measurements behind docs/transfer.md, docs/optimizers.md and the quality of FP8, packed onto a machine's GPUs.

    python benchmarks/evidence.py prepare --work evidence
    python benchmarks/evidence.py run --work evidence --output results --minutes 60 --workers 5 --alone 2
    python benchmarks/evidence.py report --output results

`prepare` makes a corpus of the Python sources on this machine, a tokenizer of 4096 pieces and indexed data, without a
network. `run` trains what `evidence_plan.py` lists, most telling first: --workers processes on every GPU, except on
--alone GPUs, which train one model at a time for comparisons in wall-clock. It begins nothing that would not be done in
time, keeps each finished run at once, and goes on where it stopped; on another machine, with --resume-from and the
results of former runs. `report` fits, draws and tabulates what is there.

--toy runs all of it in a minute on a CPU, for tests. --parts takes some parts, by the beginning of their names, --sizes
some sizes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evidence_plan import FULL, THINNED, TOY, Part, Scale, parts_of

from megatron_mup.config import ConfigError, parse_config, to_yaml
from megatron_mup.transfer.trials import FAILED, Results, digest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "sympy", "scipy", "jax")
"""Installed packages whose sources join those of the standard library, where they are."""
COLUMNS = (
    *("part", "trial", "hidden_size", "num_layers", "lr", "muon_lr", "seed"),
    *("status", "loss", "train_loss", "seconds", "tokens_per_s", "error", "alone"),
)
"""The last one says ``yes`` where a run had its GPU to itself, so that its times count."""
MOCK = ["--mock-data", "--vocab-size=4096"]


def prepare(arguments: argparse.Namespace) -> int:
    """Corpus, tokenizer, data; what is there is kept."""
    work, tools = arguments.work, ROOT / "tools"
    corpus, tokenizer = work / "corpus", work / "tokenizer.model"
    installed = [Path(sysconfig.get_path("purelib"), name) for name in PACKAGES]
    library = Path(sysconfig.get_path("stdlib"))
    sources = [library / "email", library / "asyncio"] if arguments.toy else [library, *filter(Path.is_dir, installed)]
    steps: list[tuple[Path, list[str]]] = [
        (corpus / "train.jsonl", ["build_corpus.py", "--output-dir", str(corpus), "--source", *map(str, sources)]),
        (tokenizer, ["train_tokenizer.py", "--input", str(corpus / "train.jsonl"), "--output", str(tokenizer)]),
    ]
    for part in ("train", "validation"):
        words = ["preprocess_data.py", "--input", str(corpus / f"{part}.jsonl"), "--output-prefix", str(work / part)]
        words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer), "--append-eod"]
        steps.append((work / f"{part}_text_document.idx", [*words, "--workers", str(os.cpu_count() or 1)]))
    for made, (tool, *words) in steps:
        begin = time.monotonic()
        if not made.exists() and subprocess.run([sys.executable, str(tools / tool), *words]).returncode:
            return 1
        print(f"{made.name}: {time.monotonic() - begin:.1f} s", flush=True)
    return 0


def data_flags(work: Path) -> list[str]:
    """Where a run finds its data, and the vocabulary's size."""
    from megatron_mup.data.tokenizer import build_tokenizer

    size = build_tokenizer("SentencePieceTokenizer", str(work / "tokenizer.model")).vocab_size
    paths = [
        f"--{flag}-data-path={work / part}_text_document"
        for flag, part in (("train", "train"), ("valid", "validation"))
    ]
    tokenizer = ["--tokenizer-type=SentencePieceTokenizer", f"--tokenizer-model={work / 'tokenizer.model'}"]
    return [*paths, *tokenizer, f"--vocab-size={size}"]


def scale_of(arguments: argparse.Namespace) -> Scale:
    """The sizes, with --steps-factor applied to every length."""
    scale, factor = TOY if arguments.toy else FULL, arguments.steps_factor
    lengths = {name: max(4, round(getattr(scale, name) * factor)) for name in ("steps", "optimizer_steps", "fp8_steps")}
    return replace(scale, **lengths)


def run(arguments: argparse.Namespace) -> int:
    """Trains until everything is done or time is up; 1: something is left."""
    import torch

    from megatron_mup.transfer.workers import Job, Place, Workers, told, visible_gpus

    deadline = time.monotonic() + 60 * arguments.minutes
    parts, problems = parts_of(scale_of(arguments), data_flags(arguments.work), arguments.seeds)
    parts = [part for part in parts if part.name.startswith(tuple(arguments.parts))]
    print(*problems, sep="\n", flush=True)
    kept = {part.name: Results(arguments.work / part.name, digest(part.recipe)) for part in parts}
    gpus: Sequence[str | None] = visible_gpus() or [None]
    apart, shared = gpus[: arguments.alone], gpus[arguments.alone :]
    places = [Place(gpu, alone=True) for gpu in apart] + [
        Place(gpu) for gpu in shared for _ in range(arguments.workers)
    ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "gpus": gpu_names()}
    about |= {
        "data": tokens(arguments.work),
        "command": ["benchmarks/evidence.py", *sys.argv[1:]],
        "places": [vars(place) for place in places],
    }
    (arguments.output / "about.json").write_text(json.dumps(about, indent=1))
    for part in parts:
        recipe_file(arguments.output, part).parent.mkdir(exist_ok=True)
        recipe_file(arguments.output, part).write_text(to_yaml(part.recipe), encoding="utf-8")
    # How long former runs took says little: they may have shared a GPU with other ones.
    lasted = {
        (str(arguments.work / name), record["hidden_size"], record["num_layers"]): record["seconds"]
        for name, results in kept.items()
        for record in results.read().values()
    }
    for former in arguments.resume_from:
        adopt(former, arguments.output, about["data"], parts, kept)

    def done() -> dict[str, dict[str, float]]:
        return {
            name: {key: float("inf") if r["loss"] is None else r["loss"] for key, r in results.read().items()}
            for name, results in kept.items()
        }

    def wanted() -> list[Job]:
        results = done()
        results |= {part.proxy.name: {} for part in parts if part.proxy is not None and part.proxy.name not in results}
        jobs = [
            Job(
                part.recipe,
                trial,
                str(arguments.work / part.name),
                urgency=urgency,
                alone=part.alone and bool(apart),
                seconds=part.seconds(trial, 1 if part.alone else arguments.workers),
            )
            for part in parts
            for urgency, trial in part.todo(results)
            if not arguments.sizes or f"{trial.hidden_size}x{trial.num_layers}" in arguments.sizes
        ]
        # Long ones first, so that the end is not left waiting for one.
        return sorted(jobs, key=lambda job: -job.seconds)

    def finished(job: Job, record: dict[str, Any]) -> None:
        name = Path(job.folder).name
        kept[name].append("workers", record)
        write_row(arguments.output / "trials.csv", {"part": name, **record, "alone": "yes" if job.alone else ""})
        if not name.startswith(("completep", "standard")):
            thin(
                Path(job.folder, "curves", f"{job.trial.key}.jsonl"), arguments.output / f"{name}--{job.trial.key}.csv"
            )
        print(f"{time.monotonic() - deadline + 60 * arguments.minutes:6.1f} s {told(job, record)}", flush=True)

    with Workers(places) as workers:
        workers.lasted |= lasted
        return int(workers.run(wanted, finished, deadline))


def recipe_file(folder: Path, part: Part) -> Path:
    """Where a folder of results keeps what a part trained."""
    return folder / "recipes" / f"{part.name}.yaml"


def adopt(
    former: Path, output: Path, data: Mapping[str, int], parts: Sequence[Part], kept: Mapping[str, Results]
) -> None:
    """Takes over what a former run, on whatever machine, has found with the same recipes on the same data.

    Args:
        former: its folder of results.
        output: this run's folder of results.
        data: tokens of this run's data.
        parts: what may be taken over.
        kept: where it goes, by part.

    Raises:
        SystemExit: the former run had other data, or its folder is this run's.
    """
    about = json.loads((former / "about.json").read_text(encoding="utf-8"))
    if former.resolve() == output:
        raise SystemExit(f"--resume-from {former}: is this run's --output; give another one")
    if about["data"] != data:
        raise SystemExit(f"--resume-from {former}: had {about['data']} tokens of data, here are {data}")
    had = {part.name: set(kept[part.name].read()) for part in parts if had_recipe(former, part)}
    with open(former / "trials.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name, trial = row["part"], row["trial"]
            if name not in had or row["status"] == FAILED or trial in had[name]:
                continue
            had[name].add(trial)
            numbers = {"loss": float(row["loss"]) if row["loss"] else None, "seconds": float(row["seconds"])}
            sizes = {column: int(row[column]) for column in ("hidden_size", "num_layers")}
            kept[name].append("former", {**row, **numbers, **sizes})
            write_row(output / "trials.csv", row)
            curve = former / f"{name}--{trial}.csv"
            if curve.exists():
                shutil.copy(curve, output)


def had_recipe(former: Path, part: Part) -> bool:
    """Whether a former run trained a part with the settings that it has now, wherever its data lay."""
    file = recipe_file(former, part)
    if not file.exists():
        return False
    try:
        recipe = replace(parse_config(["--config", str(file)]).config, data=part.recipe.data)
        same = digest(recipe) == digest(part.recipe)
    except (ConfigError, SystemExit):  # a flag that is gone
        same = False
    if not same:
        print(f"{former}: {part.name} had other settings; it is run anew", flush=True)
    return same


def gpu_names() -> list[str]:
    """Names of the machine's GPUs, without opening one here."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        return []


def tokens(work: Path) -> dict[str, int]:
    """Tokens of the data's parts."""
    from megatron_mup.data.indexed_dataset import IndexedDataset

    return {
        part: int(IndexedDataset(work / f"{part}_text_document").sequence_lengths.sum())
        for part in ("train", "validation")
    }


def write_row(file: Path, record: Mapping[str, Any]) -> None:
    """Adds a line to a table."""
    new = not file.exists()
    with open(file, "a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow(record)


def thin(curve: Path, file: Path) -> None:
    """Keeps a curve: the mean loss of every few steps, and the steady time of a step."""
    if not curve.exists():
        return
    records = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    steps = [r for r in records if "train/lm loss" in r]
    times = [r["time/step"] for r in steps if "time/step" in r][1:] or [0.0]
    steady = sorted(times)[len(times) // 2]
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(("iteration", "tokens", "loss", "seconds"))
        for end in range(THINNED, len(steps) + 1, THINNED):
            some = steps[end - THINNED : end]
            loss = sum(r["train/lm loss"] for r in some) / len(some)
            at = some[-1]["iteration"]
            writer.writerow((at, some[-1]["train/consumed tokens"], f"{loss:.5f}", f"{at * steady:.4f}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run", "report"))
    parser.add_argument("--work", type=Path, default=Path("evidence"), help="folder of data, curves and logs")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of tables and figures")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the whole run")
    parser.add_argument("--workers", type=int, default=3, help="processes on a GPU that is shared")
    parser.add_argument("--alone", type=int, default=1, help="GPUs that train one model at a time")
    parser.add_argument("--seeds", type=int, default=3, help="around each optimum")
    parser.add_argument("--steps-factor", type=float, default=1.0, help="of the length of every run")
    parser.add_argument("--parts", nargs="+", default=[""], help="beginnings of names of parts")
    parser.add_argument("--sizes", nargs="+", default=[], help="only these, e.g. 256x4 for width 256 with 4 layers")
    parser.add_argument(
        "--resume-from", type=Path, nargs="+", default=[], help="results of former runs, which are not run again"
    )
    parser.add_argument("--toy", action="store_true", help="tiny models for a few steps")
    arguments = parser.parse_args(argv)
    arguments.work, arguments.output = arguments.work.resolve(), arguments.output.resolve()
    if arguments.command == "report":
        from evidence_report import report

        return report(arguments.output, parts_of(scale_of(arguments), MOCK, arguments.seeds)[0])
    return {"prepare": prepare, "run": run}[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
