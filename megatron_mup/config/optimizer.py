"""Optimizer and schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer."""

    optimizer: Literal["adam", "muon"] = "adam"
    """adam: AdamW for everything; muon: Muon for the hidden matrices, AdamW for the rest."""
    lr: float = 3e-4
    """Peak learning rate of AdamW at base size; the parametrization scales it per parameter."""
    muon_lr: float | None = None
    """Peak learning rate of Muon's matrices at base size. Default: --lr."""
    decoupled_lr: float | None = None
    """Peak learning rate of the embedding and the output layer at base size. Default: --lr."""
    min_lr: float = 0.0
    """Floor of the schedule, as for a group with learning rate --lr; other groups keep the same ratio to their peak."""
    weight_decay: float = 0.1
    """Weight decay at base size; norms and biases have none."""
    decay_embeddings: bool = False
    """Decay the embedding (and a tied output layer) too."""
    decay_output_layer: bool = True
    """Decay the untied output layer."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon at base size; the parametrization scales it per parameter."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""
    muon_nesterov: bool = True
    """Nesterov form of Muon's momentum."""
    muon_scale_mode: Literal["unit_rms_norm", "spectral", "shape_scaling", "match_rms_adamw"] = "unit_rms_norm"
    """Factor on Muon's orthonormal update of an [out, in] matrix: sqrt(out/in); sqrt(max(out, in));
    sqrt(max(1, out/in)); 0.2 sqrt(max(out, in))."""
    muon_extra_scale_factor: float = 1.0
    """Another factor on Muon's update."""
    muon_num_ns_steps: int = 5
    """Newton-Schulz steps."""
    muon_split_qkv: bool = True
    """Orthonormalize query, key and value apart, each over all its heads."""
    muon_split_fc1: bool = True
    """Orthonormalize gate and up apart."""
    muon_ns_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of Newton-Schulz. auto: bf16 on a GPU, fp32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate schedule."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD", "power"] = "cosine"
    """Shape of the decay after warm-up."""
    lr_decay_iters: int | None = None
    """Iterations until the schedule reaches its floor. Default: --train-iters."""
    lr_decay_samples: int | None = None
    """The same in samples, for runs given in --train-samples."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""
    lr_warmup_samples: int = 0
    """Samples of linear warm-up, for runs given in --train-samples."""
    lr_warmup_fraction: float | None = None
    """Share of the decay length that is warm-up; instead of the two above."""
    lr_warmup_init: float = 0.0
    """Learning rate at the first step of warm-up, as for a group with learning rate --lr."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Tail of WSD."""
    lr_wsd_decay_iters: int | None = None
    """Length of WSD's tail in iterations."""
    lr_wsd_decay_samples: int | None = None
    """The same in samples, for runs given in --train-samples."""
    lr_power_exponent: float = -0.51
    """Exponent b of the power schedule min(1, a n^b) over n samples trained."""
    lr_power_scale: float | None = None
    """Factor a of the power schedule. Default: the curve meets the peak where warm-up ends."""
