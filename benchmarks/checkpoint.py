"""Host memory that saving takes beside the shards themselves, and how long training waits.

    python benchmarks/checkpoint.py --gigabytes 1 [--async-save] [--folder FOLDER]

One rank with as many bytes of weights and Adam state on the CPU, in matrices of 4 MiB to 64 MiB. Prints the peak of
the process's own memory (not backed by files) above what it had before, over the bytes that it saves; for
--async-save this is the copy in host memory and what writing it takes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mup import checkpoint
from megatron_mup.checkpoint.background import BackgroundSaver

SHAPES = ((1024, 1024), (4096, 1024), (4096, 4096))


def own_bytes() -> int:
    """Memory of this process that no file backs."""
    fields = Path("/proc/self/smaps_rollup").read_text().split()
    return 1024 * int(fields[fields.index("Anonymous:") + 1])


@contextmanager
def watched() -> Iterator[list[int]]:
    """A list to which the largest `own_bytes` inside, above what it was at entry, is appended at the end."""
    first, largest, peaks, ended = own_bytes(), [0], list[int](), threading.Event()

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


def main() -> None:
    """Saves three times and prints what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--folder", help="default: a temporary one")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="checkpoint-benchmark-"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    pieces = pieces_of(int(args.gigabytes * 1e9))
    total = sum(piece.tensor.nbytes for piece in pieces)
    saver = BackgroundSaver()

    def save(iteration: int) -> tuple[float, float]:
        manifest = checkpoint.Manifest(
            iteration=iteration, consumed_samples=0, config={}, parametrization=[], layout={}
        )
        start = time.perf_counter()
        if args.async_save:
            saver.start(folder, pieces, manifest, 1, None, lambda _: None)
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
        print(f"save {iteration}: training waited {waited:.2f} s of {whole:.2f} s")
    dist.destroy_process_group()
    if args.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
