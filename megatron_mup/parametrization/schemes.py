"""The rule tables as data: one row per kind of parameter, one small function per cell.

A cell is a factor on the base model's value, and 1 where every ratio is 1: base equivalence holds by construction.
u-muP has no base model: its ratios are to a model of width and depth 1. Sources and the places where they disagree:
docs/parametrization.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from megatron_mup.config import ParametrizationConfig
from megatron_mup.parametrization.meta import ParamMeta, Role


class Kind(StrEnum):
    """Row of a rule table: parameters that grow alike with the model."""

    INPUT = "input"  # embedding and position table: only the fan-out grows
    HIDDEN = "hidden"  # both fans grow
    BLOCK_VECTOR = "block vector"  # norm gains and biases inside the layers
    HEAD_VECTOR = "head vector"  # gains of the query and key norms, shared by all heads
    FINAL_VECTOR = "final vector"  # norm gains and biases behind the last layer
    READOUT = "readout"  # only the fan-in grows
    ROUTER = "router"  # only the fan-in grows, inside the layers
    SHARED_KEY = "shared key"  # the same, among the matrices


def kind_of(meta: ParamMeta) -> Kind:
    """Row of the rule tables that ``meta`` belongs to."""
    if meta.role.is_hidden_matrix:
        return Kind.HIDDEN
    if meta.role in (Role.EMBEDDING, Role.POSITION_EMBEDDING):
        return Kind.INPUT
    if meta.role is Role.READOUT:
        return Kind.READOUT
    if meta.role is Role.ROUTER:
        return Kind.ROUTER
    if meta.role is Role.SHARED_KEY:
        return Kind.SHARED_KEY
    if meta.role is Role.QK_NORM:
        return Kind.HEAD_VECTOR
    return Kind.FINAL_VECTOR if meta.layer is None else Kind.BLOCK_VECTOR


@dataclass(frozen=True)
class Ratios:
    """Growth over the base model, as far as a scheme follows it.

    Attributes:
        matrix: ``mw``, growth of this matrix's own fan-in.
        hidden: ``m_N``, growth of the residual stream.
        depth: ``m_L``, growth of the number of layers.
        alpha: depth exponent.
        spectral: growth of ``min(1, sqrt(out/in)) / sqrt(in)`` of this matrix, the entries of a random one whose
            spectral norm is ``sqrt(out/in)`` (up to a constant).
    """

    matrix: float
    hidden: float
    depth: float
    alpha: float
    spectral: float = 1.0


Factor = Callable[[Ratios], float]


def _one(_: Ratios) -> float:
    return 1.0


@dataclass(frozen=True)
class Row:
    """Factors on the base model's values for one kind of parameter.

    Attributes:
        source: the published table that the row is from.
        init: on the standard deviation of the initial values.
        lr_width: on AdamW's learning rate, the part that follows width. Weight decay answers to this part alone.
        lr_depth: on any optimizer's learning rate, the part that follows depth.
        eps: on AdamW's epsilon.
        stored: how many times larger the weight is stored than the cells before say, while its factor in the forward
            pass is as many times smaller. Initial values and AdamW's learning rate multiply by it, epsilon and decay
            divide, and the training stays the same: the abc symmetry of Tensor Programs.
    """

    source: str
    init: Factor = _one
    lr_width: Factor = _one
    lr_depth: Factor = _one
    eps: Factor = _one
    stored: Factor = _one


class Attention(StrEnum):
    """Scale of query . key for heads of width ``h``, of the base model ``h0``."""

    BASE = "sqrt(h0)/h"
    ROOT = "1/sqrt(h)"
    INVERSE = "1/h"


class Operations(StrEnum):
    """How matrices act, see ``operations.py``."""

    PLAIN = "plain"
    UMUP = "umup"
    MUNIT = "munit"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A parametrization: which growth it follows, and its rules.

    Attributes:
        width: whether it sees the growth in width; all width ratios are 1 to its rules otherwise.
        depth: the same for depth.
        rows: rules by kind of parameter. A kind without a row is refused.
        branch: factor on every residual branch.
        logits: factor on the logits.
        embedding: factor on the embedding's output.
        attention: scale of query . key.
        alpha: depth exponent; None: ``--depth-alpha``.
        operations: plain, or unit-scaled: weights start at N(0, 1), and matrices divide by sqrt(fan-in) as they act.
        decay: ``--weight-decay-rule`` where none is given.
    """

    width: bool
    depth: bool
    rows: Mapping[Kind, Row]
    branch: Factor = _one
    logits: Factor = _one
    embedding: Factor = _one
    attention: Attention = Attention.BASE
    alpha: float | None = None
    operations: Operations = Operations.PLAIN
    decay: str = "independent"


