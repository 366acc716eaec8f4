"""From a parameter's logical facts and the configuration to the numbers that it is trained with.

Pure functions of plain numbers. The rules themselves are rows in ``schemes.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_mup.config import Config, ConfigError
from megatron_mup.parametrization.base import BaseSizes
from megatron_mup.parametrization.custom import custom_scheme
from megatron_mup.parametrization.horizon import horizon_factors
from megatron_mup.parametrization.meta import ParamMeta, Role
from megatron_mup.parametrization.schemes import (
    ROUTERS,
    SCHEMES,
    Attention,
    Kind,
    Operations,
    Ratios,
    Row,
    Scheme,
    kind_of,
    variant,
)


@dataclass(frozen=True)
class ForwardMultipliers:
    """Factors in the forward pass.

    Attributes:
        embedding: on the sum of token and position embeddings.
        attention_logits: on query . key: the softmax scale.
        attention_branch: on the attention branch, bias included, before it joins the residual stream. Unit-scaled
            schemes weigh each layer's branches against the stream instead: ``operations.residual``; 1 here.
        mlp_branch: the same for the MLP branch.
        logits: on the output of the head, tied or not, in training and in inference alike.
    """

    embedding: float
    attention_logits: float
    attention_branch: float
    mlp_branch: float
    logits: float


@dataclass(frozen=True)
class Scaling:
    """What one parameter is trained with.

    Attributes:
        init_std: standard deviation of the initial normal values; None: constants (norm gains 1, biases 0).
        multiplier: factor of :class:`ForwardMultipliers` on what the matrix puts out; 1 where there is none. For
            reading only: the model applies :class:`ForwardMultipliers`.
        optimizer: which optimizer trains it: a value of ``--optimizer`` or ``--scalar-optimizer``.
        lr: peak learning rate.
        weight_decay: coefficient in PyTorch's convention, coupled to the learning rate: ``W *= 1 - lr * wd``. On the
            spectral sphere: strength of the dynamic retraction.
        eps: AdamW's (or AdEMAMix's) epsilon; 0 under the others, which have none.
        stored: how many times larger the matrix is stored than it acts. Optimizers whose step has a size of its own
            (the orthonormalizing ones) multiply it, and radii, by this; the others have it in ``lr``.
    """

    init_std: float | None
    multiplier: float
    optimizer: str
    lr: float
    weight_decay: float
    eps: float
    stored: float = 1.0


def scheme_of(config: Config) -> Scheme:
    """The rule table that the configuration names."""
    flags = config.parametrization
    if flags.parametrization == "custom":
        return custom_scheme(flags.custom_parametrization or "")
    scheme, router = SCHEMES[variant(flags)], ROUTERS.get(flags.mup_router_rule)
    if router is None or Kind.ROUTER not in scheme.rows:
        return scheme
    return replace(scheme, rows={**scheme.rows, Kind.ROUTER: router})


def _row(kind: Kind, config: Config) -> Row:
    rows = scheme_of(config).rows
    if kind not in rows:
        raise ConfigError(
            f"--parametrization {config.parametrization.parametrization}",
            f"it has no rule for parameters of kind {kind.value}",
            "choose another parametrization",
        )
    return rows[kind]


def ratios(config: Config, meta: ParamMeta | None = None) -> Ratios:
    """Growth over the base model as the chosen scheme sees it, for one parameter or for the model as a whole."""
    scheme = scheme_of(config)
    alpha = config.parametrization.depth_alpha if scheme.alpha is None else scheme.alpha
    if scheme.operations is Operations.UMUP:
        model = config.model
        return Ratios(meta.fan_in if meta else 1.0, model.hidden_size, model.num_layers, alpha)
    return Ratios(
        matrix=meta.width_ratio if meta and scheme.width else 1.0,
        hidden=config.model.hidden_size / BaseSizes.of(config).hidden if scheme.width else 1.0,
        depth=config.model.num_layers / _base_layers(config),
        alpha=alpha,
        spectral=_spectral_growth(meta) if meta and scheme.width else 1.0,
    )


def _spectral_growth(meta: ParamMeta) -> float:
    """Growth of ``min(1, sqrt(out/in)) / sqrt(in)``; a fused tensor goes by its largest block."""
    share = max((block.size / block.period for block in meta.blocks), default=1.0)

    def entries(rows: float, columns: float) -> float:
        return min(1.0, math.sqrt(rows / columns)) / math.sqrt(columns)

    return entries(share * meta.fan_out, meta.fan_in) / entries(share * meta.base_fan_out, meta.base_fan_in)


def _base_layers(config: Config) -> int:
    """Layers of the base model where the scheme follows depth, else this model's own."""
    own, base = config.model.num_layers, config.parametrization.base_num_layers
    return base if base is not None and scheme_of(config).depth else own


