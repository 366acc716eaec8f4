"""DeepSpeed in the place of FSDP2 and of this package's optimizers: ZeRO-1, 2 and 3 with AdamW (docs/deepspeed.md).

Model, initial values, learning rates, schedule, loss and checkpoints stay this package's. DeepSpeed gathers and frees
parameters, sums gradients, measures and clips their norm, and calls AdamW.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_mup.config import Config, ConfigError
from megatron_mup.models.chunks import Model
from megatron_mup.optim.main_params import MainParam
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.horizon import adam_betas
from megatron_mup.parametrization.table import scaling
from megatron_mup.training.balancing import Balancing
from megatron_mup.training.forward_backward import Batch, ForwardBackward
from megatron_mup.training.precision import TransformerEngineStep
from megatron_mup.training.step import Gate, PhaseTimer, StepResult, TrainStep, always, untimed
from megatron_mup.training.zero_shards import ZeroShards

BUCKET = 50_000_000
"""Elements that are reduced together. DeepSpeed's own 5e8 take 2 GB."""


def check_deepspeed(config: Config) -> None:
    """Refuses the engine where the package is missing; called on every rank, so that all of them stop.

    Raises:
        ConfigError: ``--distributed-engine deepspeed`` without it.
    """
    if config.parallel.distributed_engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "--distributed-engine deepspeed",
            "the package deepspeed is not installed",
            "pip install 'megatron-mup[deepspeed]', or use --distributed-engine native",
        )


class DeepSpeedStep(TrainStep):
    """`TrainStep` with DeepSpeed's engine inside; `main` and `optimizer` are views of what it holds.

    Args:
        model: the model, on the meta device.
        config: validated configuration.
        mesh: the run's mesh.
    """

    main: ZeroShards  # type: ignore[assignment]
    optimizer: ZeroAdamW  # type: ignore[assignment]

    def __init__(self, model: Model, config: Config, mesh: Mesh) -> None:
        deepspeed = _deepspeed(mesh.device)
        self.model, self.config, self.mesh = model, config, mesh
        settings = engine_settings(config, mesh.device)
        _give_memory(model, settings, mesh.device)
        adamw = GatedAdamW(parameter_groups(model, config), betas=adam_betas(config), fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings)
        self.main = ZeroShards(model, config, engine)
        self.optimizer = ZeroAdamW(engine, adamw, self.main)
        self.forward_backward = ForwardBackward(engine, config, mesh)
        self.balancing = Balancing(model, config, mesh)
        self.transformer_engine = TransformerEngineStep(model, config, mesh)

    def initialise(self) -> None:
        """Gives parameters their initial values. Collective."""
        self.main.initialise()

    def __call__(
        self, batch: Batch, factor: float, request: int = 0, timer: PhaseTimer = untimed, gate: Gate = always
    ) -> StepResult:
        """Takes one step, as `TrainStep` does."""
        with timer("forward-backward"):
            tokens, requests = self._agree(batch, request)
            # DeepSpeed divides the sum of gradients by the number of ranks.
            sums = self.forward_backward(batch, tokens / self.mesh.dp_size)
        with timer("gradients"):
            loss = self._mean_loss(sums, tokens)
        with timer("optimizer"):
            self.before_update()
            norm = self.optimizer.step(factor, lambda norm: gate(loss, norm))
        return StepResult(loss, norm, requests)


