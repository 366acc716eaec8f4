"""The global batch over a run: constant, or ramped up over the first samples."""

from __future__ import annotations

from megatron_mup.config import Config, ConfigError


class BatchSizeRamp:
    """Sequences per step as a function of the samples consumed, with the semantics of Megatron-LM's calculator.

    Over ``SAMPLES`` samples the batch grows from ``START`` to the full size in ``(full - START) / INCREMENT`` equal
    stages (``--rampup-batch-size START INCREMENT SAMPLES``); Megatron's float division is done in integers here.
    Without a ramp the batch is constant. Sizes are never rounded to fit the ranks: that would let the layout change
    the run.

    Attributes:
        full: global batch size after the ramp.
    """

    def __init__(self, config: Config, dp_size: int) -> None:
        """Ramp of a run on ``dp_size`` data-parallel ranks.

        Raises:
            ConfigError: a size on the way that micro-batch size x data-parallel size doesn't divide, or a ramp that
                doesn't end at the full size.
        """
        training = config.training
        quantum = training.micro_batch_size * dp_size
        self.full = training.global_batch_size if training.global_batch_size is not None else quantum
        self._start, self._increment, self._samples = training.rampup_batch_size or (self.full, 0, 0)
        what = f"--global-batch-size {self.full}"
        if training.rampup_batch_size is not None:
            what = f"--rampup-batch-size {self._start} {self._increment} {self._samples}"
            growth = self.full - self._start
            if self._start <= 0 or self._increment <= 0 or self._samples < 0:
                raise ConfigError(what, "start and increment must be positive, samples not negative", "mend the ramp")
            if growth < 0 or growth % self._increment:
                raise ConfigError(
                    what,
                    f"steps of {self._increment} from {self._start} don't end at --global-batch-size {self.full}",
                    "choose an increment that divides the difference",
                )
        self._stages = (self.full - self._start) // self._increment if self._increment else 0
        for size in (self._start, self.full, self._start + self._increment * min(1, self._stages)):
            if size <= 0 or size % quantum:
                raise ConfigError(
                    what,
                    f"a batch of {size} sequences can't be shared out: micro-batch size {training.micro_batch_size} "
                    f"x data-parallel size {dp_size} = {quantum}",
                    f"use sizes that are multiples of {quantum}, or another --micro-batch-size",
                )

    def global_batch_size(self, consumed_samples: int) -> int:
        """Sequences of the step that starts after ``consumed_samples`` samples."""
        if consumed_samples >= self._samples:
            return self.full
        return self._start + self._increment * (consumed_samples * self._stages // self._samples)

    def samples_after(self, iterations: int) -> int:
        """Samples consumed by the first ``iterations`` steps."""
        done, consumed = self._walk(max_iterations=iterations)
        return consumed + (iterations - done) * self.full

    def iterations_within(self, samples: int) -> int:
        """Steps that ``samples`` samples suffice for; a last partial batch is dropped."""
        done, consumed = self._walk(max_samples=samples)
        return done + max(0, samples - consumed) // self.global_batch_size(consumed)

    def _walk(self, max_iterations: int | None = None, max_samples: int | None = None) -> tuple[int, int]:
        """Steps and samples of the ramp, as far as the bounds allow."""
        done = consumed = 0
        while consumed < self._samples and done != max_iterations:
            size = self.global_batch_size(consumed)
            if max_samples is not None and consumed + size > max_samples:
                break
            done, consumed = done + 1, consumed + size
        return done, consumed
