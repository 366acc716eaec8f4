"""What of a run goes into a checkpoint, and how a run starts from one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_mup.checkpoint.compare import compare_configs, told_differences
from megatron_mup.checkpoint.load import find, load, load_rng
from megatron_mup.checkpoint.manifest import Manifest, layout_sizes
from megatron_mup.checkpoint.save import clean, save
from megatron_mup.checkpoint.state import Piece, checkpoint_pieces
from megatron_mup.config import Config, ConfigError, to_dict
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.report import table_rows
from megatron_mup.training.step import TrainStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps done and training samples consumed."""

    iteration: int = 0
    consumed_samples: int = 0


class Checkpointer:
    """Saves a run and starts it where it was saved.

    Args:
        config: the run's configuration.
        vocab_size: number of token ids.
        mesh: the run's mesh.
        step: model and optimizer.
    """

    def __init__(self, config: Config, vocab_size: int, mesh: Mesh, step: TrainStep) -> None:
        self.config, self.mesh, self.step = config, mesh, step
        self._table = table_rows(parameter_metas(config, vocab_size), config)
        self._saved: Progress | None = None
        self._tell: Callable[[str], None] = log.info
        if config.checkpoint.save:
            clean(config.checkpoint.save)

    def tell(self, how: Callable[[str], None]) -> None:
        """Says from now on what it does through ``how``."""
        self._tell = how

    def is_saved(self, progress: Progress) -> bool:
        """Whether there is nothing to save: no folder, or this progress is in it."""
        return self.config.checkpoint.save is None or self._saved == progress

    def save(self, progress: Progress) -> None:
        """Saves model, optimizer, random state and progress. Collective.

        Raises:
            ConfigError: it can't be written; earlier checkpoints stay.
        """
        flags = self.config.checkpoint
        assert flags.save is not None
        manifest = Manifest(
            iteration=progress.iteration,
            consumed_samples=progress.consumed_samples,
            config=to_dict(self.config),
            parametrization=self._table,
            layout=layout_sizes(self.mesh),
            optimizer={} if flags.no_save_optim else self.step.optimizer.state_scalars(),
        )
        path = save(flags.save, self._pieces(with_optimizer=not flags.no_save_optim), manifest, flags.keep_last)
        self._saved = progress
        self._tell(f"saved {path}")

    def resume_or_initialise(self) -> Progress:
        """Loads what the flags say, or draws initial values. Collective.

        Raises:
            ConfigError: nothing to load though it must be; a checkpoint that is damaged, of another architecture, or
                of another schedule.
        """
        flags = self.config.checkpoint
        path = find(flags.load, flags.ckpt_step) if flags.load else None
        if path is None:
            if flags.load and flags.exit_on_missing_checkpoint:
                raise ConfigError(f"--load {flags.load}", "holds no checkpoint", "correct the path")
            self.step.main.initialise()
            return Progress()
        return self._load(path)

    def _load(self, path: Path) -> Progress:
        flags = self.config.checkpoint
        with_optimizer = not (flags.finetune or flags.no_load_optim)
        manifest = load(path, self._pieces(with_optimizer), self.config)
        self.step.main.publish()
        if flags.finetune:
            return Progress()
        if with_optimizer:
            self.step.optimizer.load_state_scalars(manifest.optimizer)
        # Flags that change what the model computes, but no shape: the tensors fit, the run wouldn't be the same.
        differences = compare_configs(manifest.config, self.config, "architecture")
        if differences:
            raise ConfigError(
                f"--load {path}",
                f"a checkpoint of another architecture: {told_differences(differences)}",
                "use the checkpoint's flags, or --finetune to start a new run from its weights",
            )
        differences = compare_configs(manifest.config, self.config, "schedule")
        if differences and not flags.override_opt_param_scheduler:
            raise ConfigError(
                f"--load {path}",
                f"the schedule is another: {told_differences(differences)}",
                "give the same flags, or --override-opt-param-scheduler to go on with the new ones",
            )
        if not flags.no_load_rng:
            load_rng(path, layout_sizes(self.mesh))
        progress = Progress(manifest.iteration, manifest.consumed_samples)
        if flags.save and Path(flags.save).absolute() == path.parent:
            self._saved = progress
        if dist.get_rank() == 0:
            print(f"resumed from {path}: iteration {progress.iteration}, {progress.consumed_samples} samples consumed")
        return progress

    def _pieces(self, with_optimizer: bool) -> list[Piece]:
        state = self.step.optimizer.state_tensors() if with_optimizer else None
        return checkpoint_pieces(self.step.main.params, state)
