"""Data parallelism by FSDP2: sharded, hybrid, or replicated (a hybrid whose shards are one rank wide)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron_mup.config import Config
from megatron_mup.parallel import copy_engine, shared_memory
from megatron_mup.parallel.mesh import Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(config: Config) -> torch.dtype:
    """Precision of activations and matrix products."""
    return torch.bfloat16 if config.training.bf16 else torch.float32


def reduce_dtype(config: Config) -> torch.dtype:
    """Precision that FSDP2 sums gradients in."""
    return torch.bfloat16 if config.parallel.grad_reduce_in_bf16 else torch.float32


def main_dtype(config: Config) -> torch.dtype:
    """Precision in which the optimizer keeps weights."""
    return DTYPES[config.training.main_params_dtype] if config.training.bf16 else torch.float32


def parameter_dtype(config: Config, mesh: Mesh) -> torch.dtype:
    """Precision in which the module holds its parameters.

    FSDP2 keeps the optimizer's precision and casts when it gathers; a rank without data-parallel peers has nothing to
    gather, so its module holds what it computes with and the optimizer a copy of its own (`optim.main_params`).
    """
    return main_dtype(config) if uses_fsdp(config, mesh) else compute_dtype(config)


def uses_fsdp(config: Config, mesh: Mesh) -> bool:
    """Whether FSDP2 holds the parameters: there are ranks to share them with, and DeepSpeed's engine doesn't."""
    return mesh.sharding_size > 1 and config.parallel.distributed_engine == "native"


def keeps_replicas_apart(config: Config, mesh: Mesh) -> bool:
    """Whether gradients of layers are left unsummed over replicas (``--dion-compressed-sync``)."""
    flags = config.optimizer
    return flags.optimizer == "dion" and flags.dion_compressed_sync and mesh.size("dp_replicate") > 1


def is_left_apart(param: torch.Tensor) -> bool:
    """Whether FSDP2 leaves a parameter's gradient unsummed over replicas, in a run that keeps them apart."""
    return isinstance(param, DTensor) and param.device_mesh.mesh_dim_names == ("dp_shard",)


@dataclass(frozen=True)
class Units:
    """What FSDP2 gathers and reduces together, in the order of use.

    Attributes:
        layers: transformer layers.
        experts: those of each layer that has some.
        heads: the output layer, where it can be a unit: its gradients then travel while the layers' are computed.
    """

    layers: list[nn.Module]
    experts: list[nn.Module]
    heads: list[nn.Module]