def forward_multipliers(config: Config) -> ForwardMultipliers:
    """The model's forward factors.

    Attention: ``1/sqrt(h)`` (standard) or ``sqrt(h0)/h``, which equals it at the base head width ``h0`` (TP-V's 1/d
    rule), or ``1/h`` (u-muP). ``--softmax-scale`` is the whole factor and overrides them and ``--mup-attention-mult``.
    Branches: ``m_L^-alpha`` (CompleteP); an Xmodel scale ``s`` makes it ``s / sqrt(num_layers)`` instead, whatever the
    scheme.
    """
    model, flags = config.model, config.parametrization
    scheme, r = scheme_of(config), ratios(config)
    attention_logits = model.softmax_scale
    if attention_logits is None:
        attention_logits = flags.mup_attention_mult * _attention_scale(scheme, config)

    def branch(xmodel_scale: float | None) -> float:
        if scheme.operations is not Operations.PLAIN:
            return 1.0
        if xmodel_scale is not None:
            return xmodel_scale / math.sqrt(model.num_layers)
        return flags.mup_residual_mult * scheme.branch(r)

    logits = flags.mup_output_mult * scheme.logits(r)
    if scheme.operations is Operations.MUNIT:
        logits /= BaseSizes.of(config).hidden
    return ForwardMultipliers(
        embedding=flags.mup_embedding_mult * scheme.embedding(r),
        attention_logits=attention_logits,
        attention_branch=branch(flags.mup_attention_residual_scale),
        mlp_branch=branch(flags.mup_ffn_residual_scale),
        logits=logits,
    )


def _attention_scale(scheme: Scheme, config: Config) -> float:
    head_dim = config.model.head_dim
    if scheme.attention is Attention.INVERSE:
        return 1.0 / head_dim
    follows = scheme.width and scheme.attention is Attention.BASE
    base_head_dim = BaseSizes.of(config).head_dim if follows else float(head_dim)
    # In this order, so that at the base head width the value is bitwise the standard one.
    return (1.0 / math.sqrt(base_head_dim)) * (base_head_dim / head_dim)


def scaling(meta: ParamMeta, config: Config) -> Scaling:
    """Initialisation, learning rate, weight decay and epsilon of one parameter."""
    kind, scheme = kind_of(meta), scheme_of(config)
    row, r, horizon = _row(kind, config), ratios(config, meta), horizon_factors(config)
    flags = config.optimizer
    unit = scheme.operations is not Operations.PLAIN

    optimizer = optimizer_of(kind, config)
    base_lr = flags.lr
    lr_width = row.lr_width(r) * row.stored(r)
    by_size = optimizer == flags.optimizer != "adam"
    if by_size:
        base_lr = flags.lr if flags.muon_lr is None else flags.muon_lr
        # Scion's steps are relative to the radius of its balls: nothing is left to width.
        follows = scheme.width and optimizer != "scion"
        lr_width = orthonormal_lr_factor(meta, config) if follows else 1.0
    if kind in (Kind.INPUT, Kind.READOUT) and flags.decoupled_lr is not None:
        base_lr = flags.decoupled_lr
    lr = base_lr * lr_width * row.lr_depth(r)
    decay = _weight_decay(kind, optimizer, config, r, lr_width, lr)
    if decay and not by_size and decay_rule(config) in ("coupled", "sqrt-width"):
        decay /= row.stored(r)

    return Scaling(
        init_std=_init_std(meta, kind, config, row.init(r) * row.stored(r)),
        multiplier=_multiplier(meta, forward_multipliers(config), unit),
        optimizer=optimizer,
        lr=lr * horizon.lr,
        weight_decay=decay * horizon.weight_decay,
        eps=flags.adam_eps * row.eps(r) / row.stored(r) * horizon.eps if optimizer in ("adam", "ademamix") else 0.0,
        stored=math.sqrt(meta.fan_in) if unit and kind is Kind.HIDDEN else row.stored(r),
    )


