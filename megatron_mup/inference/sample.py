"""Sampling by full forward passes: simple, right for every model, slow for long texts (there is no key/value cache)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mup.models.gpt import GPT


@torch.inference_mode()
def sample(
    model: GPT,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    eod: int | None = None,
) -> list[int]:
    """Continues a prompt.

    Args:
        model: whole, in evaluation mode.
        prompt: token ids, at least one.
        max_tokens: tokens to add at most.
        temperature: divisor of the logits; 0 takes the likeliest token.
        top_p: share of probability from which is drawn, likeliest tokens first (Holtzman et al., arXiv 1904.09751).
        seed: of the draws.
        eod: id that ends the text; it is not returned.

    Returns:
        The new ids.
    """
    if not prompt:
        raise ValueError("the prompt holds no token")
    device, window = next(model.parameters()).device, model.config.training.seq_length
    # Drawn on the host, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(max_tokens):
        logits = model(torch.tensor([ids[-window:]], device=device))[-1, 0].float().cpu()
        token = draw(logits, temperature, top_p, generator)
        if token == eod:
            break
        ids.append(token)
    return ids[len(prompt) :]


def draw(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id from logits ``[vocab]``, see `sample`."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    # The token that crosses the share belongs to it; the first always does.
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[0] = False
    return int(ids[torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)])
