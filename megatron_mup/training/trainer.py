"""The training loop: data in, steps, evaluations, saves, and out."""

from __future__ import annotations

from dataclasses import dataclass

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
from megatron_mup.training.forward_backward import Batch
from megatron_mup.training.metrics import Metrics
from megatron_mup.training.signals import EXIT_FINISHED, EXIT_STOPPED, StopRequest
from megatron_mup.training.step import TrainStep


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
        self.step = TrainStep(build_model(config, vocab_size, mesh), config, mesh)
        # Of all stages: the rank that logs holds one.
        self.peak_rates = peak_learning_rates(parameter_metas(config, vocab_size), config)
        self.checkpointer = Checkpointer(config, vocab_size, mesh, self.step)
        self.progress = self.checkpointer.resume_or_initialise()

    def train(self) -> int:
        """Runs to the end, or until something asks to stop; returns the process's exit code."""
        config, training = self.config, self.config.training
        exit_code, evaluated = EXIT_FINISHED, False
        metrics = Metrics(config, self.mesh, self.vocab_size, self.progress.iteration, self.length.iterations)
        stop = StopRequest(training.exit_duration_in_mins, self.mesh.device)
        with metrics, stop:
            self.checkpointer.tell(metrics.message)
            while self.progress.iteration < self.length.iterations:
                self._one_iteration(metrics, stop)
                done = self.progress.iteration
                evaluated = self._is_due(training.eval_interval)
                if evaluated:
                    self._evaluate(metrics)
                if self._is_due(config.checkpoint.save_interval):
                    self._save(metrics)
                if (reason := stop.agreed()) and done < self.length.iterations:
                    metrics.message(f"stopping after iteration {done}: {reason}")
                    exit_code = EXIT_STOPPED
                    break
                if self._is_due(training.exit_interval):
                    break
            else:
                if training.eval_interval and not evaluated:
                    self._evaluate(metrics)
            self._save(metrics)
        return exit_code

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.iteration % interval == 0

    def _save(self, metrics: Metrics) -> None:
        """Saves unless this iteration is saved; a run with a broken loss stops before."""
        if self.checkpointer.is_saved(self.progress):
            return
        metrics.flush()
        with metrics.pause("checkpoint"):
            self.checkpointer.save(self.progress)

    def __enter__(self) -> Trainer:
        """The trainer itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Stops the data loaders."""
        for loader in (self.train_data, self.valid_data):
            if loader is not None:
                loader.close()

    def _one_iteration(self, metrics: Metrics, stop: StopRequest) -> None:
        progress = self.progress
        size = self.ramp.global_batch_size(progress.consumed_samples)
        by_samples = self.config.training.train_samples is not None
        factor = self.schedule.factor(progress.consumed_samples if by_samples else progress.iteration)
        with metrics.timer("data"):
            batch = self._to_device(self.train_data.batches(progress.consumed_samples, size))
        result = self.step(batch, factor, stop.local(), metrics.timer)
        stop.submit(result.request)
        self.progress = Progress(progress.iteration + 1, progress.consumed_samples + size)
        metrics.record(
            iteration=self.progress.iteration,
            consumed_samples=self.progress.consumed_samples,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rates={name: peak * factor for name, peak in self.peak_rates.items()},
            batch_size=size,
            tokens=size * self.config.training.seq_length,
        )

    def _evaluate(self, metrics: Metrics) -> None:
        """Mean loss over the first ``--eval-iters`` global batches of the validation split, the same ones each time."""
        if self.valid_data is None:
            return
        totals, size = torch.zeros(2, device=self.mesh.device), self.ramp.full
        with metrics.pause("evaluation"):
            for index in range(self.config.training.eval_iters):
                totals += self.step.evaluate(self._to_device(self.valid_data.batches(index * size, size)))
            loss, tokens = totals.tolist()
        metrics.record_eval(self.progress.iteration, "validation", loss / tokens)

    def _loaders(self) -> tuple[BatchLoader, BatchLoader | None]:
        training, data = self.config.training, self.config.data
        # Megatron's numbers: the sample order depends on them.
        evaluations = self.length.iterations // training.eval_interval + 1 if training.eval_interval else 0
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
