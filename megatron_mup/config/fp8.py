"""Which matrix products run in FP8, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """FP8."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply matrices of the layers in FP8, gradients in E4M3 like all else, or in E5M2 (hybrid). Default: no FP8."""
    fp8_recipe: Literal["static", "delayed", "tensorwise", "blockwise", "mxfp8"] = "static"
    """How values are brought into range. static: not at all, for unit-scaled models (--parametrization umup, munit). By
    Transformer Engine: delayed, by the largest values of past steps; tensorwise, by the tensor's own; blockwise, by
    those of blocks of 128; mxfp8, of 32, on Blackwell."""
    fp8_margin: int = 0
    """Powers of two that recipe delayed leaves free."""
    fp8_amax_history_len: int = 1024
    """Steps whose largest values recipe delayed remembers."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """Which of them it goes by."""
    fp8_wgrad: bool = True
    """Multiply for gradients of weights in FP8 too."""
    fp8_param_gather: bool = False
    """Not there: FSDP2 gathers parameters in bf16, and they are cast behind. Refused, with the reason."""
    fp8_critical_bf16: bool = False
    """Leave attention output and the MLP's second matrix, whose inputs no norm has scaled, out of FP8."""
    first_last_layers_bf16: bool = False
    """Leave the first and last layers out of FP8."""
    num_layers_at_start_in_bf16: int = 1
    """First layers that --first-last-layers-bf16 leaves out."""
    num_layers_at_end_in_bf16: int = 1
    """Last layers that --first-last-layers-bf16 leaves out."""
    fp8_fallback: Literal["stop", "bf16", "emulate"] = "stop"
    """Without hardware for FP8: stop; go on without FP8; or round to FP8 and multiply in fp32, which is slow."""

    @property
    def row_multiple(self) -> int:
        """Of which the recipe wants the rows of each expert."""
        return 32 if self.fp8_recipe == "mxfp8" else 16

    @property
    def steady_gradients(self) -> bool:
        """Whether scales of gradients are older than the gradients."""
        return self.fp8_format is not None and self.fp8_recipe in ("static", "delayed")

    def layers(self, num_layers: int) -> range:
        """The layers of a model whose matrices are multiplied in FP8."""
        if self.fp8_format is None:
            return range(0)
        if not self.first_last_layers_bf16:
            return range(num_layers)
        return range(self.num_layers_at_start_in_bf16, num_layers - self.num_layers_at_end_in_bf16)
