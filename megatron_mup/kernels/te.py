"""Matrix products by Transformer Engine, on parameters that stay the caller's.

Its linear layer is taken whole: it knows what each recipe and each chip wants of its operands. What it doesn't do here
is hold a weight, talk to other ranks about values, or say when scales change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_mup.kernels.fp8_casts import E4M3, E5M2, Cast, Scale


def obstacle(recipe: str | None) -> str | None:
    """Why this process can't multiply with Transformer Engine; None if it can.

    Args:
        recipe: the FP8 recipe asked for; None in bf16.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        import transformer_engine.pytorch as te
    # A build for another PyTorch or CUDA fails in many ways.
    except Exception as error:
        return f"importing it failed: {type(error).__name__}: {error}"
    checks = {
        "delayed": te.is_fp8_available,
        "tensorwise": te.is_fp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
    }
    if recipe is None:
        return None
    there, reason = checks[recipe](return_reason=True)
    return None if there else f"recipe {recipe} isn't for {torch.cuda.get_device_name()}: {reason}"


def recipe_of(name: str, kind: str, margin: int, history: int, algorithm: str) -> Any:
    """Transformer Engine's recipe.

    Args:
        name: ``delayed``, ``tensorwise``, ``blockwise`` or ``mxfp8``.
        kind: ``e4m3`` or ``hybrid``.
        margin, history, algorithm: of ``delayed``: powers of two left free, steps remembered, and what is made of them.
    """
    from transformer_engine.common import recipe as recipes

    form = recipes.Format.HYBRID if kind == "hybrid" else recipes.Format.E4M3
    if name == "delayed":
        return recipes.DelayedScaling(
            margin=margin, fp8_format=form, amax_history_len=history, amax_compute_algo=algorithm
        )
    kinds = {
        "tensorwise": recipes.Float8CurrentScaling,
        "blockwise": recipes.Float8BlockScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
    }
    return kinds[name](fp8_format=form)


def forget() -> None:
    """Drops what Transformer Engine knows of layers that were, and of their process groups."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


@contextmanager
def one_step(recipe: Any, group: dist.ProcessGroup | None, train: bool) -> Iterator[None]:
    """Context of all passes of a step, in which products are in FP8.

    Scales of the recipe ``delayed`` stay what they are inside, over all micro-batches and recomputations; behind, they
    follow the largest values of the step. Collective over ``group`` then, with one message for each direction.

    Args:
        recipe: from `recipe_of`.
        group: ranks whose layers are to have the same scales; None: all, if there are several.
        train: False: what is seen inside is forgotten.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as State

    # On leaving with gradients enabled, the scales of forward are brought up to date.
    with torch.set_grad_enabled(train), te.autocast(enabled=True, recipe=recipe, amax_reduction_group=group):
        # The layer that is told to be the first brings the scales of backward up to date in its own backward, which is
        # once for each micro-batch at best; no layer shall be.
        State.is_first_fp8_module()
        yield
    if train:
        State.reduce_and_update_fp8_tensors(forward=False)
    else:
        for largest in State.quantization_state.global_amax_buffer.values():
            torch._foreach_zero_(largest)


class Scales(NamedTuple):
    """How recipe ``delayed`` casts what a linear layer multiplies."""

    input: Scale
    weight: Scale
    gradient: Scale


def _scale_of(quantizer: Any) -> Scale:
    return Scale(quantizer.scale, quantizer.amax, E5M2 if quantizer.dtype.name.endswith("E5M2") else E4M3)


def cast_by(x: torch.Tensor, scale: Scale, columns: bool) -> Cast:
    """A matrix on the GPU in FP8 by Transformer Engine's kernel; its transpose too if asked for."""
    import transformer_engine.pytorch as te

    types = {E4M3: te.DType.kFloat8E4M3, E5M2: te.DType.kFloat8E5M2}
    quantizer = te.Float8Quantizer(scale.factor, scale.largest, types[scale.dtype], columnwise=columns)
    quantizer.internal = True
    made = quantizer(x)
    transpose = made._transpose.view(scale.dtype) if columns else None
    return Cast(made._data.view(scale.dtype), transpose, made._scale_inv)


class _Held:
    """One of Transformer Engine's layers, made when it is first needed, without a parameter of its own.

    Attributes:
        first: whether the next product is the first of its step, which casts the weight for all that follow; None
            casts it each time and keeps no copy.
        resharded: whether the weight is given back between forward and backward. Then backward casts it again, instead
            of keeping a copy that is larger than this rank's shard.
    """

    def __init__(self) -> None:
        self.first: bool | None = None
        self.resharded = False
        self._layer: Any = None

    def _is_first(self) -> bool | None:
        """What to tell the layer of the product that comes."""
        if not torch.is_grad_enabled() or self.first is None:
            return None
        first, self.first = self.first, False
        return first