def optimizer_of(kind: Kind, config: Config) -> str:
    """Which optimizer trains parameters of a kind.

    Lion, Adam-atan2 and AdEMAMix follow AdamW's rows: their updates too are of order one in every entry, whatever the
    gradient's size, which is all that the rows assume (Tensor Programs IVb, arXiv 2308.01814).
    """
    flags = config.optimizer
    if flags.optimizer == "adam":
        return "adam"
    claimed = {Kind.HIDDEN, Kind.SHARED_KEY}
    if flags.optimizer == "scion":
        claimed |= {Kind.INPUT, Kind.READOUT}
    if flags.muon_moe_router:
        claimed.add(Kind.ROUTER)
    return flags.optimizer if kind in claimed else flags.scalar_optimizer


def orthonormal_lr_factor(meta: ParamMeta, config: Config) -> float:
    """Factor on Muon's learning rate that keeps the step's spectral norm at ``sqrt(out/in)`` times the base model's.

    The spectral condition (arXiv 2310.17813) asks for steps of spectral norm ``sqrt(out/in)``. Muon's step has the
    norm ``g(out, in)`` that ``--muon-scale-mode`` names, so the factor is ``sqrt(out/in) / g`` over the same at base
    size: 1 for unit_rms_norm; ``1/sqrt(mw)`` for spectral and match_rms_adamw, and 1 for shape_scaling, as long as out
    and in grow alike. NorMuon's step has Muon's Frobenius norm and takes the same factor; so does Dion's, whose factors
    have unit columns (microsoft/dion: ``sqrt(out/in)``, no rule for width). Where heads are orthonormalized apart, out
    is the width of a head.

    A fused tensor has one learning rate but is orthonormalized block by block. Its blocks all grow by the tensor's own
    ratios, so they agree, unless out and in grow differently and some blocks are wide and others tall (grouped-query
    attention with the head count off proportion). Then the rule for square and tall blocks (out >= in) stands for
    all: it depends on the fan-in alone.
    """
    mode = config.optimizer.muon_scale_mode
    in_ratio, out_ratio = meta.width_ratio, meta.fan_out / meta.base_fan_out

    def step_over_muon(rows: float, cols: float) -> float:
        wanted = math.sqrt(rows / cols)
        if mode == "unit_rms_norm":
            return 1.0
        if mode == "shape_scaling":
            return wanted / math.sqrt(max(1.0, rows / cols))
        return wanted / math.sqrt(max(rows, cols))

    def factor(rows: float, base_rows: float | None = None) -> float:
        base_rows = rows / out_ratio if base_rows is None else base_rows
        return step_over_muon(rows, meta.fan_in) / step_over_muon(base_rows, meta.fan_in / in_ratio)

    if meta.blocks and meta.role is Role.QKV and config.optimizer.muon_split_heads:
        shrink = BaseSizes.of(config).head_shrink
        factors = [factor(b.size / b.heads, b.size / b.heads * shrink) for b in meta.blocks]
    else:
        total_rows = meta.numel / meta.fan_in / (meta.experts or 1)
        split = config.optimizer.muon_split_qkv if meta.role is Role.QKV else config.optimizer.muon_split_fc1
        if not (meta.blocks and split):
            return factor(total_rows)
        factors = [factor(total_rows * b.size / b.period) for b in meta.blocks]
    if math.isclose(min(factors), max(factors), rel_tol=1e-9):
        return factors[0]
    return 1.0 if mode == "shape_scaling" else 1.0 / math.sqrt(in_ratio)


