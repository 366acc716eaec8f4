"""What cannot work when context-parallel ranks share each sequence."""

from __future__ import annotations

import math

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import multiples, told


def check_context(config: Config) -> None:
    """Sequence length and attention kernel."""
    parallel, seq_length = config.parallel, config.training.seq_length
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if cp == 1:
        return
    # Each rank holds two chunks, whose tokens tensor ranks share under sequence parallelism.
    unit = cp * (math.lcm(2, tp) if parallel.sequence_parallel else 2)
    if seq_length % unit:
        names = ["seq_length", "context_parallel_size"]
        if parallel.sequence_parallel:
            names += ["tensor_model_parallel_size", "sequence_parallel"]
        raise ConfigError(
            told(config, *names),
            f"each context-parallel rank takes two chunks of a sequence, so its length must be a multiple of {unit}",
            f"use --seq-length {multiples(seq_length, unit)}, or fewer ranks",
        )
    kernel = {"fused": "cuDNN's attention", "flash4": "FlashAttention-4"}.get(config.training.attention_backend)
    if kernel is not None:
        raise ConfigError(
            told(config, "attention_backend", "context_parallel_size"),
            f"{kernel} knows no parts of sequences here",
            "use --attention-backend auto",
        )
