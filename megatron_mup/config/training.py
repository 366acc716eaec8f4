"""Batches, length, precision and memory of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training."""

    micro_batch_size: int = 1
    """Sequences per rank in one forward pass."""
    global_batch_size: int | None = None
    """Sequences per optimizer step, over all ranks. Default: micro-batch size x data-parallel size."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """START INCREMENT SAMPLES: grow the global batch from START to --global-batch-size in steps of INCREMENT over
    SAMPLES samples."""
    seq_length: int = 1024
    """Tokens per sequence."""
    train_iters: int | None = None
    """Optimizer steps of the run."""
    train_samples: int | None = None
    """Samples of the run; instead of --train-iters."""
    exit_interval: int | None = None
    """Save and leave after an iteration divisible by this."""
    exit_duration_in_mins: float | None = None
    """Save and leave after this many minutes."""
    seed: int = 1234
    """Seed of initial weights, sample order and dropout."""
    bf16: bool = False
    """Compute in bf16. Default: fp32."""
    main_params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which the optimizer keeps weights and state with --bf16."""
    recompute_granularity: Literal["none", "full", "selective"] = "none"
    """Recompute activations in backward: whole layers; or all but the matrix products and attention. Layers that
    --torch-compile compiles in pieces, for experts or context parallelism, take products in the pieces again."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Which layers --recompute-granularity full takes: all, in chunks of --recompute-num-layers; or the first so many
    of a stage."""
    recompute_num_layers: int = 1
    """Layers per chunk (uniform) or per stage (block)."""
    activation_memory_budget: float = 1.0
    """Share of a compiled layer's activations that is kept; the compiler recomputes what saves that much most cheaply.
    1 keeps what is fastest, 0 the layer's input."""
    recompute_activations: bool = False
    """Same as --recompute-granularity selective."""
    torch_compile: bool = False
    """Compile each transformer layer with torch.compile."""
    cuda_graph_impl: Literal["none", "local"] = "none"
    """Launch the kernels of forward and backward one by one; or all at once, as a CUDA graph that the fourth step
    captures: for a model whose kernels end before the host has launched the next, on one GPU or under FSDP2. Changes
    nothing on a CPU."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Whose matrix products the layers take: PyTorch's, or Transformer Engine's."""
    attention_backend: Literal["auto", "flash", "flash4", "fused", "unfused"] = "auto"
    """Attention kernel: PyTorch's choice; PyTorch's FlashAttention; FlashAttention-4, a package of its own for Hopper
    GPUs and later; cuDNN; the plain formula."""
    norm_impl: Literal["native", "apex"] = "native"
    """Whose kernels norms are on a GPU: PyTorch's, which a compiler fuses with their neighbours, or Apex's."""
    cross_entropy_z_loss: float = 0.0
    """Coefficient of the z-loss, mean over tokens of log(sum exp(logits))^2."""
    cross_entropy_fusion_impl: Literal["native", "linear"] = "native"
    """Loss from the logits of a micro-batch; or output layer and loss in one, over chunks of tokens, so that all logits
    are never held."""
    loss_chunk_size: int = 2048
    """Tokens per chunk of --cross-entropy-fusion-impl linear."""
    manual_gc: bool = False
    """Keep Python's garbage collector from running in the middle of a step, on each rank at another time."""
    manual_gc_interval: int | None = None
    """Iterations after which it runs with --manual-gc, on all ranks together. Default: before the first step only."""
    eval_interval: int | None = None
    """Iterations between evaluations on the validation split."""
    eval_iters: int = 100
    """Global batches per evaluation; 0 evaluates nothing."""
    deterministic_mode: bool = False
    """Refuse kernels whose results differ between runs."""

    @property
    def evaluation_interval(self) -> int | None:
        """Iterations between evaluations, None if there are none."""
        return self.eval_interval if self.eval_iters else None

    @property
    def recompute(self) -> Literal["none", "full", "selective"]:
        """Granularity of recomputation, alias resolved."""
        return "selective" if self.recompute_activations else self.recompute_granularity
