"""AdamW over main parameters: a thin layer on ``torch.optim.AdamW``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mup.optim.clip import gradients
from megatron_mup.optim.main_params import MainParam
from megatron_mup.parametrization.table import Scaling


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """Settings that all groups share."""

    betas: tuple[float, float]


class AdamW:
    """Decoupled AdamW, grouped by (learning rate, weight decay, epsilon).

    It works on this rank's shards in place; nothing is exchanged. State exists for every parameter from the start, an
    empty tensor for an empty shard, so that all ranks have the same keys; only shards with elements reach PyTorch.
    """

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: AdamWSettings) -> None:
        """Groups parameters with their numbers and allocates both moments, in each parameter's own precision."""
        self._params = [param for param, _ in params]
        self._exp_avg = [torch.zeros_like(param.value) for param in self._params]
        self._exp_avg_sq = [torch.zeros_like(param.value) for param in self._params]
        self._step = 0
        self._live: list[tuple[MainParam, torch.Tensor]] = []
        self._inner: torch.optim.AdamW | None = None
        groups: dict[tuple[float, float, float], list[torch.Tensor]] = {}
        state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        fused = all(param.value.device.type in ("cpu", "cuda") for param in self._params)
        for (param, scaling), exp_avg, exp_avg_sq in zip(params, self._exp_avg, self._exp_avg_sq, strict=True):
            if not param.value.numel():
                continue
            leaf = param.value.detach()
            self._live.append((param, leaf))
            groups.setdefault((scaling.lr, scaling.weight_decay, scaling.eps), []).append(leaf)
            step = torch.zeros((), dtype=torch.float32, device=leaf.device if fused else "cpu")
            state[leaf] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if groups:
            self._inner = torch.optim.AdamW(
                [
                    {"params": leaves, "lr": lr, "peak": lr, "weight_decay": decay, "eps": eps}
                    for (lr, decay, eps), leaves in groups.items()
                ],
                betas=settings.betas,
                fused=fused or None,
                foreach=None if fused else True,
            )
            self._inner.state.update(state)

    def step(self, factor: float) -> None:
        """One step at ``factor`` times the peak learning rates."""
        grads = gradients([param for param, _ in self._live])
        self._step += 1
        if self._inner is None:
            return
        for group in self._inner.param_groups:
            group["lr"] = group["peak"] * factor
        for (_, leaf), grad in zip(self._live, grads, strict=True):
            leaf.grad = grad.to(leaf.dtype)
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """Both moments, as ``exp_avg/<name>`` and ``exp_avg_sq/<name>``: live tensors in storage layout."""
        moments = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        return {
            f"{key}/{param.meta.name}": (param, tensor)
            for key, tensors in moments.items()
            for param, tensor in zip(self._params, tensors, strict=True)
        }

    @property
    def steps_done(self) -> int:
        """Steps taken, as bias correction counts them."""
        return self._step

    @steps_done.setter
    def steps_done(self, value: int) -> None:
        self._step = value
        if self._inner is not None:
            for state in self._inner.state.values():
                state["step"].fill_(value)
