"""Optimizers that treat every element alone, for what is no hidden matrix: Lion, Adam-atan2, AdEMAMix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_mup.optim.clip import gradients, scale_grads
from megatron_mup.optim.main_params import MainParam
from megatron_mup.parametrization.table import Scaling

ATAN2_SCALE = 1.27
"""Near 4/pi: where momentum and root mean square agree, Adam-atan2 takes Adam's step."""


@dataclass(frozen=True)
class Group:
    """Shards with the same numbers, in one order throughout.

    Attributes:
        params: the shards.
        grads: their gradients, in their precision.
        state: by kind.
        eps: epsilon.
    """

    params: list[MainParam]
    grads: list[torch.Tensor]
    state: Mapping[str, list[torch.Tensor]]
    eps: float


class ElementwiseOptimizer(ABC):
    """Base: state by name, one group of tensors for each set of numbers, decoupled weight decay.

    It works on this rank's shards in place; nothing is exchanged. State exists for every parameter from the start, an
    empty tensor for an empty shard, so that all ranks have the same keys.
    """

    kinds: ClassVar[tuple[str, ...]]
    """Names of the states, each shaped like the parameter."""

    def __init__(self, params: list[tuple[MainParam, Scaling]]) -> None:
        self.steps_done = 0
        self._params = [param for param, _ in params]
        self._state = {
            param.meta.name: {kind: torch.zeros_like(param.value) for kind in self.kinds} for param, _ in params
        }
        self._groups: dict[tuple[float, float, float], list[MainParam]] = {}
        for param, scaling in params:
            if param.value.numel():
                key = (scaling.lr, scaling.weight_decay, scaling.eps)
                self._groups.setdefault(key, []).append(param)

    @torch.no_grad()
    def step(self, factor: float, scale: torch.Tensor | None = None) -> None:
        """One step at ``factor`` times the peak learning rates; ``scale`` is a 0-d factor on the gradients."""
        if scale is not None:
            scale_grads(self._params, scale)
        grads = {param.meta.name: grad for param, grad in zip(self._params, gradients(self._params), strict=True)}
        self.steps_done += 1
        for (lr, decay, eps), group in self._groups.items():
            values = [param.value for param in group]
            mine = [grads[param.meta.name].to(param.value.dtype) for param in group]
            state = {kind: [self._state[param.meta.name][kind] for param in group] for kind in self.kinds}
            updates = self.updates(Group(group, mine, state, eps))
            if decay:
                torch._foreach_mul_(values, 1 - lr * factor * decay)
            torch._foreach_add_(values, updates, alpha=-lr * factor)

    @abstractmethod
    def updates(self, group: Group) -> list[torch.Tensor]:
        """Advances the state of a group and gives what is to be subtracted at learning rate 1."""

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """State, as ``<kind>/<name>``: live tensors in storage layout."""
        return {
            f"{kind}/{param.meta.name}": (param, self._state[param.meta.name][kind])
            for kind in self.kinds
            for param in self._params
        }


class Lion(ElementwiseOptimizer):
    """Lion (arXiv 2302.06675): ``W -= lr sign(beta1 M + (1 - beta1) G)``, then ``M <- beta2 M + (1 - beta2) G``."""

    kinds = ("exp_avg",)

    def __init__(self, params: list[tuple[MainParam, Scaling]], betas: tuple[float, float]) -> None:
        super().__init__(params)
        self._betas = betas

    def updates(self, group: Group) -> list[torch.Tensor]:
        """The sign of a mixture of momentum and gradient."""
        beta1, beta2 = self._betas
        average = group.state["exp_avg"]
        mixture = torch._foreach_lerp(average, group.grads, 1 - beta1)
        torch._foreach_lerp_(average, group.grads, 1 - beta2)
        return list(torch._foreach_sign(mixture))


class AdamAtan2(ElementwiseOptimizer):
    """Adam-atan2 (arXiv 2407.05872): ``W -= lr 1.27 atan2(m, sqrt(v))``, m and v bias-corrected; no epsilon."""

    kinds = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: list[tuple[MainParam, Scaling]], betas: tuple[float, float]) -> None:
        super().__init__(params)
        self._betas = betas

    def updates(self, group: Group) -> list[torch.Tensor]:
        """The angle between first moment and root of the second."""
        mean, root = _advance_moments(group, self._betas, self.steps_done)
        # PyTorch has no foreach form of atan2.
        return [m.atan2_(r).mul_(ATAN2_SCALE) for m, r in zip(mean, root, strict=True)]


@dataclass(frozen=True, kw_only=True)
class AdEMAMixSettings:
    """AdEMAMix's settings.

    Attributes:
        betas: of the fast average and of the squares.
        beta3: of the slow average.
        alpha: weight of the slow average.
        warmup: steps over which beta3 and alpha grow to their values; 0: they have them from the start.
    """

    betas: tuple[float, float]
    beta3: float
    alpha: float
    warmup: int


class AdEMAMix(ElementwiseOptimizer):
    """AdEMAMix (arXiv 2409.03137): ``W -= lr (m + alpha s) / (sqrt(v) + eps)`` with a second, slow average s.

    m and v are bias-corrected, s isn't. Over the warm-up alpha grows linearly, and beta3 from beta1 so that its
    half-life grows linearly.
    """

    kinds = ("exp_avg", "exp_avg_slow", "exp_avg_sq")

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: AdEMAMixSettings) -> None:
        super().__init__(params)
        self._settings = settings

    def schedule(self, step: int) -> tuple[float, float]:
        """Alpha and beta3 of a step, counted from 1."""
        alpha, end, warmup = self._settings.alpha, self._settings.beta3, self._settings.warmup
        if step >= warmup:
            return alpha, end
        share, start = step / warmup, self._settings.betas[0]
        if start == 0:
            return alpha * share, end
        log_start, log_end = math.log(start), math.log(end)
        beta3 = math.exp(log_start * log_end / ((1 - share) * log_end + share * log_start))
        return alpha * share, min(beta3, end)

    def updates(self, group: Group) -> list[torch.Tensor]:
        """Both averages over the root of the squares."""
        alpha, beta3 = self.schedule(self.steps_done)
        slow = group.state["exp_avg_slow"]
        torch._foreach_lerp_(slow, group.grads, 1 - beta3)
        update, root = _advance_moments(group, self._settings.betas, self.steps_done)
        torch._foreach_add_(update, slow, alpha=alpha)
        torch._foreach_add_(root, group.eps)
        torch._foreach_div_(update, root)
        return update


def _advance_moments(
    group: Group, betas: tuple[float, float], step: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Advances Adam's two moments, in place; the first and the root of the second, bias-corrected, in new memory."""
    mean, square = group.state["exp_avg"], group.state["exp_avg_sq"]
    torch._foreach_lerp_(mean, group.grads, 1 - betas[0])
    torch._foreach_mul_(square, betas[1])
    torch._foreach_addcmul_(square, group.grads, group.grads, 1 - betas[1])
    root = torch._foreach_sqrt(square)
    torch._foreach_div_(root, math.sqrt(1 - betas[1] ** step))
    return list(torch._foreach_div(mean, 1 - betas[0] ** step)), list(root)