def shard_over_data(model: nn.Module, units: Units, config: Config, mesh: Mesh) -> None:
    """Applies FSDP2 to each unit and to the rest of a model; does nothing on a rank without data-parallel peers.

    The experts of a layer are a unit of their own, over the ranks that hold the same ones. Gradients are summed, not
    averaged: the loss is already divided by the global number of tokens. Where replicas are kept apart, a layer is a
    unit of one replica.

    Args:
        model: a pipeline stage, on the meta device.
        units: its parts.
        config: sharding strategy and reduction precision.
        mesh: the run's mesh.
    """
    if not uses_fsdp(config, mesh):
        return
    parallel = config.parallel
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype(config),
        reduce_dtype=reduce_dtype(config),
        cast_forward_inputs=False,
    )
    hybrid = mesh.size("dp_replicate") > 1
    axis = mesh.world["dp_replicate", "dp_shard"] if hybrid else mesh.world["dp_shard"]
    reshard = parallel.sharding == "optim_grads_params"
    if mesh.experts is not None:
        copies = mesh.size("edp_replicate") > 1
        expert_axis = mesh.experts["edp_replicate", "edp_shard"] if copies else mesh.experts["edp_shard"]
        for unit in units.experts:
            fully_shard(unit, mesh=expert_axis, mp_policy=policy, reshard_after_forward=reshard)
    layer_axis = mesh.world["dp_shard"] if keeps_replicas_apart(config, mesh) else axis
    for layer in units.layers:
        fully_shard(layer, mesh=layer_axis, mp_policy=policy, reshard_after_forward=reshard)
    for head in units.heads:  # its backward follows its forward at once
        fully_shard(head, mesh=axis, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=axis, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no pre-multiplied sum, which a factor other than the mean would otherwise ask for.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    model.register_forward_hook(_forget_whole_parameters)


def _forget_whole_parameters(model: nn.Module, *_: object) -> None:
    """After a pass without gradients, lets go of parameters that were kept for a backward pass.

    A training step that a CUDA graph replays changes their values without FSDP2's notice.
    """
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def transport_of_auto(config: Config, mesh: Mesh) -> str | None:
    """What ``--fsdp-transport auto`` comes to in this run, in words; None where nothing asks for it. Collective."""
    if config.parallel.fsdp_transport == "collective" or not uses_fsdp(config, mesh):
        return None
    near = shared_memory.within_reach(mesh.group("dp_shard"), mesh.device)
    return "copy engines" if near else "collectives, for not all ranks read each other's memory"


def use_copy_engines(model: nn.Module, units: Units, config: Config, mesh: Mesh) -> None:
    """Has copy engines move FSDP2's messages where they can (`parallel.copy_engine`). Collective.

    Args:
        model: what `shard_over_data` sharded, with memory but without values.
        units: as there.
        config: transport, precisions, micro-batches.
        mesh: the run's mesh.
    """
    if config.parallel.fsdp_transport == "collective" or not uses_fsdp(config, mesh):
        return
    _use_copy_engines(model, [units.layers, units.heads, [model]], "dp", config, mesh)
    if mesh.experts is not None:
        _use_copy_engines(model, [units.experts], "edp", config, mesh)


def _use_copy_engines(model: nn.Module, kinds: list[list[nn.Module]], axis: str, config: Config, mesh: Mesh) -> None:
    """The same for units that share axes. Units of a kind are used one after the other."""
    group = mesh.group(f"{axis}_shard")
    own = {unit: copy_engine.own_parameters(unit) for units in kinds for unit in units}
    parallel, training, dtype = config.parallel, config.training, compute_dtype(config)
    make = shared_memory.shared_buffers(group, mesh.device, parallel.distributed_timeout_minutes * 60)
    if make is None or not any(own.values()):
        return
    # Gradients of one micro-batch lose nothing if they travel as autograd gave them; sums of several are in fp32.
    single = config.global_batch_size(mesh.world.size()) == training.micro_batch_size * mesh.dp_size
    reduce = copy_engine.CopyReduceScatter(
        make,
        max(copy_engine.gradient_count(parameters, group.size()) for parameters in own.values()),
        group,
        asked=reduce_dtype(config),
        wire=dtype if single and not parallel.grad_reduce_in_bf16 else None,
        result=main_dtype(config) if mesh.size(f"{axis}_replicate") == 1 else None,
    )
    # FSDP2 gathers uneven shards itself: their padding doesn't go with what follows.
    even = {
        unit: parameters
        for unit, parameters in own.items()
        if parameters and all(parameter.shape[0] % group.size() == 0 for parameter in parameters.values())
    }
    shards = copy_engine.Shards([p for parameters in even.values() for p in parameters.values()], make, group, dtype)
    all_places = []
    for units in kinds:
        together = len(units) if parallel.sharding == "optim_grads" else _whole_at_once(config)
        places = copy_engine.Places(together, dtype, mesh.device)
        all_places.append(places)
        for unit in units:
            assert isinstance(unit, FSDPModule)
            unit.set_custom_reduce_scatter(reduce)
            if unit in even:
                unit.set_custom_all_gather(copy_engine.CopyAllGather(unit, even[unit], shards, places))

    def begin(*_: object) -> None:
        shards.begin()
        for places in all_places:
            places.begin()

    model.register_forward_pre_hook(begin, prepend=True)  # before FSDP2's own, which gathers
    model.register_forward_hook(lambda *_: shards.end())


def _whole_at_once(config: Config) -> int:
    """Units of a kind that have whole parameters at once: one and the next, and all that are recomputed together."""
    chunk = config.training.recompute == "full" and config.training.recompute_method == "uniform"
    return 1 + (config.training.recompute_num_layers if chunk else 1)


def set_last_micro_batch(model: nn.Module, is_last: bool) -> None:
    """Tells FSDP2 whether the coming backward is a step's last, the one that reduces gradients."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_is_last_backward(is_last)


def take_over_gradients(model: nn.Module) -> None:
    """Has FSDP2 take gradients of gathered weights over into its sums over micro-batches, in their precision.

    It does so by itself when a backward pass has gone through a layer. Gradients of weights that a pipeline schedule
    takes by themselves it would leave to be summed in the weights' precision.
    """
    if not isinstance(model, FSDPModule):
        return
    for state in fully_shard.state(model)._state_ctx.all_states:  # type: ignore[attr-defined]
        # PyTorch 2.11 has one group of parameters in a module, 2.13 some.
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for param in [param for group in groups if group is not None for param in group.fsdp_params]:
            param.accumulate_unsharded_grad_if_needed()
            param.to_accumulated_grad_if_needed()
