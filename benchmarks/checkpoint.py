"""How long training waits for saving, and the host memory that saving takes beside the shards themselves.

    python benchmarks/checkpoint.py --gigabytes 1 [--async-save] [--folder FOLDER]
    python benchmarks/checkpoint.py --preset dense-1b [--tokens-per-step 524288] [--json] [any flag]

The first form: one rank with as many bytes of weights and Adam state on the CPU, in matrices of 4 MiB to 64 MiB. Prints
the peak of the process's own memory (not backed by files) above what it had before, over the bytes that it saves; for
--async-save this is the copy in host memory and what writing it takes.

The second form: the trainer's own steps, of a preset of train_step.py, with a save in between. Each row is a save and
the steps from it until it is on the disk; what they took beyond as many steps as before and after it is what it costs.
``async`` is --async-save, ``async, copied first`` waits for the copies in host memory before the next step, and
``plain`` is without --async-save. Times are the device's, where there is a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train_step import PRESETS, prepare, preset

from megatron_mup import checkpoint
from megatron_mup.checkpoint.background import BackgroundSaver
from megatron_mup.config.cli import parse_config
from megatron_mup.config.validate import validate
from megatron_mup.training.checkpointing import Checkpointer, Progress
from megatron_mup.training.guard import Guard
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.training.trainer import vocabulary_size

SHAPES = ((1024, 1024), (4096, 1024), (4096, 4096))


def own_bytes() -> int:
    """Memory of this process that no file backs; with what files back, where the kernel doesn't tell them apart."""
    fields = Path("/proc/self/status").read_text().split()
    return 1024 * int(fields[fields.index("RssAnon:" if "RssAnon:" in fields else "VmRSS:") + 1])


@contextmanager
def watched(first: int | None = None) -> Iterator[list[int]]:
    """A list to which the largest `own_bytes` inside, above ``first`` (default: at entry), is appended at the end."""
    first = own_bytes() if first is None else first
    largest, peaks, ended = [0], list[int](), threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            largest[0] = max(largest[0], own_bytes() - first)

    thread = threading.Thread(target=watch)
    thread.start()
    yield peaks
    ended.set()
    thread.join()
    peaks.append(largest[0])


def pieces_of(total: int) -> list[checkpoint.Piece]:
    """Shards of about ``total`` bytes, in fp32."""
    pieces, size, layer = [], 0, 0
    while size < total:
        for shape in SHAPES:
            for kind in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
                tensor = torch.ones(shape)
                pieces.append(checkpoint.Piece(f"{kind}/{layer}.{shape[0]}x{shape[1]}", tensor, shape, (0, 0)))
                size += tensor.nbytes
        layer += 1
    return pieces


def save_synthetic(gigabytes: float, async_save: bool, folder: Path) -> None:
    """Saves three times and prints what each took."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    pieces = pieces_of(int(gigabytes * 1e9))
    total = sum(piece.tensor.nbytes for piece in pieces)
    saver = BackgroundSaver()

    def save(iteration: int) -> tuple[float, float]:
        manifest = checkpoint.Manifest(
            iteration=iteration, consumed_samples=0, config={}, parametrization=[], layout={}
        )
        start = time.perf_counter()
        if async_save:
            saver.start(folder, pieces, manifest, 1, None, lambda _: None)
            saver.before_update()
        else:
            checkpoint.save(folder, pieces, manifest, keep_last=1)
        waited = time.perf_counter() - start
        saver.finish()
        return waited, time.perf_counter() - start

    with watched() as peaks:
        times = [save(iteration) for iteration in range(3)]
    print(
        f"{len(pieces)} shards, {total / 1e9:.3f} GB: own memory at most {peaks[0] / 1e9:.3f} GB above the shards "
        f"({peaks[0] / total:.3f} of them)"
    )
    for iteration, (waited, whole) in enumerate(times):
        print(f"save {iteration}: training waited {waited:.2f} s of {whole:.2f} s, if it changes the shards at once")


class Laps:
    """Seconds between marks: the device's time on a GPU, else wall time."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """A lap ends, and the next begins."""
        now: Any = time.perf_counter()
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append(now)

    def seconds(self) -> list[float]:
        """Each lap; waits for the device."""
        if not self.on_gpu:
            return [after - before for before, after in pairwise(self.marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self.marks)]


