"""AdamW over main parameters: the one-pass kernel on a GPU that has it, ``torch.optim.AdamW`` elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_mup.kernels.adamw import Stepped, adamw_, device_has_adamw
from megatron_mup.kernels.libraries import fused_adam
from megatron_mup.optim.clip import gradients, scale_grads
from megatron_mup.optim.main_params import MainParam
from megatron_mup.parametrization.table import Scaling


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """Settings that all groups share.

    Attributes:
        betas: of the two moments.
        impl: whose kernel takes the step on a GPU: ours or PyTorch's (``native``), or a library's
            (`kernels.libraries`).
        dtypes: precisions of the two moments; None is that of the weight.
    """

    betas: tuple[float, float]
    impl: str = "native"
    dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None)


class AdamW:
    """Decoupled AdamW, grouped by (learning rate, weight decay, epsilon).

    It works on this rank's shards in place; nothing is exchanged. State exists for every parameter from the start, an
    empty tensor for an empty shard, so that all ranks have the same keys; only shards with elements reach PyTorch.
    """

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: AdamWSettings) -> None:
        """Groups parameters with their numbers and allocates both moments."""
        self._params = [param for param, _ in params]
        self._exp_avg, self._exp_avg_sq = (
            [torch.zeros_like(param.value, dtype=dtype) for param in self._params] for dtype in settings.dtypes
        )
        self._step = 0
        self._betas = settings.betas
        self._numbers = [numbers for _, numbers in params]
        on_gpu = all(param.value.device.type == "cuda" for param in self._params)
        library = settings.impl if on_gpu and settings.impl != "native" else None
        self._one_pass = library is None and all(device_has_adamw(param.value.device) for param in self._params)
        # PyTorch's optimizers want one precision.
        self._mixed = any(
            moment.dtype != param.value.dtype
            for moments in (self._exp_avg, self._exp_avg_sq)
            for param, moment in zip(self._params, moments, strict=True)
        )
        self._live: list[tuple[MainParam, torch.Tensor]] = []
        self._inner: torch.optim.Optimizer | None = None
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
        if groups and not self._one_pass and not self._mixed:
            numbered: list[dict[str, Any]] = [
                {"params": leaves, "lr": lr, "peak": lr, "weight_decay": decay, "eps": eps}
                for (lr, decay, eps), leaves in groups.items()
            ]
            if library is None:
                self._inner = torch.optim.AdamW(
                    numbered, betas=settings.betas, fused=fused or None, foreach=None if fused else True
                )
            else:
                self._inner = fused_adam(library, numbered, settings.betas)
            self._inner.state.update(state)

    @property
    def measures(self) -> bool:
        """Whether a step finds the gradients' squares on its way."""
        return self._one_pass

    def step(self, factor: float, scale: torch.Tensor | None = None, measure: bool = False) -> None:
        """One step at ``factor`` times the peak learning rates.

        Args:
            factor: of the rates.
            scale: 0-d fp32, a factor on the gradients; None is 1.
            measure: whether to leave the sum of each gradient's squares in its parameter; only if it `measures`.
        """
        if self._one_pass:
            self._step_in_one_pass(factor, scale, measure)
            return
        if scale is not None:
            scale_grads([param for param, _ in self._live], scale)
        if self._mixed:
            self._step_in_fp32(factor)
            return
        grads = gradients([param for param, _ in self._live])
        self._step += 1
        if self._inner is None:
            return
        for group in self._inner.param_groups:
            group["lr"] = group["peak"] * factor
            group["step"] = self._step - 1  # libraries count here, PyTorch in the state
        for (_, leaf), grad in zip(self._live, grads, strict=True):
            leaf.grad = grad.to(leaf.dtype)
        self._inner.step()
        for _, leaf in self._live:
            leaf.grad = None

    @torch.no_grad()
    def _step_in_fp32(self, factor: float) -> None:
        """The same by the plain formula, for precisions that differ (see `adamw_`)."""
        grads = gradients(self._params)
        self._step += 1
        (beta1, beta2), step = self._betas, self._step
        for param, numbers, grad, mean, square in zip(
            self._params, self._numbers, grads, self._exp_avg, self._exp_avg_sq, strict=True
        ):
            g, x = grad.float(), param.value.float()
            m = torch.lerp(mean.float(), g, 1 - beta1)
            v = torch.addcmul(square.float() * beta2, g, g, value=1 - beta2)
            rate, root = numbers.lr * factor, (v / (1 - beta2**step)).sqrt().add(numbers.eps)
            x = (1 - rate * numbers.weight_decay) * x - rate / (1 - beta1**step) * m / root
            for kept, new in ((mean, m), (square, v), (param.value, x)):
                kept.copy_(new)

    def _step_in_one_pass(self, factor: float, scale: torch.Tensor | None, measure: bool) -> None:
        """The same on a GPU; it reads gradients once, in their own precision, and writes the module's copies too."""
        every = zip(self._params, self._numbers, self._exp_avg, self._exp_avg_sq, strict=True)
        live = [each for each in every if each[0].value.numel()]
        grads = gradients([param for param, *_ in live])
        self._step += 1
        tensors = [
            Stepped(
                param.value,
                grad.contiguous(),
                mean,
                square,
                param.copy,
                numbers.lr * factor,
                numbers.weight_decay,
                numbers.eps,
            )
            for (param, numbers, mean, square), grad in zip(live, grads, strict=True)
        ]
        squares = torch.empty(len(tensors), device=tensors[0].value.device) if measure and tensors else None
        adamw_(tensors, betas=self._betas, step=self._step, scale=scale, squares=squares)
        for place, (param, *_) in enumerate(live):
            param.published = True
            param.square = None if squares is None else squares[place]

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
