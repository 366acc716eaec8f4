"""Whether this machine computes as a run asks, what the run does where it doesn't, and FP8 over a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from megatron_mup.config import Config, ConfigError
from megatron_mup.config.context_rules import check_context
from megatron_mup.config.fields import told
from megatron_mup.config.rules import check_kernels
from megatron_mup.kernels import libraries, te
from megatron_mup.kernels.fp8 import device_has_fp8
from megatron_mup.layers.fp8 import StaticLinear
from megatron_mup.layers.te import products
from megatron_mup.models.chunks import Model
from megatron_mup.parallel.data_parallel import uses_fsdp
from megatron_mup.parallel.mesh import Mesh


def settle_fp8(config: Config) -> tuple[Config, list[str]]:
    """The configuration that this machine can run, and warnings if that isn't what was asked for.

    Raises:
        ConfigError: FP8 or Transformer Engine was asked for, the machine hasn't got it, and ``--fp8-fallback`` says to
            stop.
    """
    if config.training.transformer_impl == "transformer_engine":
        return _settle_transformer_engine(config)
    fp8 = config.fp8
    device = torch.device("cuda", 0) if _on_gpu(config) else torch.device("cpu")
    if fp8.fp8_format is None or device_has_fp8(device):
        return config, []
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    if fp8.fp8_fallback == "stop":
        raise ConfigError(
            f"--fp8-format {fp8.fp8_format}",
            f"{what} has no FP8 matrix products (NVIDIA GPUs have them from compute capability 8.9 on)",
            "drop it, go on without (--fp8-fallback bf16), or emulate it slowly (--fp8-fallback emulate)",
        )
    if fp8.fp8_fallback == "emulate":
        return config, [f"{what} has no FP8: its rounding is emulated, which is slower than no FP8"]
    return replace(config, fp8=replace(fp8, fp8_format=None)), [f"{what} has no FP8: the run goes on without it"]


def _settle_transformer_engine(config: Config) -> tuple[Config, list[str]]:
    in_fp8 = config.fp8.fp8_format is not None
    found = _no_transformer_engine(config, config.fp8.fp8_recipe if in_fp8 else None)
    if found is None:
        return config, []
    why, fix = found
    if config.fp8.fp8_fallback == "stop":
        raise ConfigError(
            told(config, "transformer_impl", *(["fp8_recipe"] if in_fp8 else [])),
            f"Transformer Engine can't be used: {why}",
            f"{fix}, use --transformer-impl local, or go on in bf16 with PyTorch's products (--fp8-fallback bf16)",
        )
    plain = replace(
        config,
        training=replace(config.training, transformer_impl="local"),
        fp8=replace(config.fp8, fp8_format=None),
    )
    lost = "without it, and WITHOUT FP8, in bf16" if in_fp8 else "without it"
    return plain, [f"Transformer Engine can't be used: {why}. The run goes on {lost}"]


def _no_transformer_engine(config: Config, recipe: str | None) -> tuple[str, str] | None:
    """Why a run can't have Transformer Engine's products, and what would help; None if it can."""
    if not torch.cuda.is_available():
        return "this machine has no CUDA device", "run it where there is an NVIDIA GPU"
    if not _on_gpu(config):
        return "--distributed-backend gloo puts the run on CPUs", "use --distributed-backend nccl"
    if (why := te.obstacle(None)) is not None:
        return why, "install it (docs/performance.md)"
    why = te.obstacle(recipe)
    return None if why is None else (why, "choose another --fp8-recipe")


def check_libraries(config: Config) -> None:
    """Refuses kernels of libraries that this machine can't run.

    Raises:
        ConfigError: ``--adam-impl``, ``--norm-impl`` or ``--attention-backend flash4`` without the library, or on CPUs.
    """
    training = config.training
    asked = {
        "adam_impl": config.optimizer.adam_impl,
        "norm_impl": training.norm_impl,
        "attention_backend": "flash4" if training.attention_backend == "flash4" else "native",
    }
    for name, library in asked.items():
        if library == "native":
            continue
        if not _on_gpu(config):
            raise ConfigError(told(config, name), "the run is on CPUs", "drop the flag")
        if (why := libraries.obstacle(library)) is not None:
            raise ConfigError(told(config, name), why, "install the library (docs/performance.md), or drop the flag")


def settle_attention(config: Config) -> Config:
    """``--attention-backend auto`` as FlashAttention-4 where it is installed, measured to be the fastest kernel, and
    takes this run's attention: on Hopper GPUs, heads of 64 or 128 channels, no run that wants the same sums every time.
    """
    training, model = config.training, config.model
    if training.attention_backend != "auto" or not _on_gpu(config):
        return config
    measured = torch.cuda.get_device_capability() == (9, 0) and model.head_dim in (64, 128)
    if training.deterministic_mode or not measured:
        return config
    settled = replace(config, training=replace(training, attention_backend="flash4"))
    try:
        check_kernels(settled)
        check_context(settled)
    except ConfigError:
        return config
    return config if libraries.obstacle("flash4") is not None else settled


def _on_gpu(config: Config) -> bool:
    return torch.cuda.is_available() and config.parallel.distributed_backend != "gloo"


def keep_static_casts(model: Model, config: Config, mesh: Mesh) -> None:
    """Lets static FP8 layers keep their weights' casts for backward on ranks that hold parameters whole and one
    micro-batch at a time; elsewhere that would be more than a rank's share of the weights, or many copies."""
    if uses_fsdp(config, mesh) or mesh.size("pp") > 1:
        return
    for part in model.parts:
        for module in part.modules():
            if isinstance(module, StaticLinear):
                module.keeps = True


class TransformerEngineStep:
    """What Transformer Engine's products have to know of a step; nothing in a run without.

    Args:
        model: this rank's stages.
        config: the run's configuration, settled.
        mesh: the run's mesh.

    Attributes:
        cold: whether recipe ``delayed`` has seen no value yet: scales of a run, or of a resumed one, are found in a
            first pass over its first batch, and never saved.
    """

    def __init__(self, model: Model, config: Config, mesh: Mesh) -> None:
        fp8, self._group = config.fp8, mesh.matrix_group
        self._products = [product for part in model.parts for product in products(part)]
        self._recipe = None
        if self._products and fp8.fp8_format is not None:
            te.forget()
            self._recipe = te.recipe_of(
                fp8.fp8_recipe, fp8.fp8_format, fp8.fp8_margin, fp8.fp8_amax_history_len, fp8.fp8_amax_compute_algo
            )
        self.cold = self._recipe is not None and fp8.fp8_recipe == "delayed"
        sharded = uses_fsdp(config, mesh) and config.parallel.sharding != "no_shard"
        resharded = sharded and config.parallel.sharding == "optim_grads_params"
        for product in self._products:
            product.resharded = resharded
        self._keeps, self._recomputes = not sharded, config.training.recompute == "full"

    def around(self, micro_batches: int, train: bool = True) -> AbstractContextManager[None]:
        """Context of all passes of a step, or of an evaluation. Collective over a stage's ranks.

        Args:
            micro_batches: of this rank.
            train: whether weights are trained on what is inside.
        """
        if self._recipe is None:
            return nullcontext()
        used_again = micro_batches > 1 or self._recomputes
        for product in self._products:
            product.first = True if self._keeps and used_again else None
        return te.one_step(self._recipe, self._group, train)
