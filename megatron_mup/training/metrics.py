"""What a run measures: collected without waiting for the device, brought to the host once per log interval."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from megatron_mup.config import Config
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.about import about_run
from megatron_mup.training.console import Interval, open_console
from megatron_mup.training.flops import flops_per_token, peak_flops
from megatron_mup.training.guard import BrokenRunError
from megatron_mup.training.routing import routing_metrics
from megatron_mup.training.sinks import open_sinks
from megatron_mup.training.stragglers import Stragglers

GIB = 1 << 30


class NonFiniteError(BrokenRunError):
    """A training loss or gradient norm that is infinite or not a number.

    Attributes:
        iteration: the first iteration where it was found.
        loss: its loss, nats per token.
        grad_norm: its gradient norm before clipping.
    """

    def __init__(self, iteration: int, loss: float, grad_norm: float) -> None:
        """Names the iteration and both numbers."""
        self.iteration, self.loss, self.grad_norm = iteration, loss, grad_norm
        super().__init__(
            f"iteration {iteration}: loss {loss}, gradient norm {grad_norm}. The weights since then are worthless; go "
            "on from an earlier checkpoint, with a lower --lr, a longer warm-up or a lower --clip-grad"
        )

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[int, float, float]]:
        """Pickles by its parts, so that it crosses process boundaries whole."""
        return type(self), (self.iteration, self.loss, self.grad_norm)


class StepTimer:
    """Adds up the time of a step's phases: host time on a CPU, time on the device's stream on a GPU.

    On a GPU a phase is the stretch between two events in the stream, which nobody waits for until :meth:`take`. A
    phase of the host (``data``) thus counts only where the device stood idle for it.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing timed yet."""
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times the block as part of ``phase``."""
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((phase, start, end))
        else:
            begin = time.perf_counter()
            yield
            self.add(phase, time.perf_counter() - begin)

    def add(self, phase: str, seconds: float) -> None:
        """Adds time that was measured elsewhere."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call. On a GPU it waits for the last phase to end there."""
        for phase, start, end in self._events:
            end.synchronize()
            self.add(phase, start.elapsed_time(end) / 1e3)
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds


@dataclass(frozen=True)
class _Step:
    """One step's numbers; ``measured`` is ``[2]`` on the device: loss and gradient norm."""

    iteration: int
    consumed_samples: int
    batch_size: int
    tokens: int
    learning_rates: dict[str, float]
    measured: torch.Tensor
    left_out: bool
    diagnostics: tuple[list[str], torch.Tensor] | None
    routing: torch.Tensor | None


