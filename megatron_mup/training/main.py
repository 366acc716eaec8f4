"""From the command line to a finished run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_mup.config import Config, ConfigError, check_paths, parse_config, resolved, to_yaml, validate
from megatron_mup.layers.attention import kernel_chosen
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.parallel.data_parallel import compute_dtype, transport_of_auto
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.report import format_table, table_rows
from megatron_mup.training.deepspeed_engine import check_deepspeed
from megatron_mup.training.guard import BrokenRunError
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.training.memory import is_out_of_memory, out_of_memory
from megatron_mup.training.precision import check_libraries, settle_attention, settle_fp8
from megatron_mup.training.sinks import check_sinks
from megatron_mup.training.trainer import Trainer, vocabulary_size

EXIT_CONFIG = 2
"""Exit code: a setting that cannot work; nothing was started."""
EXIT_BROKEN = 3
"""Exit code: loss or gradients are broken. The last checkpoint is good, but starting again alone won't help."""


def main(argv: Sequence[str]) -> int:
    """Runs `pretrain.py`; returns the exit code. Mistakes of the user end in one message, before any rank waits."""
    try:
        launch = Launch.from_environment()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    try:
        config, done = _configure(argv, launch)
    except ConfigError as error:
        if launch.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    if done:
        return 0
    try:
        device = init_process_group(config, launch)
        try:
            return _run(config, device, launch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(error, config, device, launch.world_size) from error
    except ConfigError as error:
        # Devices, data and checkpoints may fail on one rank alone, so each says so.
        print(f"error on rank {launch.rank}: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except BrokenRunError as error:
        # All ranks find it together.
        if launch.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_BROKEN
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _configure(argv: Sequence[str], launch: Launch) -> tuple[Config, bool]:
    """The validated configuration, with the true vocabulary size, and whether all is done with printing it."""
    parsed = parse_config(argv)
    if parsed.print_config:
        if launch.rank == 0:
            print(to_yaml(resolved(parsed.config, launch.world_size)))
        return parsed.config, True
    warnings = [*parsed.warnings, *validate(parsed.config, launch.world_size, parsed.explicit)]
    check_paths(parsed.config)
    check_sinks(parsed.config)
    check_deepspeed(parsed.config)
    check_libraries(parsed.config)
    config = replace(parsed.config, model=replace(parsed.config.model, vocab_size=vocabulary_size(parsed.config)))
    validate(config, launch.world_size)
    table_rows(parameter_metas(config, config.model.vocab_size or 1), config)  # what has no rule is refused here
    config, missing = settle_fp8(settle_attention(config))
    if launch.rank == 0:
        for warning in [*warnings, *missing]:
            print(f"warning: {warning}", file=sys.stderr)
    return config, False


def scaling_tables(config: Config, vocab_size: int) -> str:
    """The table of every parameter's numbers, one for each phase of the run."""
    metas, phases = parameter_metas(config, vocab_size), config.phases()
    tables = []
    for start, phase in phases.items():
        title = f"from iteration {start} on:\n" if len(phases) > 1 else ""
        tables.append(title + format_table(table_rows(metas, phase), phase))
    return "\n".join(tables)


def _run(config: Config, device: torch.device, launch: Launch) -> int:
    if config.training.deterministic_mode:
        # Without a fixed workspace PyTorch refuses every cuBLAS product in this mode.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.training.deterministic_mode)
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    mesh = Mesh.build(config, device)
    trainer = Trainer(config, vocab_size, mesh)
    messages = transport_of_auto(config, mesh)
    if launch.rank == 0:
        print(scaling_tables(config, vocab_size))
        if (kernel := kernel_chosen(config, device, compute_dtype(config))) is not None:
            print(f"attention runs on {kernel}")
        if messages is not None:
            print(f"FSDP2's messages go by {messages}")
        if config.optimizer.optimizer != "adam" and (transport := trainer.step.optimizer.transport()) is not None:
            print(f"hidden matrices go to the ranks that orthonormalize them, and results back, by {transport}")
        if config.optimizer.print_optimizer_plan:
            print(trainer.step.optimizer.plan())
    with trainer:
        return trainer.train()