def _deepspeed(device: torch.device) -> Any:
    """The package, told which device this rank has, and to compile nothing."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # by itself it takes the machine's best
    local_rank = os.environ.get("LOCAL_RANK", "0") if device.index is None else str(device.index)
    os.environ["LOCAL_RANK"] = local_rank  # SLURM's tasks have another name for it
    # PyTorch 2.13 says so of collectives that DeepSpeed calls.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*_tensor` is deprecated", category=FutureWarning)
    import deepspeed

    # All kernels are PyTorch's. Asked which ones of its own it could compile, it would run compilers, and build one.
    deepspeed.ops.__compatible_ops__ = {}
    # What is left of a run before this one in this process.
    deepspeed.utils.groups._release_process_group_references()
    return deepspeed


def engine_settings(config: Config, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration. Micro-batches are counted and losses divided here, so it does neither."""
    parallel = config.parallel
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "reduce_bucket_size": BUCKET,
        # Its own linear function saves memory, but selective recomputation gives wrong gradients through it.
        "memory_efficient_linear": config.training.recompute != "selective",
    }
    if parallel.optimizer_cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.clip_grad,
        "bf16": {"enabled": config.training.bf16},
        "communication_data_type": "bf16" if parallel.grad_reduce_in_bf16 else "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        # It knows torch's AdamW by name, not a subclass of it, and where it offloads it would compile its own.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _give_memory(model: Model, settings: dict[str, Any], device: torch.device) -> None:
    """Allocates parameters; with ZeRO-3 one module after the other, each cut before the next one comes."""
    import deepspeed

    for module in reversed(list(model.modules())):
        module.to_empty(device=device, recurse=False)
        if settings["zero_optimization"]["stage"] == 3:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)


def parameter_groups(model: Model, config: Config) -> list[dict[str, Any]]:
    """AdamW's groups: parameters of the same learning rate, weight decay and epsilon."""
    groups: dict[tuple[float, float, float], list[torch.Tensor]] = {}
    for name, param in model.named_parameters():
        numbers = scaling(model.metas[name], config)
        groups.setdefault((numbers.lr, numbers.weight_decay, numbers.eps), []).append(param)
    return [
        {"params": params, "lr": lr, "peak": lr, "weight_decay": decay, "eps": eps}
        for (lr, decay, eps), params in groups.items()
    ]


class GatedAdamW(torch.optim.AdamW):
    """AdamW that asks before it steps. DeepSpeed calls it for each of its vectors in turn, gradients being clipped."""

    may_step: Callable[[], bool]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Steps over the groups that DeepSpeed shows, or leaves weights and state as they are, to the bit."""
        if self.may_step():
            super().step(closure)


class ZeroAdamW:
    """The optimizer inside DeepSpeed, as `optim.optimizer.Optimizer` is seen by the loop and by checkpoints."""

    def __init__(self, engine: Any, adamw: GatedAdamW, shards: ZeroShards) -> None:
        self._engine, self._adamw, self._shards = engine, adamw, shards
        self._steps = 0

    def step(self, factor: float, gate: Callable[[torch.Tensor], bool]) -> torch.Tensor:
        """One step at ``factor`` times the peak learning rates, if ``gate`` lets the gradient norm pass.

        Returns:
            The global gradient norm before clipping, 0-d. Where it isn't finite DeepSpeed leaves the step out.
        """
        answers: list[bool] = []

        def may_step() -> bool:
            if not answers:
                answers.append(gate(self._norm()))
            return answers[0]

        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * factor
        self._adamw.may_step = may_step
        self._engine.step()
        if not answers:
            gate(self._norm())
        elif answers[0]:
            self._steps += 1
        return self._norm()

    def _norm(self) -> torch.Tensor:
        norm = torch.as_tensor(
            self._engine.optimizer._global_grad_norm, dtype=torch.float32, device=self._engine.device
        )
        return torch.where(norm < 0, torch.inf, norm)  # -1 is its word for what isn't finite

    def advance(self, _iteration: int) -> bool:
        """No change of optimizers."""
        return False

    def restore(self, _config: Config, _iteration: int) -> None:
        """No other state than the one that is there."""

    def gather_state(self) -> None:
        """Nothing that replicas keep apart."""

    def plan(self) -> str:
        """No matrices to hand out."""
        return "DeepSpeed's AdamW orthonormalizes no matrix"

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """Both moments; live."""
        return self._shards.state

    def state_scalars(self) -> dict[str, int]:
        """``step``, the steps taken."""
        return {"step": self._steps}

    def load_state_scalars(self, scalars: Mapping[str, int]) -> None:
        """Takes over what :meth:`state_scalars` gave."""
        self._steps = scalars["step"]
        for count in self._shards.steps:
            count.fill_(self._steps)