class Product(_Held):
    """``x W^T`` by Transformer Engine's linear layer, in FP8 inside `one_step`, else in the precision of ``x``.

    Args:
        fp8_wgrad: whether the gradient of the weight is multiplied in FP8 too.
    """

    def __init__(self, fp8_wgrad: bool = True) -> None:
        super().__init__()
        self.fp8_wgrad = fp8_wgrad
        self._weight: Cast | None = None

    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` and ``[out, in]`` to ``[..., out]``."""
        layer = self._made(weight)
        layer.fast_setattr("_is_fsdp2", self.resharded)
        if self.fp8_wgrad or not in_fp8():
            layer.fast_setattr("weight", weight)
            return layer(x, is_first_microbatch=self._is_first())
        layer.fast_setattr("weight", weight.detach())
        return _WeightGradient.apply(layer(x, is_first_microbatch=self._is_first()), x, weight)

    def scales(self, x: torch.Tensor, weight: torch.Tensor) -> Scales:
        """What recipe ``delayed`` casts by, for a product that somebody else takes inside `one_step`."""
        layer = self._made(weight)
        layer.fast_setattr("weight", weight)
        layer.prepare_forward(x, allow_non_contiguous=True)  # makes the scales, and lets `one_step` know them
        layer.end_forward()
        forward, backward = layer.quantizers["scaling_fwd"], layer.quantizers["scaling_bwd"]
        return Scales(*map(_scale_of, (forward[0], forward[1], backward[0])))

    def cast_weight(self, weight: torch.Tensor, scale: Scale) -> Cast:
        """The weight of such a product in FP8, cast once for all that share it."""
        first = self._is_first()
        if first is False and self._weight is not None:
            return self._weight
        columns = torch.is_grad_enabled() and not self.resharded
        cast = cast_by(weight.detach(), scale, columns)
        self._weight = cast if first else None
        return cast

    def _made(self, weight: torch.Tensor) -> Any:
        """A layer whose parameter is taken away: a plain attribute of that name is set for each product."""
        if self._layer is None:
            import transformer_engine.pytorch as te

            rows, columns = weight.shape
            self._layer = te.Linear(columns, rows, bias=False, params_dtype=weight.dtype, device="meta")
            del self._layer._parameters["weight"]
        return self._layer


class GroupedProduct(_Held):
    """`Product` of each of several weights with its own rows, by Transformer Engine's grouped layer."""

    def multiply(self, rows: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Rows ``[n, in]``, group after group, and ``[groups, out, in]`` to ``[n, out]``.

        Args:
            rows, weights: operands.
            counts: rows of each group, multiples of what the recipe asks for.
        """
        if self._layer is None:
            self._layer = self._make(weights)
        for group, weight in enumerate(weights.unbind()):
            self._layer.fast_setattr(f"weight{group}", weight)
        return self._layer(rows, counts, is_first_microbatch=self._is_first())

    @staticmethod
    def _make(weights: torch.Tensor) -> Any:
        import transformer_engine.pytorch as te

        groups, rows, columns = weights.shape
        layer = te.GroupedLinear(groups, columns, rows, bias=False, params_dtype=weights.dtype, device="meta")
        for group in range(groups):
            del layer._parameters[f"weight{group}"]
            layer.fast_setattr(f"bias{group}", weights.new_empty(0))
        return layer


class Padding:
    """Fills each group of rows up with zeros, and takes them out again.

    Args:
        groups: their number.
        multiple: what their sizes are brought to.
    """

    def __init__(self, groups: int, multiple: int) -> None:
        self.groups, self.multiple = groups, multiple
        self._layers: Any = None

    def fill(self, rows: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Rows ``[n, width]``, group after group, to more rows, and the size of each group then."""
        if self._layers is None:
            import transformer_engine.pytorch as te

            sizes = {"num_gemms": self.groups, "align_size": self.multiple}
            self._layers = te.Fp8Padding(**sizes), te.Fp8Unpadding(**sizes)
        return self._layers[0](rows, counts)

    def strip(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The rows that `fill` was given, in its order."""
        return self._layers[1](rows, counts)


def in_fp8() -> bool:
    """Whether a product that runs now is in FP8."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    return FP8GlobalStateManager.is_fp8_enabled()


class _WeightGradient(torch.autograd.Function):
    """Lets a product through, and computes the gradient of its weight from operands that were not cast."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (x,) = ctx.saved_tensors
        return grad, None, grad.flatten(0, -2).t() @ x.flatten(0, -2)