def _block_lr(r: Ratios) -> float:
    return math.pow(r.depth, r.alpha - 1.0)


def _block_eps(r: Ratios) -> float:
    return 1.0 / (r.hidden * math.pow(r.depth, r.alpha))


def _branch(r: Ratios) -> float:
    return math.pow(r.depth, -r.alpha)


def _inverse_hidden(r: Ratios) -> float:
    return 1.0 / r.hidden


def _inverse_matrix(r: Ratios) -> float:
    return 1.0 / r.matrix


def _inverse_root_matrix(r: Ratios) -> float:
    return 1.0 / math.sqrt(r.matrix)


def _inverse_root_hidden(r: Ratios) -> float:
    return 1.0 / math.sqrt(r.hidden)


def _inverse_root_depth(r: Ratios) -> float:
    return 1.0 / math.sqrt(r.depth)


def _root_hidden(r: Ratios) -> float:
    return math.sqrt(r.hidden)


def _root_matrix(r: Ratios) -> float:
    return math.sqrt(r.matrix)


# Tensor Programs V, table 8 (form B: 1/m_N on the logits, constant init and learning rate for the head), with the depth
# rows of CompleteP. Every gradient comes through the logits' 1/m_N, hence eps/m_N everywhere but for the query and key
# gains: those sum over the heads, which takes the width factor back.
FORM_B: Mapping[Kind, Row] = MappingProxyType(
    {
        Kind.INPUT: Row(
            source="TP-V table 8, input weights; eps: Complete(d)P 2512.22382",
            eps=_inverse_hidden,
        ),
        Kind.HIDDEN: Row(
            source="TP-V table 8, hidden weights; depth and eps: CompleteP 2505.01618 table 1",
            init=lambda r: 1.0 / math.sqrt(r.matrix),
            lr_width=_inverse_matrix,
            lr_depth=_block_lr,
            eps=_block_eps,
        ),
        Kind.BLOCK_VECTOR: Row(
            source="TP-V table 8, biases; depth and eps: CompleteP 2505.01618 table 1",
            lr_depth=_block_lr,
            eps=_block_eps,
        ),
        Kind.HEAD_VECTOR: Row(
            source="CompleteP 2505.01618 table 1; eps without width: Complete(d)P 2512.22382",
            lr_depth=_block_lr,
            eps=_branch,
        ),
        Kind.FINAL_VECTOR: Row(
            source="TP-V table 8, biases; eps: Complete(d)P 2512.22382",
            eps=_inverse_hidden,
        ),
        # A router's logits, like the readout's, are sums over the width into a few numbers; it has no factor of its
        # own, so 1/m_N is in its initial values and rates. Its gradients sum over the width too, which eps doesn't see.
        Kind.ROUTER: Row(
            source="muP-MoE 2508.09752; depth and eps as for the query and key gains",
            init=_inverse_matrix,
            lr_width=_inverse_matrix,
            lr_depth=_block_lr,
            eps=_branch,
        ),
        # The rotated key of latent attention: all heads share its few numbers, and all of them send it their gradients.
        Kind.SHARED_KEY: Row(
            source="as the router: TP-V table 3, output weights",
            init=_inverse_matrix,
            lr_width=_inverse_matrix,
            lr_depth=_block_lr,
            eps=_branch,
        ),
        Kind.READOUT: Row(
            source="TP-V table 8, output weights; eps: Complete(d)P 2512.22382",
            eps=_inverse_hidden,
        ),
    }
)

