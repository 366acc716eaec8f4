"""How the optimizer's numbers follow tokens per step and tokens of the whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mup.config import Config, ConfigError

POWER_LAW_TOKENS = -0.32
"""Exponent of the learning rate over tokens (2409.19913; HyperP 2603.28743)."""
STEP_LAW_TOKENS = 0.307
"""Exponent of the learning rate over tokens at a given size (Step Law, 2503.04715)."""


@dataclass(frozen=True)
class HorizonFactors:
    """Factors on the base run's numbers.

    Attributes:
        lr: on every learning rate.
        weight_decay: on the coefficient, which is coupled to the learning rate.
        eps: on AdamW's epsilon.
        one_minus_beta: on ``1 - beta`` of both of AdamW's averages.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    one_minus_beta: float = 1.0


def horizon_factors(config: Config) -> HorizonFactors:
    """What ``--batch-horizon-rule`` makes of ``m_B``, growth of tokens per step, and ``m_D``, growth of all tokens.

    - sde (Complete(d)P, 2512.22382; Malladi et al., 2205.10287): with ``m_S = m_D / m_B``, growth of the steps,
      learning rate and decay as ``m_S^-1/2``, epsilon as ``m_S^1/2``, ``1 - beta`` as ``1 / m_S``.
    - sqrt-batch: learning rate as ``m_B^1/2`` (microsoft/ArchScale).
    - power-law: learning rate as ``m_B^1/2 m_D^-0.32`` (2409.19913, HyperP).
    - step-law: learning rate as ``m_D^0.307``, for a batch that grows as ``m_D^0.571`` (2503.04715).
    """
    rule = config.parametrization.batch_horizon_rule
    if rule == "none":
        return HorizonFactors()
    batch, tokens = _growth(config)
    match rule:
        case "sde":
            root = math.sqrt(tokens / batch)
            return HorizonFactors(lr=1 / root, weight_decay=1 / root, eps=root, one_minus_beta=batch / tokens)
        case "sqrt-batch":
            return HorizonFactors(lr=math.sqrt(batch))
        case "power-law":
            return HorizonFactors(lr=math.sqrt(batch) * math.pow(tokens, POWER_LAW_TOKENS))
    return HorizonFactors(lr=math.pow(tokens, STEP_LAW_TOKENS))


def adam_betas(config: Config) -> tuple[float, float]:
    """AdamW's betas, ``--batch-horizon-rule`` applied.

    Raises:
        ConfigError: so short a run that a beta would be negative.
    """
    flags, factor = config.optimizer, horizon_factors(config).one_minus_beta
    if factor == 1.0:
        return flags.adam_beta1, flags.adam_beta2
    betas = 1 - (1 - flags.adam_beta1) * factor, 1 - (1 - flags.adam_beta2) * factor
    if min(betas) < 0:
        raise ConfigError(
            "--batch-horizon-rule sde",
            f"{1 / factor:.3g} times the base run's steps would make betas of {betas[0]:.3g} and {betas[1]:.3g}",
            "choose a base run closer to this one",
        )
    return betas


def _growth(config: Config) -> tuple[float, float]:
    """``m_B`` and ``m_D``. The rules of the configuration see to it that what is needed is given."""
    flags, training = config.parametrization, config.training
    assert training.global_batch_size is not None
    samples = training.train_samples or (training.train_iters or 0) * training.global_batch_size
    batch, tokens = training.global_batch_size * training.seq_length, samples * training.seq_length
    return batch / (flags.base_batch_tokens or batch), tokens / (flags.base_train_tokens or tokens)
