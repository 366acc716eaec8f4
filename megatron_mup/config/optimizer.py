"""Optimizer and schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer."""

    optimizer: Literal["adam", "muon", "normuon", "muonsphere", "spectral_sphere", "scion", "dion"] = "adam"
    """adam: AdamW for everything; the others for the hidden matrices (scion: embedding and output layer too), with
    --scalar-optimizer for the rest."""
    optimizer_switch_at: int | None = None
    """Iteration at which --optimizer takes over; AdamW trains everything before. Xmodel-2.5 changes to Muon where the
    decay of the learning rate begins. Default: --optimizer from the start."""
    optimizer_switch_carry_state: bool = False
    """At --optimizer-switch-at begin with AdamW's state instead of zeros: its first moment becomes the momentum."""
    scalar_optimizer: Literal["adam", "lion", "adam_atan2", "ademamix"] = "adam"
    """What trains the parameters that a matrix optimizer leaves. adam: AdamW."""
    lr: float = 3e-4
    """Peak learning rate of AdamW (or --scalar-optimizer) at base size; the parametrization scales it per parameter."""
    muon_lr: float | None = None
    """Peak learning rate of the matrix optimizer at base size. Default: --lr."""
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
    exp_avg_dtype: Literal["fp32", "bf16"] | None = None
    """Precision in which AdamW keeps its first moment; it computes in fp32. Default: that of the weights it updates."""
    exp_avg_sq_dtype: Literal["fp32", "bf16"] | None = None
    """The same of its second moment. With --adam-beta2 from 0.996 on a step moves it by less than bf16 can show."""
    adam_impl: Literal["native", "apex", "transformer_engine"] = "native"
    """Whose kernel AdamW's step is on a GPU: ours; FusedAdam of NVIDIA's Apex or of Transformer Engine, for weights and
    state in fp32. docs/performance.md says which is fastest."""
    lion_beta1: float = 0.9
    """Share of the momentum in Lion's step."""
    lion_beta2: float = 0.99
    """Decay of Lion's momentum."""
    ademamix_beta3: float = 0.9999
    """Decay of AdEMAMix's slow average."""
    ademamix_alpha: float = 8.0
    """Weight of AdEMAMix's slow average."""
    ademamix_warmup_iters: int | None = None
    """Iterations over which the two above grow to their values. Default: all of the run."""
    muon_momentum: float | None = None
    """Decay of the matrix optimizer's momentum. Default: 0.95 for muon, normuon and dion, 0.9 for the
    others."""
    muon_momentum_style: Literal["ema", "sum"] = "ema"
    """ema: M = beta M + (1 - beta) G; sum: M = beta M + G. The steps are the same; the saved momentum is not."""
    muon_nesterov: bool = True
    """Nesterov form of the matrix optimizer's momentum; scion and dion have none."""
    muon_scale_mode: Literal["unit_rms_norm", "spectral", "shape_scaling", "match_rms_adamw"] = "unit_rms_norm"
    """Factor on the orthonormal update of an [out, in] matrix, but for scion: sqrt(out/in); sqrt(max(out, in));
    sqrt(max(1, out/in)); 0.2 sqrt(max(out, in)). On the sphere --sphere-radius is another."""
    muon_extra_scale_factor: float = 1.0
    """Another factor on the update."""
    muon_num_ns_steps: int | None = None
    """Newton-Schulz steps. Default: 5; 8 for muonsphere and spectral_sphere; of squaring 2, 3 for muonsphere."""
    muon_coefficient_type: (
        Literal["quintic", "simple", "jordan", "polar_express", "cans", "squaring", "generated"] | None
    ) = None
    """Newton-Schulz coefficients: quintic (YouJiacheng's), simple and jordan (Keller Jordan's), polar_express
    (arXiv 2505.16932), cans (arXiv 2506.10935; no room for bf16's rounding), squaring (two steps of degree 65 and 33,
    the least work), generated (the best for --muon-coefficient-lower and these steps). Default: quintic; polar_express
    for muonsphere and spectral_sphere."""
    muon_coefficient_safety: float = 1.01
    """polar_express and generated: singular values up to this times 1 do no harm. bf16 needs some."""
    muon_coefficient_lower: float = 1e-3
    """generated: smallest singular value that the coefficients are made for, as a share of the Frobenius norm."""
    muon_split_qkv: bool = True
    """Orthonormalize query, key and value apart, each over all its heads."""
    muon_split_heads: bool = False
    """Orthonormalize each head of query, key and value apart, with the scale of its own shape."""
    muon_split_fc1: bool = True
    """Orthonormalize gate and up apart."""
    muon_moe_router: bool = False
    """Train the routers of MoE layers by the matrix optimizer too, instead of --scalar-optimizer."""
    muon_distributed_mode: Literal["owner", "local", "gram"] = "owner"
    """How muon orthonormalizes matrices that ranks share. owner: whole, each on one rank. local: each tensor-parallel
    shard by itself, which makes the step depend on the number of tensor ranks. gram: in place, by sums of Gram
    matrices, where ranks cut the long side."""
    muon_ns_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of Newton-Schulz (of Dion's products) and of what travels. auto: bf16 on a GPU, fp32 on a CPU."""
    normuon_beta2: float = 0.95
    """Decay of NorMuon's row variances."""
    dion_rank_fraction: float = 0.25
    """Rank of Dion's update, as a share of a matrix's short side."""
    dion_compressed_sync: bool = False
    """Replicas of the weights (data-parallel ranks without sharding, HSDP's instances) sum low-rank factors of momenta,
    each of its own gradients, instead of the hidden matrices' gradients. Takes --clip-grad 0."""
    sphere_radius: float = 1.0
    """Factor c of the spectral norm c sqrt(out/in) that muonsphere and spectral_sphere give each matrix."""
    sphere_retraction: Literal["hard", "dynamic"] = "hard"
    """How matrices return to the sphere before each step. hard: W R / sigma; dynamic: W (1 + wd lr sign(R - sigma))
    with the weight decay wd."""
    sphere_solver_steps: int = 3
    """Rounds of spectral_sphere's search for the tangent direction; each narrows it 32-fold."""
    scion_constrained: bool = True
    """Keep scion's weights inside their balls: W = (1 - lr) W before each step."""
    scion_radius: float = 50.0
    """Radius of hidden matrices under scion, in the norm sqrt(in/out) ||W||_2."""
    scion_output_radius: float = 3000.0
    """Radius of the output layer (or tied embedding) under scion, in the norm of --scion-output-norm."""
    scion_output_norm: Literal["sign", "row"] = "sign"
    """Norm of the output layer (or tied embedding) under scion. sign: hidden size * max |W|; row: root of the hidden
    size * longest row."""
    scion_embedding_radius: float = 1.0
    """Radius of an untied embedding under scion, in the norm of --scion-embedding-norm."""
    scion_embedding_norm: Literal["column", "sign"] = "column"
    """Norm of an untied embedding under scion. column: largest root mean square of a token's vector; sign: max |W|."""
    optimizer_cuda_graph: bool = True
    """Replay the matrix optimizer's work from CUDA graphs, on GPUs with Triton; else launch it kernel by kernel."""
    optimizer_transport: Literal["auto", "collective"] = "auto"
    """What brings matrices to the ranks that orthonormalize them, and results back. auto: loads and stores in each
    other's memory where these ranks are GPUs of one machine, else collective; collective: NCCL or gloo."""
    optimizer_plan_cost: Literal["measured", "flops"] = "measured"
    """What the plan of the matrix optimizer balances over ranks. measured: time of each shape on the GPU of the first
    rank, taken at start and kept in ~/.cache/megatron_mup (XDG_CACHE_HOME); flops: FLOPs, as always on CPUs and under
    --deterministic-mode."""
    print_optimizer_plan: bool = False
    """Print which rank orthonormalizes which matrix (of the first pipeline stage), and how evenly the work is dealt."""

    @property
    def coefficient_type(self) -> str:
        """``--muon-coefficient-type``, default resolved."""
        sphere = self.optimizer in ("muonsphere", "spectral_sphere")
        return self.muon_coefficient_type or ("polar_express" if sphere else "quintic")

    @property
    def ns_steps(self) -> int:
        """``--muon-num-ns-steps``, default resolved."""
        sphere = self.optimizer in ("muonsphere", "spectral_sphere")
        usual = (2, 3) if self.coefficient_type == "squaring" else (5, 8)
        return self.muon_num_ns_steps or usual[sphere]


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