# The router's row by ``--mup-router-rule``; none for ``output``, which is the row above.
ROUTERS: Mapping[str, Row] = MappingProxyType(
    {
        "hidden": replace(
            FORM_B[Kind.ROUTER],
            source="Megatron-LM --use-mup, whose eps/m_N the gradients don't follow",
            init=_inverse_root_matrix,
        ),
        "zero": replace(FORM_B[Kind.ROUTER], source="MSSP 2605.14200, sparse regime I", init=lambda r: 0.0),
    }
)

# Form A: nothing on the logits, hence a head that is stored m_N times smaller. Form C: what the forms have in common is
# shared out evenly between weight and factor.
FORM_A: Mapping[Kind, Row] = MappingProxyType(
    {**FORM_B, Kind.READOUT: replace(FORM_B[Kind.READOUT], source="TP-V table 3", stored=_inverse_hidden)}
)
_SYMMETRIC = "TP-V, symmetric form (Essential AI 2505.02222)"
FORM_C: Mapping[Kind, Row] = MappingProxyType(
    {
        **FORM_B,
        Kind.INPUT: replace(FORM_B[Kind.INPUT], source=_SYMMETRIC, stored=_inverse_root_hidden),
        Kind.READOUT: replace(FORM_B[Kind.READOUT], source=_SYMMETRIC, stored=_inverse_root_hidden),
    }
)

# Spectral condition: weights and AdamW's steps of spectral norm sqrt(out/in), the head's too, so nothing is left to a
# factor on the logits.
SPECTRAL: Mapping[Kind, Row] = MappingProxyType(
    {
        **FORM_B,
        Kind.HIDDEN: replace(
            FORM_B[Kind.HIDDEN], source="spectral condition 2310.17813; eps: CompleteP", init=lambda r: r.spectral
        ),
        Kind.READOUT: Row(
            source="spectral condition 2310.17813; eps: as form A",
            init=lambda r: r.spectral,
            lr_width=_inverse_matrix,
        ),
    }
)

# Everett et al. 2407.05872: the standard parametrization with learning rates per layer. Gradients reach the hidden
# matrices through a head of entries 1/sqrt(n), hence their epsilon.
_EVERETT_VECTOR = Row(source="Everett 2407.05872, embedding of SP", eps=_inverse_root_hidden)
EVERETT_FULL: Mapping[Kind, Row] = MappingProxyType(
    {
        Kind.INPUT: _EVERETT_VECTOR,
        Kind.HIDDEN: Row(
            source="Everett 2407.05872, hidden of SP, full alignment",
            init=_inverse_root_matrix,
            lr_width=_inverse_matrix,
            eps=_inverse_root_hidden,
        ),
        Kind.BLOCK_VECTOR: _EVERETT_VECTOR,
        # They sum over the heads, which takes the width factor back.
        Kind.HEAD_VECTOR: Row(source="Everett 2407.05872, embedding of SP; eps unscaled"),
        Kind.FINAL_VECTOR: _EVERETT_VECTOR,
        Kind.READOUT: Row(
            source="Everett 2407.05872, readout of SP, full alignment",
            init=_inverse_root_matrix,
            lr_width=_inverse_matrix,
        ),
    }
)
EVERETT_NONE: Mapping[Kind, Row] = MappingProxyType(
    {
        **EVERETT_FULL,
        **{
            kind: replace(
                EVERETT_FULL[kind],
                source=EVERETT_FULL[kind].source.replace("full", "no"),
                lr_width=_inverse_root_matrix,
            )
            for kind in (Kind.HIDDEN, Kind.READOUT)
        },
    }
)

