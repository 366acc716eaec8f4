"""The rule tables as data: one row per kind of parameter, one small function per cell.

A cell is a factor on the base model's value, and 1 where every ratio is 1: base equivalence holds by construction.
Sources and the places where they disagree: docs/parametrization.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from megatron_mup.parametrization.meta import ParamMeta, Role


class Kind(StrEnum):
    """Row of a rule table: parameters that grow alike with the model."""

    INPUT = "input"  # embedding and position table: only the fan-out grows
    HIDDEN = "hidden"  # both fans grow
    BLOCK_VECTOR = "block vector"  # norm gains and biases inside the layers
    HEAD_VECTOR = "head vector"  # gains of the query and key norms, shared by all heads
    FINAL_VECTOR = "final vector"  # norm gains and biases behind the last layer
    READOUT = "readout"  # only the fan-in grows


def kind_of(meta: ParamMeta) -> Kind:
    """Row of the rule tables that ``meta`` belongs to."""
    if meta.role.is_hidden_matrix:
        return Kind.HIDDEN
    if meta.role in (Role.EMBEDDING, Role.POSITION_EMBEDDING):
        return Kind.INPUT
    if meta.role is Role.READOUT:
        return Kind.READOUT
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
    """

    matrix: float
    hidden: float
    depth: float
    alpha: float


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
    """

    source: str
    init: Factor = _one
    lr_width: Factor = _one
    lr_depth: Factor = _one
    eps: Factor = _one


@dataclass(frozen=True)
class Scheme:
    """A parametrization: which growth it follows, and its rules.

    Attributes:
        width: whether it sees the growth in width; all width ratios are 1 to its rules otherwise.
        depth: the same for depth.
        rows: rules by kind of parameter.
        branch: factor on every residual branch.
        logits: factor on the logits.
    """

    width: bool
    depth: bool
    rows: Mapping[Kind, Row]
    branch: Factor
    logits: Factor


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
        Kind.READOUT: Row(
            source="TP-V table 8, output weights; eps: Complete(d)P 2512.22382",
            eps=_inverse_hidden,
        ),
    }
)

# The three differ only in the growth that they follow.
SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        name: Scheme(width=width, depth=depth, rows=FORM_B, branch=_branch, logits=_inverse_hidden)
        for name, width, depth in (("standard", False, False), ("mup", True, False), ("completep", True, True))
    }
)
