"""What of a run goes into a checkpoint, and how a run starts from one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron_mup.checkpoint import local
from megatron_mup.checkpoint.agree import ALONE, Alone
from megatron_mup.checkpoint.background import BackgroundSaver
from megatron_mup.checkpoint.compare import compare_configs, told_differences
from megatron_mup.checkpoint.load import find, load, load_iteration, load_rng, saved_config
from megatron_mup.checkpoint.manifest import Manifest, layout_sizes
from megatron_mup.checkpoint.rescale import rescale, rescaling, untied
from megatron_mup.checkpoint.save import clean, save
from megatron_mup.checkpoint.state import MODEL, OPTIMIZER, Piece, checkpoint_pieces, whole_piece
from megatron_mup.config import Config, ConfigError, to_dict
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.report import table_rows
from megatron_mup.training.guard import Guard
from megatron_mup.training.step import TrainStep

NON_PERSISTENT = "non_persistent"
"""Folder in ``--save`` for saves that the next of their kind replaces."""

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
        guard: what it remembers is saved and loaded too.
    """

    def __init__(self, config: Config, vocab_size: int, mesh: Mesh, step: TrainStep, guard: Guard) -> None:
        self.config, self.mesh, self.step, self.guard = config, mesh, step, guard
        self._table = table_rows(parameter_metas(config, vocab_size), config)
        self._saved: Progress | None = None
        self._tell: Callable[[str], None] = log.info
        self._background: BackgroundSaver | None = None
        if config.checkpoint.save and config.checkpoint.async_save:
            self._background = BackgroundSaver()
            step.before_update = self._background.before_update
        if config.checkpoint.save:
            clean(config.checkpoint.save)

    def tell(self, how: Callable[[str], None]) -> None:
        """Says from now on what it does through ``how``."""
        self._tell = how

    def is_saved(self, progress: Progress) -> bool:
        """Whether there is nothing to save: no folder, or this progress is in it."""
        return self.config.checkpoint.save is None or self._saved == progress

    def save(self, progress: Progress, persistent: bool = True) -> None:
        """Saves model, optimizer, random state and progress. Collective.

        Args:
            progress: how far the run is.
            persistent: into the folder of ``--save``; otherwise where ``--non-persistent-ckpt-type`` says.

        Raises:
            ConfigError: it can't be written; earlier checkpoints stay.
        """
        flags = self.config.checkpoint
        assert flags.save is not None
        if not flags.no_save_optim:
            self.step.before_update()
            self.step.optimizer.gather_state()
        manifest = Manifest(
            iteration=progress.iteration,
            consumed_samples=progress.consumed_samples,
            config=to_dict(self.config),
            parametrization=self._table,
            layout=layout_sizes(self.mesh),
            optimizer={} if flags.no_save_optim else self.step.optimizer.state_scalars(),
            extra={"guard": self.guard.state()},
        )
        pieces = self._pieces(with_optimizer=not flags.no_save_optim)
        retain = flags.save_retain_interval
        keep_last = 1 if flags.keep_last is None and retain is not None else flags.keep_last
        folder = Path(flags.save)
        if not persistent and (own := self._local_folder) is not None:
            self._tell_saved(local.save(own, pieces, manifest, self._run))
            return
        if not persistent:
            folder, keep_last, retain = folder / NON_PERSISTENT, 1, None
        if self._background is not None:
            self._background.start(folder, pieces, manifest, keep_last, retain, self._tell_saved)
        else:
            self._tell_saved(save(folder, pieces, manifest, keep_last, retain_interval=retain))
        if persistent:
            self._saved = progress

    def finish(self) -> None:
        """Waits until what is being saved is saved. Collective.

        Raises:
            ConfigError: it can't be written; earlier checkpoints stay.
        """
        if self._background is not None:
            self._background.finish()

    def _tell_saved(self, path: Path) -> None:
        self._tell(f"saved {path}")

    def resume_or_initialise(self) -> Progress:
        """Loads what the flags say, or draws initial values; the newest of persistent and other saves. Collective.

        Raises:
            ConfigError: nothing to load though it must be; a checkpoint that is damaged, of another architecture, or
                of another schedule.
        """
        flags = self.config.checkpoint
        path = find(flags.load, flags.ckpt_step) if flags.load else None
        if (own := self._newer_local(path)) is not None:
            progress = self._load(own, ranks=ALONE)
        else:
            progress = self._start_elsewhere(path)
        if self._background is not None:
            self._background.prepare(self._pieces(with_optimizer=not flags.no_save_optim))
        return progress

    def _start_elsewhere(self, path: Path | None) -> Progress:
        """Starts from the checkpoint found, a newer one for the time being, or without one."""
        progress = self._start(self._newer_global(path))
        if (folder := self._local_folder) is not None:
            # They are older than where the run stands, or of a future that it has left.
            local.clear(folder, self._run, keep=None)
        return progress

    def _start(self, path: Path | None) -> Progress:
        """Starts from a checkpoint, or without one."""
        flags = self.config.checkpoint
        if path is None:
            if flags.load and flags.exit_on_missing_checkpoint:
                raise ConfigError(f"--load {flags.load}", "holds no checkpoint", "correct the path")
            if flags.pretrained_checkpoint is not None:
                return self._start_from(flags.pretrained_checkpoint)
            self.step.initialise()
            return Progress()
        return self._take_weights(path) if flags.finetune else self._load(path)

    def _newer_local(self, path: Path | None) -> Path | None:
        """This rank's part of a whole local checkpoint that is newer than the one found."""
        folder = self._local_folder
        if folder is None or not self._takes_newest:
            return None
        return local.find(folder, self._run, layout_sizes(self.mesh), None if path is None else load_iteration(path))

    def _newer_global(self, path: Path | None) -> Path | None:
        """The checkpoint found, or a non-persistent one that is newer."""
        flags = self.config.checkpoint
        if flags.non_persistent_ckpt_type != "global" or not self._takes_newest:
            return path
        try:
            other = find(Path(flags.save or "") / NON_PERSISTENT)
        except ConfigError as error:
            log.warning("%s", error)
            return path
        newer = other is not None and (path is None or load_iteration(other) > load_iteration(path))
        return other if newer else path

    @property
    def _takes_newest(self) -> bool:
        """Whether non-persistent saves count: the run goes on with what it saves to, where it was."""
        flags = self.config.checkpoint
        if flags.non_persistent_save_interval is None or flags.save is None or flags.load is None:
            return False
        same = Path(flags.save).absolute() == Path(flags.load).absolute()
        return same and flags.ckpt_step is None and not flags.finetune

    @property
    def _local_folder(self) -> str | None:
        """Where ranks save for themselves; None if they don't."""
        flags = self.config.checkpoint
        is_local = flags.non_persistent_save_interval is not None and flags.non_persistent_ckpt_type == "local"
        return flags.non_persistent_local_ckpt_dir if is_local else None

    @property
    def _run(self) -> str:
        """What tells this run's local checkpoints from others'."""
        return str(Path(self.config.checkpoint.save or "").absolute())

    def _start_from(self, folder: str) -> Progress:
        path = find(folder)
        if path is None:
            raise ConfigError(f"--pretrained-checkpoint {folder}", "holds no checkpoint", "correct the path")
        return self._take_weights(path)

    def _take_weights(self, path: Path) -> Progress:
        """Loads weights only, in the units of this run's parametrization: the model computes what it did."""
        saved = saved_config(path)
        change = rescaling(saved, self.config)
        self.step.optimizer.restore(self.config, 0)
        load(path, untied(self._pieces(with_optimizer=False), saved, self.config), self.config)
        rescale(self.step.main.params, change)
        self.step.main.publish()
        if dist.get_rank() == 0:
            print(f"started from the weights of {path}; {change}")
        return Progress()

    def last_saved(self) -> Progress | None:
        """Loads what this run saved last; None if it has saved nothing. Collective.

        Raises:
            ConfigError: it is damaged.
        """
        self.finish()
        save_folder = self.config.checkpoint.save
        if save_folder is None or self._saved is None or self.config.checkpoint.no_save_optim:
            return None
        path = find(save_folder, self._saved.iteration)
        return None if path is None else self._load(path, resume=True)

    def _load(self, path: Path, resume: bool = False, ranks: Alone | None = None) -> Progress:
        """Loads a checkpoint, all ranks together or each its own.

        With ``resume`` whole, whatever the flags say of the one to start from.
        """
        flags = self.config.checkpoint
        if resume:
            flags = replace(flags, no_load_optim=False, no_load_rng=False)
        with_optimizer = not flags.no_load_optim
        self.step.optimizer.restore(self.config, load_iteration(path, ranks))
        read = load if ranks is None else local.load
        manifest = read(path, self._pieces(with_optimizer), self.config)
        self.step.main.publish()
        self.guard.load_state(manifest.extra.get("guard", {}))
        if with_optimizer:
            self._check_momenta(path, manifest)
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
            load_rng(path, layout_sizes(self.mesh), ranks)
        progress = Progress(manifest.iteration, manifest.consumed_samples)
        if flags.save and Path(flags.save).absolute() == path.parent:
            self._saved = progress
        if dist.get_rank() == 0:
            print(f"resumed from {path}: iteration {progress.iteration}, {progress.consumed_samples} samples consumed")
        return progress

    def _check_momenta(self, path: Path, manifest: Manifest) -> None:
        """Momenta of both styles have the same shapes, but not the same size.

        Raises:
            ConfigError: those of a checkpoint are of the other style.
        """
        differences = compare_configs(manifest.config, self.config, "momentum")
        at_work = self.config.at_iteration(max(0, manifest.iteration - 1)).optimizer.optimizer
        if differences and at_work not in ("adam", "dion"):
            flag, before, _ = differences[0]
            raise ConfigError(
                f"--load {path}",
                f"its momenta are of another size: {told_differences(differences)}",
                f"give {flag} {before}: steps are the same with either",
            )

    def _pieces(self, with_optimizer: bool) -> list[Piece]:
        state = self.step.optimizer.state_tensors() if with_optimizer else None
        pieces = checkpoint_pieces(self.step.main.params, state)
        pieces += [whole_piece(f"{MODEL}/{name}", value) for name, value in self.step.model.expert_biases().items()]
        if with_optimizer:
            loads = self.step.balancing.loads()
            pieces += [whole_piece(f"{OPTIMIZER}/load/{name}", value) for name, value in loads.items()]
        return pieces
