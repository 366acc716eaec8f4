"""How well a model predicts a corpus, in a unit that does not depend on the tokenizer."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mup.layers.loss import IGNORE
from megatron_mup.models.gpt import GPT
from megatron_mup.progress import track


@torch.inference_mode()
def total_loss(model: GPT, tokens: NDArray[np.integer], batch_size: int = 8) -> float:
    """Sum of the loss in nats over every token but the first.

    The tokens are read in windows of the training length that share no prediction; each window starts without context.

    Args:
        model: whole, in evaluation mode.
        tokens: ``[n]`` ids of one long text.
        batch_size: windows per forward pass.
    """
    device, length = next(model.parameters()).device, model.config.training.seq_length
    predictions = len(tokens) - 1
    padded = torch.full((-(-predictions // length) * length + 1,), IGNORE)
    padded[: len(tokens)] = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    labels, inputs = padded[1:].view(-1, length), padded[:-1].clamp(min=0).view(-1, length)
    total = 0.0
    batches = list(zip(inputs.split(batch_size), labels.split(batch_size), strict=True))
    for x, y in track(batches, "evaluating"):
        total += float(model(x.to(device), labels=y.to(device))[0, 1])
    return total


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Loss summed over a text, in bits per byte of its UTF-8 form."""
    return nats / math.log(2) / text_bytes