class SavingRun:
    """The trainer's step and its checkpoints.

    Args:
        flags: of `pretrain.py`.
        folder: to save to.
    """

    def __init__(self, flags: list[str], folder: Path) -> None:
        launch = Launch.from_environment()
        config = parse_config([*flags, "--save", str(folder), "--async-save", "--keep-last", "1"]).config
        validate(config, launch.world_size)
        self.device = init_process_group(config, launch)
        self.step, self.batch = prepare(config, self.device)
        plain = replace(config, checkpoint=replace(config.checkpoint, async_save=False))
        vocab_size, guard = vocabulary_size(config), Guard(config)
        self.plain, self.background = (
            Checkpointer(c, vocab_size, self.step.mesh, self.step, guard) for c in (plain, config)
        )
        self.steps(2)  # what they allocate is no copy
        self.own_before, begin = own_bytes(), time.perf_counter()
        self.background.resume_or_initialise()
        self.background.finish()
        self.preparation, self.iteration = time.perf_counter() - begin, 0

    def steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps."""
        laps = Laps(self.device)
        laps.mark()
        for _ in range(count):
            self.step(self.batch, 1.0)
            laps.mark()
        return laps.seconds()

    def save(self, saver: Checkpointer, copied_first: bool, count: int) -> dict[str, Any]:
        """What a save costs beyond steps without one: the median of ``count`` before it and as many after it."""
        self.iteration += 1
        before = self.steps(count)
        laps = Laps(self.device)
        # As the trainer, which looks at the loss before it saves.
        torch.cuda.synchronize() if laps.on_gpu else None
        laps.mark()
        begin = time.perf_counter()
        saver.save(Progress(self.iteration, 0))
        if copied_first:
            self.step.before_update()
            torch.cuda.synchronize() if laps.on_gpu else None
        returned = time.perf_counter() - begin
        written, taken = None, 0
        with watched(self.own_before) as peaks:
            while written is None or taken < 2:
                self.step(self.batch, 1.0)
                laps.mark()
                taken += 1
                # The host runs ahead of the device by less than a step, for a step is long.
                if written is None and not any(thread.name == "checkpoint" for thread in threading.enumerate()):
                    written = time.perf_counter() - begin
        each = laps.seconds()
        saver.finish()
        after = self.steps(count)
        without = statistics.median(before + after)
        return {
            "call_s": round(returned, 4),
            "written_after_s": round(written, 2),
            "steps": taken,
            "longer_by_s": round(sum(each) - taken * without, 4),
            "first_step_longer_by_s": round(each[0] - without, 4),
            "step_without_s": [round(statistics.median(part), 4) for part in (before, after)],
            "step_s": [round(seconds, 4) for seconds in each],
            "own_memory_gb": round(peaks[0] / 1e9, 3),
        }


def save_while_training(flags: list[str], count: int, folder: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    """Saves of each kind, a row of each to ``tell``; at the end the facts that they share."""
    run = SavingRun(flags, folder)
    kinds = {
        "async": (run.background, False),
        "async, copied first": (run.background, True),
        "plain": (run.plain, False),
    }
    facts: dict[str, Any] = {"host_memory_made_in_s": round(run.preparation, 2)}
    if run.device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for kind in ("async", "async", "async, copied first", "plain"):
        tell({"save": kind} | run.save(*kinds[kind], count))
        facts["checkpoint_gb"] = round(sum(file.stat().st_size for file in folder.glob("iter_*/*")) / 1e9, 3)
        tell(facts)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gigabytes", type=float)
    what.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--tokens-per-step", type=int, default=524288)
    parser.add_argument("--steps", type=int, default=3, help="without a save, before and after each")
    parser.add_argument("--folder", help="default: a temporary one")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    args, rest = parser.parse_known_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="checkpoint-benchmark-"))
    if args.gigabytes is not None:
        save_synthetic(args.gigabytes, args.async_save, folder)
    else:
        flags = [*preset(args.preset), "--main-params-dtype", "fp32", *rest]
        if "--global-batch-size" not in rest:
            seq_length = parse_config(flags).config.training.seq_length
            flags += ["--global-batch-size", str(args.tokens_per_step // seq_length)]

        def tell(row: dict[str, Any]) -> None:
            print(json.dumps(row) if args.json else "; ".join(f"{k} {v}" for k, v in row.items()), flush=True)

        save_while_training(flags, args.steps, folder, tell)
    dist.destroy_process_group()
    if args.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