class Metrics:
    """Takes what each step measures and gives it to console and sinks.

    Made and called on every rank alike, for all ranks must find a non-finite loss together; one rank shows and
    records. The clock starts with the object, so it is made right before the first step. As a context it is closed at
    the end; after an error without waiting for the device, which may be stuck.

    Args:
        config: the run's configuration.
        mesh: the run's mesh.
        vocab_size: token ids, unpadded.
        start_iteration: iterations done before; 0 for a new run.
        train_iters: iterations of the whole run.
        logging_rank: the rank that shows and records.

    Attributes:
        timer: times the phases of a step: ``with metrics.timer("data"): ...``.

    Raises:
        ConfigError: a sink that can't be opened: a foreign metrics file, a port that is taken.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        vocab_size: int,
        start_iteration: int,
        train_iters: int,
        logging_rank: int = 0,
    ) -> None:
        """Opens console and sinks on the logging rank and starts the clock."""
        logs = mesh.world.get_rank() == logging_rank
        self._sinks = open_sinks(config, start_iteration, about_run(config, mesh)) if logs else []
        self._console = open_console(config, train_iters, start_iteration) if logs else None
        self._report_files = (config.logging.metrics_file, config.logging.html_report) if logs else (None, None)
        self._device, self._devices = mesh.device, mesh.world.size()
        self._log_interval, self._train_iters = config.logging.log_interval, train_iters
        self._seq_length = config.training.seq_length
        self._flops = {
            "causal half": flops_per_token(config.model, self._seq_length, vocab_size, "half", config.moe),
            "causal full": flops_per_token(config.model, self._seq_length, vocab_size, "full", config.moe),
        }
        self._peak = None
        if mesh.device.type == "cuda":
            dtype = torch.bfloat16 if config.training.bf16 else torch.float32
            self._peak = peak_flops(torch.cuda.get_device_name(mesh.device), dtype)
        has_experts = config.moe.layers(config.model.num_layers)
        self._expert_layers = [layer for layer, has in enumerate(has_experts) if has]
        self._per_layer = config.moe.moe_per_layer_logging
        self._stragglers = Stragglers(mesh.device) if config.guard.log_straggler else None
        self.timer = StepTimer(mesh.device)
        self._pending: list[_Step] = []
        self._measured: list[tuple[float, float]] = []
        self._left_out = 0
        self._tokens = 0
        self._paused: dict[str, float] = {}
        self._interval_start = time.perf_counter()

    def record(
        self,
        iteration: int,
        consumed_samples: int,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        learning_rates: Mapping[str, float],
        batch_size: int,
        tokens: int,
        phases: Mapping[str, float] | None = None,
        left_out: bool = False,
        diagnostics: tuple[list[str], torch.Tensor] | None = None,
        routing: torch.Tensor | None = None,
    ) -> None:
        """Takes one step. Waits for the device only where a log interval, or the run, ends with it.

        Args:
            iteration: number of the step, from 1.
            consumed_samples: sequences trained on so far, this step's included.
            loss: 0-d on the device, mean over the global batch, nats per token; the same on all ranks.
            grad_norm: 0-d on the device, before clipping; the same on all ranks.
            learning_rates: by parameter class.
            batch_size: sequences of this step, over all ranks.
            tokens: input tokens of this step, over all ranks.
            phases: seconds by phase that :attr:`timer` hasn't seen.
            left_out: the optimizer didn't take the step (`training.guard`); its loss and gradient norm don't count.
            diagnostics: names and values of a diagnosis (`training.diagnostics`), the values on the device.
            routing: what the routers counted (`training.balancing`), on the device; None without experts.

        Raises:
            NonFiniteError: at the end of an interval in which a loss or gradient norm wasn't finite.
        """
        measured = torch.stack((loss.detach(), grad_norm.detach()))
        step = _Step(
            iteration,
            consumed_samples,
            batch_size,
            tokens,
            dict(learning_rates),
            measured,
            left_out,
            diagnostics,
            routing,
        )
        self._pending.append(step)
        self._tokens += tokens
        for phase, seconds in (phases or {}).items():
            self.timer.add(phase, seconds)
        if self._console is not None:
            self._console.advance(iteration)
        if iteration % self._log_interval == 0 or iteration == self._train_iters:
            self._end_interval(step)

    def record_eval(
        self, iteration: int, split: str, loss: float, bytes_per_token: float | None = None
    ) -> dict[str, float]:
        """Takes the result of an evaluation after ``iteration`` steps.

        Args:
            iteration: steps done.
            split: ``validation`` or ``test``.
            loss: nats per token.
            bytes_per_token: bytes of text per token of the split, where known.

        Returns:
            What was recorded, by name: ``lm loss``, ``perplexity`` and ``bits per byte`` where it is known.

        Raises:
            NonFiniteError: as :meth:`flush`.
        """
        self.flush()
        results = {"lm loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if bytes_per_token is not None:
            results["bits per byte"] = loss / math.log(2) / bytes_per_token
        self._write(iteration, {f"{split}/{name}": value for name, value in results.items()})
        if self._console is not None:
            self._console.evaluation(iteration, split, results)
        return results

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Keeps the block (``evaluation``, ``checkpoint``) out of step time and throughput; recorded under its name."""
        self._synchronize()
        begin = time.perf_counter()
        yield
        self._synchronize()
        self._paused[what] = self._paused.get(what, 0.0) + time.perf_counter() - begin

    def message(self, text: str) -> None:
        """A line for the reader, shown by the logging rank without tearing the progress bar."""
        if self._console is not None:
            self._console.message(text)

    def flush(self) -> None:
        """Records the steps taken so far; called on all ranks before a checkpoint, so that no broken one is saved.

        Raises:
            NonFiniteError: a loss or gradient norm among them isn't finite.
        """
        self._bring_to_host({})

    def close(self) -> None:
        """Records what is left and closes console and sinks.

        Raises:
            NonFiniteError: as :meth:`flush`.
        """
        try:
            self.flush()
        finally:
            self._close_outputs()

    def __enter__(self) -> Metrics:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Closes; after an error without asking the device for anything."""
        if kind is None:
            self.close()
        else:
            self._close_outputs()

    def _close_outputs(self) -> None:
        if self._console is not None:
            self._console.close()
        for sink in self._sinks:
            sink.close()
        self._write_report()

    def _write_report(self) -> None:
        """Writes ``--html-report``. The run is over, so a page that can't be made is told and changes nothing else."""
        metrics_file, html_report = self._report_files
        if metrics_file is None or html_report is None:
            return
        from megatron_mup.training.record import read_json_lines
        from megatron_mup.training.report import write_report

        try:
            write_report(read_json_lines(Path(metrics_file)), Path(html_report), Path(metrics_file).stem)
        except Exception as error:
            self.message(f"--html-report {html_report} could not be written: {error}")

    def _end_interval(self, step: _Step) -> None:
        """Measures the interval that ends with ``step``, and shows and records it."""
        self._synchronize()
        steps = len(self._measured) + len(self._pending) + self._left_out
        seconds = time.perf_counter() - self._interval_start - sum(self._paused.values())
        per_device = self._tokens / seconds / self._devices
        tflops = {name: per_device * flops / 1e12 for name, flops in self._flops.items()}
        mfu = {name: rate * 1e12 / self._peak for name, rate in tflops.items()} if self._peak else {}
        phases = {phase: total / steps for phase, total in self.timer.take().items()}
        ratios, slow = self._stragglers.compare(phases) if self._stragglers is not None else ({}, [])
        for line in slow:
            self.message(line)
        self._bring_to_host(
            {
                "throughput/tokens per s": self._tokens / seconds,
                "throughput/tokens per s per device": per_device,
                **{f"throughput/TFLOP/s per device ({name})": rate for name, rate in tflops.items()},
                **{f"throughput/MFU ({name})": share for name, share in mfu.items()},
                **{f"memory/{name}": size for name, size in memory(self._device).items()},
                "time/step": seconds / steps,
                **{f"time/{phase}": taken for phase, taken in phases.items()},
                **{f"straggler/{phase}": ratio for phase, ratio in ratios.items()},
                **{f"time/{what}": total for what, total in self._paused.items()},
            }
        )
        if self._console is not None:
            self._console.interval(
                Interval(
                    iteration=step.iteration,
                    consumed_samples=step.consumed_samples,
                    batch_size=step.batch_size,
                    loss=statistics.fmean(loss for loss, _ in self._measured) if self._measured else math.nan,
                    grad_norm=self._measured[-1][1] if self._measured else math.nan,
                    learning_rates=step.learning_rates,
                    step_seconds=seconds / steps,
                    tokens_per_s=self._tokens / seconds,
                    tokens_per_s_per_device=per_device,
                    tflops=tflops,
                    mfu=mfu,
                )
            )
        self._measured, self._left_out, self._tokens, self._paused = [], 0, 0, {}
        self._interval_start = time.perf_counter()

    def _bring_to_host(self, of_the_last: Mapping[str, float]) -> None:
        """Records the waiting steps, in one transfer; the last one together with ``of_the_last``."""
        steps, self._pending = self._pending, []
        if not steps:
            return
        for step, (loss, grad_norm) in zip(steps, torch.stack([s.measured for s in steps]).tolist(), strict=True):
            if step.left_out:
                self._left_out += 1
                found = {"train/left out": 1.0}
            elif not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self._flush_sinks()
                raise NonFiniteError(step.iteration, loss, grad_norm)
            else:
                self._measured.append((loss, grad_norm))
                found = {"train/lm loss": loss, "train/grad norm": grad_norm}
            scalars = {
                **found,
                "train/batch size": step.batch_size,
                "train/consumed samples": step.consumed_samples,
                "train/consumed tokens": step.consumed_samples * self._seq_length,
                **{f"lr/{name}": rate for name, rate in step.learning_rates.items()},
            }
            if step.diagnostics is not None:
                names, values = step.diagnostics
                scalars |= {f"diagnostics/{name}": v for name, v in zip(names, values.tolist(), strict=True)}
            if step.routing is not None:
                scalars |= routing_metrics(step.routing.cpu(), self._expert_layers, self._per_layer)
            self._write(step.iteration, {**scalars, **(of_the_last if step is steps[-1] else {})}, flush=False)
        self._flush_sinks()

    def _write(self, iteration: int, scalars: Mapping[str, float], flush: bool = True) -> None:
        for sink in self._sinks:
            sink.write(iteration, scalars)
        if flush:
            self._flush_sinks()

    def _flush_sinks(self) -> None:
        for sink in self._sinks:
            sink.flush()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def memory(device: torch.device) -> dict[str, float]:
    """Most memory used since the start of the process, GiB: resident on the host; allocated and reserved on a GPU."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    sizes = {"max host resident GiB": resident / GIB}
    if device.type == "cuda":
        sizes["max allocated GiB"] = torch.cuda.max_memory_allocated(device) / GIB
        sizes["max reserved GiB"] = torch.cuda.max_memory_reserved(device) / GIB
    return sizes
