"""Which matrix products run in FP8, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """FP8."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply matrices of the layers in FP8, gradients in E4M3 like all else, or in E5M2 (hybrid). Default: no FP8."""
    fp8_recipe: Literal["static"] = "static"
    """How values are brought into range. static: not at all, for unit-scaled models (--parametrization umup, munit)."""
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

    def layers(self, num_layers: int) -> range:
        """The layers of a model whose matrices are multiplied in FP8."""
        if self.fp8_format is None:
            return range(0)
        if not self.first_last_layers_bf16:
            return range(num_layers)
        return range(self.num_layers_at_start_in_bf16, num_layers - self.num_layers_at_end_in_bf16)