# u-muP: form B over a model of width and depth 1, with hidden matrices stored sqrt(fan-in) larger, so that all start
# at N(0, 1): learning rate fan_in^-1/2. The embedding's 1/sqrt(n) is the paper's own. Operations bring gradients of
# weights to RMS 1 by themselves: epsilon stays.
UMUP: Mapping[Kind, Row] = MappingProxyType(
    {
        Kind.INPUT: Row(source="u-muP 2407.17465 table 2, input weights", lr_width=_inverse_root_hidden),
        Kind.HIDDEN: Row(
            source="u-muP 2407.17465 table 2, hidden weights",
            init=_inverse_root_matrix,
            lr_width=_inverse_matrix,
            lr_depth=_inverse_root_depth,
            eps=_root_matrix,
            stored=_root_matrix,
        ),
        Kind.BLOCK_VECTOR: Row(source="unit-scaling, norms and biases", lr_depth=_inverse_root_depth),
        Kind.HEAD_VECTOR: Row(source="unit-scaling, norms", lr_depth=_inverse_root_depth),
        Kind.FINAL_VECTOR: Row(source="unit-scaling, norms and biases"),
        Kind.READOUT: Row(source="u-muP 2407.17465 table 2, output weights"),
    }
)

# Munit scaling: form B with hidden matrices stored sqrt(fan-in) larger. Its paper's optimizer has no epsilon; what the
# symmetry makes of form B's are the gradients' exponents of the mean-field parametrization.
MUNIT: Mapping[Kind, Row] = MappingProxyType(
    {
        **FORM_B,
        Kind.HIDDEN: replace(
            FORM_B[Kind.HIDDEN],
            source="muS 2502.05967 table 1, hidden layers; eps: mean field, Everett 2407.05872",
            stored=_root_matrix,
        ),
    }
)

_STANDARD = Scheme(width=False, depth=False, rows=FORM_B, branch=_branch, logits=_inverse_hidden)
_MUP = replace(_STANDARD, width=True)
_DEPTH_MUP = replace(_MUP, depth=True, alpha=0.5)
_COMPLETEP = replace(_MUP, depth=True)
_EVERETT = Scheme(width=True, depth=False, rows=EVERETT_FULL, attention=Attention.ROOT)


def _forms(name: str, scheme: Scheme) -> dict[str, Scheme]:
    """A scheme of the muP family in the three forms of ``--mup-form``."""
    return {
        name: scheme,
        f"{name} A": replace(scheme, rows=FORM_A, logits=_one),
        f"{name} C": replace(scheme, rows=FORM_C, embedding=_root_hidden, logits=_inverse_root_hidden),
    }


# By ``--parametrization``, with the variant that another flag chooses.
SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "standard": _STANDARD,
        **_forms("mup", _MUP),
        **_forms("depth-mup", _DEPTH_MUP),
        **_forms("completep", _COMPLETEP),
        "spectral": Scheme(width=True, depth=False, rows=SPECTRAL),
        "everett": _EVERETT,
        "everett none": replace(_EVERETT, rows=EVERETT_NONE),
        "umup": Scheme(
            width=True,
            depth=True,
            rows=UMUP,
            logits=_inverse_hidden,
            attention=Attention.INVERSE,
            operations=Operations.UMUP,
            decay="lr-independent",
        ),
        "munit": Scheme(
            width=True,
            depth=False,
            rows=MUNIT,
            logits=_inverse_hidden,
            attention=Attention.ROOT,
            operations=Operations.MUNIT,
            decay="lr-independent",
        ),
    }
)


def variant(flags: ParametrizationConfig) -> str:
    """Name in `SCHEMES` of what the flags choose."""
    name = flags.parametrization
    if name == "everett" and flags.lr_alignment == "none":
        return f"{name} none"
    return f"{name} {flags.mup_form}" if f"{name} {flags.mup_form}" in SCHEMES else name
