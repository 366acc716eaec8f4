"""What looks at the loop's own speed: a trace of some steps, and when Python collects garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

from megatron_mup.config import Config


class StepTrace:
    """Traces the steps that ``--profile-step-start`` and ``--profile-step-end`` name, on the ranks that are to.

    Args:
        config: the run's configuration.
        rank: this one, among all.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self._flags, self._rank = config.logging, rank
        self._profiler: torch.profiler.profile | None = None

    def begin(self, iteration: int) -> None:
        """Step ``iteration`` (the first is 1) is about to run."""
        flags = self._flags
        if flags.profile and self._rank in flags.profile_ranks and iteration == flags.profile_step_start:
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def end(self, iteration: int) -> Path | None:
        """Step ``iteration`` has run; the file, if the trace ends with it. Waits for the device then."""
        last = iteration >= self._flags.profile_step_end
        return self._write(iteration) if self._profiler is not None and last else None

    def _write(self, iteration: int) -> Path:
        assert self._profiler is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder = Path(self._flags.profile_dir)
        file = folder / f"rank{self._rank}-steps{self._flags.profile_step_start}-{iteration}.json.gz"
        profiler.export_chrome_trace(str(file))
        return file

    def __enter__(self) -> StepTrace:
        """The trace itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        """Throws away a trace whose last step did not come."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


@contextmanager
def garbage_collection(config: Config) -> Iterator[None]:
    """With ``--manual-gc`` nothing is collected inside but by `collect_garbage`; without, nothing changes."""
    if not config.training.manual_gc:
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def collect_garbage(config: Config, iteration: int) -> None:
    """Collects after an iteration that ``--manual-gc-interval`` names."""
    interval = config.training.manual_gc_interval
    if config.training.manual_gc and interval is not None and iteration % interval == 0:
        gc.collect()
