"""The training loop: data in, steps, evaluations, saves, and out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from megatron_mup.config import Config, ConfigError
from megatron_mup.data.loader import BatchLoader, build_datasets
from megatron_mup.data.tokenizer import build_tokenizer
from megatron_mup.models.build import build_model
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.optim.optimizer import peak_learning_rates
from megatron_mup.optim.schedule import LRSchedule
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.batch_size import BatchSizeRamp
from megatron_mup.training.checkpointing import Checkpointer, Progress
from megatron_mup.training.deepspeed_engine import DeepSpeedStep
from megatron_mup.training.diagnostics import Diagnostics
from megatron_mup.training.forward_backward import Batch
from megatron_mup.training.guard import BrokenRunError, Guard
from megatron_mup.training.launch import shorten_timeouts
from megatron_mup.training.metrics import Metrics
from megatron_mup.training.profiling import StepTrace, collect_garbage, garbage_collection
from megatron_mup.training.replicas import check_replicas
from megatron_mup.training.signals import EXIT_FINISHED, EXIT_STOPPED, StopRequest
from megatron_mup.training.step import TrainStep, always
from megatron_mup.training.watchdog import Watchdog


def vocabulary_size(config: Config) -> int:
    """Token ids of the run: ``--vocab-size``, or the tokenizer's.

    Raises:
        ConfigError: neither is given, or the flag is smaller than the tokenizer's vocabulary.
    """
    data, flag = config.data, config.model.vocab_size
    if data.tokenizer_type is None or data.tokenizer_type == "NullTokenizer":
        if flag is None:
            raise ConfigError("--vocab-size", "not given, and there is no tokenizer to ask", "give one of the two")
        return flag
    size = build_tokenizer(data.tokenizer_type, data.tokenizer_model).vocab_size
    if flag is not None and flag < size:
        raise ConfigError(
            f"--vocab-size {flag}", f"the tokenizer has {size} ids", f"leave the flag out, or give {size} or more"
        )
    return flag or size


@dataclass(frozen=True)
class Length:
    """How long the run is: iterations and samples, whichever of the two was given."""

    iterations: int
    samples: int

    @classmethod
    def of(cls, config: Config, ramp: BatchSizeRamp) -> Length:
        """Length from ``--train-iters`` or ``--train-samples`` and the batch-size ramp."""
        training = config.training
        iterations = training.train_iters
        if iterations is None:
            assert training.train_samples is not None
            iterations = ramp.iterations_within(training.train_samples)
        return cls(iterations, ramp.samples_after(iterations))


class Trainer:
    """A run on one rank.

    Args:
        config: validated configuration.
        vocab_size: number of token ids.
        mesh: the run's mesh.
    """

    def __init__(self, config: Config, vocab_size: int, mesh: Mesh) -> None:
        self.config, self.vocab_size, self.mesh = config, vocab_size, mesh
        self.ramp = BatchSizeRamp(config, mesh.dp_size)
        self.length = Length.of(config, self.ramp)
        self.schedule = LRSchedule.from_config(config, self.ramp.full)
        self.train_data, self.valid_data = self._loaders()
        step = DeepSpeedStep if config.parallel.distributed_engine == "deepspeed" else TrainStep
        self.step = step(build_model(config, vocab_size, mesh), config, mesh)
        self.diagnostics = Diagnostics(self.step, config, mesh)
        # Of all stages: the rank that logs holds one.
        metas = parameter_metas(config, vocab_size)
        self.peak_rates = {p.optimizer.optimizer: peak_learning_rates(metas, p) for p in config.phases().values()}
        self.guard, self.rollbacks = Guard(config), 0
        self.watchdog = Watchdog(config.guard.watchdog_minutes, mesh.world.get_rank(), lambda: self.under_way)
        self.checkpointer = Checkpointer(config, vocab_size, mesh, self.step, self.guard)
        self.progress = self.checkpointer.resume_or_initialise()
        self.under_way = self.progress.iteration + 1
        self.stop_reason: str | None = None

    def train(self) -> int:
        """Runs to the end, or until something asks to stop; returns the process's exit code."""
        config, training = self.config, self.config.training
        exit_code, evaluated = EXIT_FINISHED, False
        metrics = Metrics(config, self.mesh, self.vocab_size, self.progress.iteration, self.length.iterations)
        stop = StopRequest(training.exit_duration_in_mins, self.mesh.device)
        trace = StepTrace(config, self.mesh.world.get_rank())
        with metrics, stop, self.watchdog, trace, garbage_collection(config):
            self.checkpointer.tell(metrics.message)
            first = self.progress.iteration + 1
            while self.progress.iteration < self.length.iterations:
                trace.begin(self.progress.iteration + 1)
                self._one_iteration(metrics, stop)
                if (file := trace.end(self.progress.iteration)) is not None:
                    metrics.message(f"trace of steps up to {self.progress.iteration}: {file}")
                collect_garbage(config, self.progress.iteration)
                if self.progress.iteration == first:
                    shorten_timeouts(config)
                if self.guard.exhausted:
                    self._roll_back(metrics)
                    continue
                done = self.progress.iteration
                if self._is_due(config.guard.check_weight_hash_across_dp_replicas_interval):
                    with self.watchdog.phase("comparing replicas"), metrics.pause("comparing replicas"):
                        check_replicas(self.step.main.params, self.mesh, done)
                evaluated = self._is_due(training.evaluation_interval)
                if evaluated:
                    self._evaluate(metrics)
                if self._is_due(config.checkpoint.save_interval):
                    self._save(metrics)
                elif done < self.length.iterations and self._is_due(config.checkpoint.non_persistent_save_interval):
                    self._save(metrics, persistent=False)
                if self.stop_reason and done < self.length.iterations:
                    metrics.message(f"stopping after iteration {done}: {self.stop_reason}")
                    exit_code = EXIT_STOPPED
                    break
                if self._is_due(training.exit_interval):
                    break
            else:
                if training.evaluation_interval and not evaluated:
                    self._evaluate(metrics)
            self._save(metrics)
            self.checkpointer.finish()
        return exit_code

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.iteration % interval == 0

    def _save(self, metrics: Metrics, persistent: bool = True) -> None:
        """Saves unless this iteration is saved; a run with a broken loss stops before."""
        if self.checkpointer.is_saved(self.progress):
            return
        metrics.flush()
        with self.watchdog.phase("checkpoint"), metrics.pause("checkpoint"):
            self.checkpointer.save(self.progress, persistent)

    def __enter__(self) -> Trainer:
        """The trainer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: object) -> None:
        """Frees the step's CUDA graph and stops the data loaders; finishes the save under way where all ranks leave
        together.
        """
        self.step.close()
        if kind is not None and issubclass(kind, BrokenRunError):
            self.checkpointer.finish()
        for loader in (self.train_data, self.valid_data):
            if loader is not None:
                loader.close()

    def _one_iteration(self, metrics: Metrics, stop: StopRequest) -> None:
        progress = self.progress
        self.under_way = progress.iteration + 1
        size = self.ramp.global_batch_size(progress.consumed_samples)
        by_samples = self.config.training.train_samples is not None
        factor = self.schedule.factor(progress.consumed_samples if by_samples else progress.iteration)
        phase = self.config.at_iteration(progress.iteration)
        if progress.iteration == self.config.optimizer.optimizer_switch_at:
            # What the first optimizer kept is freed, but not while it is being saved.
            self.checkpointer.finish()
        if self.step.optimizer.advance(progress.iteration):
            metrics.message(f"from iteration {progress.iteration} on the optimizer is {phase.optimizer.optimizer}")
            if phase.optimizer.print_optimizer_plan:
                metrics.message(self.step.optimizer.plan())
        timer = self.watchdog.over(metrics.timer)
        with timer("data"):
            batch = self.batch(progress.consumed_samples, size)
        gate = self.guard.accepts if self.guard.looks else always
        take = partial(self.step, batch, factor, stop.local(), timer, gate)
        interval, diagnostics = self.config.logging.diagnostics_interval, None
        if interval is not None and (progress.iteration + 1) % interval == 0:
            result, diagnostics = self.diagnostics.around(batch, take)
        else:
            result = take()
        stop.submit(result.request)
        self.stop_reason = self._agreed(stop)
        self.progress = Progress(progress.iteration + 1, progress.consumed_samples + size)
        with self.watchdog.phase("waiting for the device"):  # at the end of a log interval
            metrics.record(
                iteration=self.progress.iteration,
                consumed_samples=self.progress.consumed_samples,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rates={
                    name: peak * factor for name, peak in self.peak_rates[phase.optimizer.optimizer].items()
                },
                batch_size=size,
                tokens=size * self.config.training.seq_length,
                left_out=self.guard.reason is not None,
                diagnostics=diagnostics,
                routing=result.routing,
            )
        if self.guard.reason is not None:
            metrics.message(f"iteration {self.progress.iteration} left out: {self.guard.reason}")

    def _agreed(self, stop: StopRequest) -> str | None:
        """Why the run stops; waits on a GPU for the step before the one under way."""
        self.under_way -= 1
        with self.watchdog.phase("waiting for the device"):
            reason = stop.agreed()
        self.under_way += 1
        return reason

    def _roll_back(self, metrics: Metrics) -> None:
        """Goes back to the last checkpoint of this run, but on in the data.

        Raises:
            BrokenRunError: there is none, or the run has gone back as often as it may.
        """
        broken = self.progress
        reason = f"{self.guard.skipped} steps in a row were left out up to iteration {broken.iteration}"
        if self.rollbacks == self.config.guard.max_rollbacks:
            raise BrokenRunError(
                f"{reason}, and the run has gone back to a checkpoint {self.rollbacks} times (--max-rollbacks). Look "
                "at the data, or go on from a checkpoint with a lower --lr"
            )
        metrics.flush()
        with metrics.pause("checkpoint"):
            saved = self.checkpointer.last_saved()
        if saved is None:
            raise BrokenRunError(f"{reason}; this run has saved no checkpoint to go back to (--save, --save-interval)")
        self.rollbacks += 1
        self.guard.restart()
        self.progress = Progress(saved.iteration, broken.consumed_samples)
        metrics.message(
            f"{reason}: back to iteration {saved.iteration}, without samples {saved.consumed_samples} to "
            f"{broken.consumed_samples}"
        )

    def batch(self, consumed_samples: int, size: int) -> Batch:
        """This rank's samples, on the device, of the global batch of ``size`` that follows ``consumed_samples``."""
        # After samples were passed over the last steps find none left; they start from the front again.
        if consumed_samples + size > self.length.samples:
            consumed_samples = max(0, consumed_samples - self.length.samples)
        return self._to_device(self.train_data.batches(consumed_samples, size))

    def _evaluate(self, metrics: Metrics) -> None:
        """Mean loss over the first ``--eval-iters`` global batches of the validation split, the same ones each time."""
        if self.valid_data is None:
            return
        totals, size = torch.zeros(2, device=self.mesh.device), self.ramp.full
        with self.watchdog.phase("evaluation"), metrics.pause("evaluation"):
            for index in range(self.config.training.eval_iters):
                totals += self.step.evaluate(self._to_device(self.valid_data.batches(index * size, size)))
            loss, tokens = totals.tolist()
        metrics.record_eval(self.progress.iteration, "validation", loss / tokens)

    def _loaders(self) -> tuple[BatchLoader, BatchLoader | None]:
        training, data = self.config.training, self.config.data
        # Megatron's numbers: the sample order depends on them.
        interval = training.evaluation_interval
        evaluations = self.length.iterations // interval + 1 if interval else 0
        valid_samples = evaluations * training.eval_iters * self.ramp.full
        train, valid, _ = build_datasets(self.config, self.length.samples, valid_samples, 0, self.vocab_size)

        def loader(dataset: object) -> BatchLoader:
            return BatchLoader(
                dataset,
                training.micro_batch_size,
                self.mesh.dp_rank,
                self.mesh.dp_size,
                training.seed,
                data.dataloader_type,
                data.num_workers,
                pin_memory=self.mesh.device.type == "cuda",
            )

        if train is None:
            raise ConfigError("--train-iters 0", "the run has no training step", "give a positive number")
        return loader(train), None if valid is None else loader(valid)

    def _to_device(self, batch: Batch) -> Batch:
        """Moves what the model reads; positions and documents only where the flags ask for them."""
        data = self.config.data
        wanted = {"tokens", "labels", "sample_index"}
        if data.reset_position_ids:
            wanted.add("position_ids")
        if data.reset_attention_mask:
            wanted.add("document_ids")
        return {k: v.to(self.mesh.device, non_blocking=True) for k, v in batch.items() if k in wanted}