def _init_std(meta: ParamMeta, kind: Kind, config: Config, factor: float) -> float | None:
    model = config.model
    std = model.init_method_std
    if scheme_of(config).operations is not Operations.PLAIN:
        return 1.0 if kind in (Kind.INPUT, Kind.HIDDEN, Kind.READOUT) else None
    if kind is Kind.INPUT:
        std = std if model.embedding_init_method_std is None else model.embedding_init_method_std
    elif kind is Kind.READOUT:
        std = std if model.output_layer_init_method_std is None else model.output_layer_init_method_std
    elif kind in (Kind.HIDDEN, Kind.ROUTER, Kind.SHARED_KEY):
        if meta.role.is_output_projection:
            # GPT-2's 1/sqrt(2L). CompleteP puts depth into the branch factor, so there it stays the base model's.
            std /= math.sqrt(2 * _base_layers(config))
    else:
        return None
    return std * factor


def _multiplier(meta: ParamMeta, forward: ForwardMultipliers, unit: bool) -> float:
    if unit and meta.role.is_hidden_matrix:
        return 1.0 / math.sqrt(meta.fan_in)
    return {
        Role.EMBEDDING: forward.embedding,
        Role.POSITION_EMBEDDING: forward.embedding,
        Role.ATTENTION_OUTPUT: forward.attention_branch,
        Role.MLP_OUT: forward.mlp_branch,
        Role.EXPERT_OUT: forward.mlp_branch,
        Role.READOUT: forward.logits,
    }.get(meta.role, 1.0)


def decay_rule(config: Config) -> str:
    """``--weight-decay-rule``, or the scheme's own."""
    return config.parametrization.weight_decay_rule or scheme_of(config).decay


def _weight_decay(kind: Kind, optimizer: str, config: Config, r: Ratios, lr_width: float, lr: float) -> float:
    """Coefficient in PyTorch's convention.

    The base learning rate that ``independent`` refers to is that of the parameter's own class (``--lr``,
    ``--decoupled-lr``, ``--muon-lr``), so the factor undoes what the scheme did to the learning rate for width. It
    doesn't undo the depth factor ``m_L^(alpha-1)``: CompleteP's table states ``lambda * m_N`` for hidden matrices at
    either alpha, hence at alpha = 1/2 learning rate x decay falls with depth as ``m_L^-1/2``.
    """
    flags = config.optimizer
    if optimizer == "scion":
        return 1.0 if flags.scion_constrained else 0.0
    if optimizer in ("muonsphere", "spectral_sphere"):
        # Retraction is relative to the weights, whatever the step's scale does to the learning rate.
        return flags.weight_decay / lr_width if flags.sphere_retraction == "dynamic" else 0.0
    decays = {
        Kind.INPUT: flags.decay_embeddings,
        Kind.HIDDEN: True,
        Kind.ROUTER: True,
        Kind.SHARED_KEY: True,
        Kind.READOUT: flags.decay_output_layer,
    }.get(kind, False)
    if not decays or flags.weight_decay == 0.0:
        return 0.0
    rule = decay_rule(config)
    if rule == "coupled":
        return flags.weight_decay
    if rule == "independent":
        return flags.weight_decay / lr_width
    if rule == "sqrt-width":
        return flags.weight_decay * (math.sqrt(r.matrix) if kind is Kind.HIDDEN else 1.0)
    if rule == "inverse-width":
        return flags.weight_decay / lr_width / (r.matrix if kind is Kind.HIDDEN else 1.0)
    if lr == 0.0:
        raise ConfigError(
            "--weight-decay-rule lr-independent",
            "a learning rate of 0 cannot carry a decay that is stated per step",
            "choose --weight-decay-rule independent, or a learning rate above 0",
        )
    return flags.weight_decay / lr
