"""Optimizers from the configuration, with the defaults of their papers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from megatron_mup.config import Config, OptimizerConfig
from megatron_mup.optim.adamw import AdamW, AdamWSettings
from megatron_mup.optim.compressed_dion import CompressedDion
from megatron_mup.optim.dion import Dion, DionSettings
from megatron_mup.optim.exchange import MatrixRanks
from megatron_mup.optim.gram_muon import GramMuon
from megatron_mup.optim.local import LocalMuon
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.matrix import MatrixOptimizer
from megatron_mup.optim.muon import Muon, MuonSettings, NorMuon, NorMuonSettings
from megatron_mup.optim.scalar import (
    AdamAtan2,
    AdEMAMix,
    AdEMAMixSettings,
    ElementwiseOptimizer,
    Lion,
)
from megatron_mup.optim.scion import ScionTables, ScionTableSettings, hidden_settings
from megatron_mup.optim.sphere import MuonSphere, SpectralSphere, SphereSettings
from megatron_mup.parallel import shared_memory
from megatron_mup.parallel.data_parallel import DTYPES, keeps_replicas_apart
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.horizon import adam_betas
from megatron_mup.parametrization.table import Scaling

Numbered = list[tuple[MainParam, Scaling]]

MATRIX_OPTIMIZERS = ("muon", "normuon", "muonsphere", "spectral_sphere", "scion", "dion")
SCALAR_OPTIMIZERS = ("adam", "lion", "adam_atan2", "ademamix")

_SPHERE = ("muonsphere", "spectral_sphere")


def momentum(flags: OptimizerConfig) -> float:
    """Decay of the matrix optimizer's momentum."""
    if flags.muon_momentum is not None:
        return flags.muon_momentum
    return 0.95 if flags.optimizer in ("muon", "normuon", "dion") else 0.9


def shared_settings(flags: OptimizerConfig, device: torch.device) -> dict[str, Any]:
    """What all matrix optimizers take from the flags; ``--muon-ns-dtype auto`` is bf16 on a GPU and fp32 on a CPU."""
    precision = flags.muon_ns_dtype
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    return {
        "momentum": momentum(flags),
        "momentum_style": flags.muon_momentum_style,
        "num_ns_steps": flags.ns_steps,
        "coefficients": _coefficients(flags),
        "split_qkv": flags.muon_split_qkv,
        "split_heads": flags.muon_split_heads,
        "split_fc1": flags.muon_split_fc1,
        "ns_dtype": torch.bfloat16 if precision == "bf16" else torch.float32,
        "cuda_graph": flags.optimizer_cuda_graph,
    }


def _coefficients(flags: OptimizerConfig) -> str:
    """Name of the Newton-Schulz coefficients, as `optim.coefficients` spells it."""
    kind, safety = flags.coefficient_type, flags.muon_coefficient_safety
    spelled = {
        "simple": "jordan",
        "polar_express": f"polar_express:{safety}",
        "generated": f"generated:{flags.muon_coefficient_lower}:{safety}",
    }
    return spelled.get(kind, kind)


def build_matrix(
    name: str, params: Numbered, config: Config, mesh: MatrixRanks, device: torch.device
) -> MatrixOptimizer[Any]:
    """The optimizer of hidden matrices that the ranks of ``mesh`` share. Collective over them."""
    flags = config.optimizer
    shared = shared_settings(flags, device)
    measured = flags.optimizer_plan_cost == "measured" and not config.training.deterministic_mode
    shared["measured_costs"] = measured and device.type == "cuda"
    if flags.optimizer_transport == "auto":
        timeout = config.parallel.distributed_timeout_minutes * 60
        shared["reach"] = partial(shared_memory.shared_buffers, timeout=timeout)
    if name == "scion":
        return Muon(params, hidden_settings(flags.scion_radius, **shared), mesh)
    shared["nesterov"] = flags.muon_nesterov
    shared |= {"scale_mode": flags.muon_scale_mode, "extra_scale_factor": flags.muon_extra_scale_factor}
    if name in _SPHERE:
        settings = SphereSettings(
            radius=flags.sphere_radius,
            retraction=flags.sphere_retraction,
            solver_steps=flags.sphere_solver_steps,
            **shared,
        )
        return (SpectralSphere if name == "spectral_sphere" else MuonSphere)(params, settings, mesh)
    if name == "dion":
        dion = DionSettings(rank_fraction=flags.dion_rank_fraction, seed=config.training.seed, **shared)
        if isinstance(mesh, Mesh) and keeps_replicas_apart(config, mesh):
            return CompressedDion(params, dion, mesh, 2 if config.parallel.grad_reduce_in_bf16 else 4)
        return Dion(params, dion, mesh)
    if name == "normuon":
        return NorMuon(params, NorMuonSettings(beta2=flags.normuon_beta2, **shared), mesh)
    muon = MuonSettings(**shared)
    if isinstance(mesh, Mesh) and flags.muon_distributed_mode != "owner":
        return (LocalMuon if flags.muon_distributed_mode == "local" else GramMuon)(params, muon, mesh)
    return Muon(params, muon, mesh)


def build_scalar(name: str, params: Numbered, config: Config, mesh: Mesh) -> AdamW | ElementwiseOptimizer:
    """The optimizer of what no matrix optimizer takes."""
    flags = config.optimizer
    betas = adam_betas(config)
    match name:
        case "lion":
            return Lion(params, (flags.lion_beta1, flags.lion_beta2))
        case "adam_atan2":
            return AdamAtan2(params, betas)
        case "ademamix":
            warmup = flags.ademamix_warmup_iters
            return AdEMAMix(
                params,
                AdEMAMixSettings(
                    betas=betas,
                    beta3=flags.ademamix_beta3,
                    alpha=flags.ademamix_alpha,
                    warmup=_iterations(config, mesh) if warmup is None else warmup,
                ),
            )
    first, second = (None if name is None else DTYPES[name] for name in (flags.exp_avg_dtype, flags.exp_avg_sq_dtype))
    return AdamW(params, AdamWSettings(betas=betas, impl=flags.adam_impl, dtypes=(first, second)))


def build_tables(params: Numbered, config: Config) -> ScionTables:
    """Scion for the embedding and the head."""
    flags = config.optimizer
    settings = ScionTableSettings(
        momentum=momentum(flags),
        output_radius=flags.scion_output_radius,
        embedding_radius=flags.scion_embedding_radius,
        output_norm=flags.scion_output_norm,
        embedding_norm=flags.scion_embedding_norm,
        tied=not config.model.untie_embeddings_and_output_weights,
    )
    return ScionTables(params, settings)


def _iterations(config: Config, mesh: Mesh) -> int:
    """Length of the run; one given in samples counts whole batches of the final size."""
    training = config.training
    if training.train_iters is not None:
        return training.train_iters
    return (training.train_samples or 0) // config.global_batch_size(mesh.world.size())
