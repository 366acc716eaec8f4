"""The layer factory: every parameter is born here, knowing its role and its logical shape."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron_mup.config import Config
from megatron_mup.kernels.fp8 import E4M3, E5M2
from megatron_mup.kernels.te import Product
from megatron_mup.layers.attention import Attention, SelfAttention, qkv_blocks
from megatron_mup.layers.embedding import OutputLayer, PositionEmbedding, VocabParallelEmbedding
from megatron_mup.layers.fp8 import StaticColumnLinear, StaticFP8, StaticMLP, StaticRowLinear
from megatron_mup.layers.latent import latent_attention
from megatron_mup.layers.linear import ColumnLinear, RowLinear
from megatron_mup.layers.mlp import GLU_BLOCKS, MLP, gelu, squared_relu, swiglu
from megatron_mup.layers.moe import Experts, GroupedLinear, MoE, expert_blocks, halved_swiglu
from megatron_mup.layers.norm import LayerNorm, RMSNorm
from megatron_mup.layers.router import Router
from megatron_mup.layers.te import TEMLP, TEColumnLinear, TEExperts, TERowLinear
from megatron_mup.parallel.mesh import ONE_CONTEXT_RANK, ONE_EXPERT_RANK, ContextAxis, ExpertAxis, TensorAxis
from megatron_mup.parametrization.base import BaseSizes
from megatron_mup.parametrization.meta import ParamMeta, Role
from megatron_mup.parametrization.operations import (
    PLAIN,
    Scales,
    activation_mult,
    activation_scale,
    attention_scale,
    fp8_gradient_scale,
    gain_scale,
    matrix_scales,
)
from megatron_mup.parametrization.table import forward_multipliers

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"


class LayerFactory:
    """Makes the layers of one rank and registers what each parameter is.

    Parameters are made on the meta device; they get memory after sharding and values from their counter-based
    generator (`models.build`).

    Args:
        config: the run's configuration.
        vocab_size: number of token ids.
        axis: tensor-parallel axis.
        dtype: precision of the parameters.
        expert_axis: expert-parallel axis.
        context_axis: context-parallel axis.

    Attributes:
        metas: full parameter name to `ParamMeta`, in order of birth.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        axis: TensorAxis,
        dtype: torch.dtype,
        expert_axis: ExpertAxis = ONE_EXPERT_RANK,
        context_axis: ContextAxis = ONE_CONTEXT_RANK,
    ) -> None:
        self.expert_axis, self.context_axis = expert_axis, context_axis
        self.config, self.vocab_size, self.axis, self.dtype = config, vocab_size, axis, dtype
        self.base = BaseSizes.of(config)
        self.multipliers = forward_multipliers(config)
        self.sequence_parallel = config.parallel.sequence_parallel and axis.size > 1
        self.metas: dict[str, ParamMeta] = {}

    def parameter(self, meta: ParamMeta) -> nn.Parameter:
        """Registers a parameter and makes this rank's tensor- or expert-parallel shard of it, without memory."""
        shape, axis = list(meta.shape), self.axis
        if meta.experts is not None:
            shape[0] //= self.expert_axis.size
            axis = self.expert_axis.tensor
        if meta.tp_dim is not None:
            shape[meta.tp_dim] = axis.local(shape[meta.tp_dim])[1]
        self.metas[meta.name] = meta
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device="meta"))

    def scales(self, name: str) -> Scales:
        """Factors of the operation that a matrix made here takes part in."""
        return matrix_scales(self.metas[name], self.config)

    def vector(
        self, name: str, role: Role, length: int, base_length: float, *, sharded: bool, partial: bool, layer: int | None
    ) -> nn.Parameter:
        """A bias or norm parameter.

        Args:
            name: full name.
            role: `Role.BIAS`, `Role.NORM` or `Role.QK_NORM`.
            length: global length.
            base_length: the same at base size.
            sharded: whether tensor ranks split it.
            partial: whether each tensor rank sees only part of what it acts on, so that gradients must be summed.
            layer: transformer layer, or None.
        """
        return self.parameter(
            ParamMeta(
                name=name,
                role=role,
                shape=(length,),
                fan_in=1,
                fan_out=length,
                base_fan_in=1,
                base_fan_out=base_length,
                layer=layer,
                branch=None if layer is None else ("mlp" if "mlp" in name else "attention"),
                tp_dim=0 if sharded else None,
                grad_sum_axes=("tp",) if partial and not sharded else (),
            )
        )

    def norm(
        self,
        name: str,
        layer: int | None,
        role: Role = Role.NORM,
        sharing: int = 1,
        size: tuple[int, float] | None = None,
    ) -> nn.Module:
        """A norm over the residual stream, or over one head (`Role.QK_NORM`), which ``sharing`` heads have in common;
        or of another ``size``: its length and the same at base size."""
        model = self.config.model
        head = role is Role.QK_NORM
        length, base = (model.head_dim, self.base.head_dim) if head else (model.hidden_size, self.base.hidden)
        length, base = (length, base) if size is None else size
        partial = head or self.sequence_parallel

        def make(part: str) -> nn.Parameter | None:
            if not model.norm_affine:
                return None
            kind = Role.BIAS if part == "bias" else role
            return self.vector(f"{name}.{part}", kind, length, base, sharded=False, partial=partial, layer=layer)

        gradient, impl = gain_scale(self.config, sharing), self.config.training.norm_impl
        if model.normalization == "RMSNorm":
            return RMSNorm(length, make("weight"), model.norm_epsilon, gradient, impl)
        return LayerNorm(length, make("weight"), make("bias"), model.norm_epsilon, gradient, impl)

    def attention(self, name: str, layer: int) -> Attention:
        """The attention branch of a layer."""
        model, base = self.config.model, self.base
        if model.multi_latent_attention:
            return latent_attention(self, name, layer)
        heads, groups, head_dim = model.num_attention_heads, model.query_groups, model.head_dim
        per_group, base_per_group = heads // groups, base.heads / base.query_groups
        rows, base_rows = (heads + 2 * groups) * head_dim, (base_per_group + 2) * base.query_groups * base.head_dim
        qkv_name = f"{name}.linear_qkv.weight"
        qkv = self.parameter(
            ParamMeta(
                name=qkv_name,
                role=Role.QKV,
                shape=(rows, model.hidden_size),
                fan_in=model.hidden_size,
                fan_out=rows,
                base_fan_in=base.hidden,
                base_fan_out=base_rows,
                blocks=qkv_blocks(per_group, head_dim),
                layer=layer,
                branch="attention",
                tp_dim=0,
            )
        )
        qkv_bias = None
        if model.qkv_bias:
            qkv_bias = self.vector(
                f"{name}.linear_qkv.bias", Role.BIAS, rows, base_rows, sharded=True, partial=False, layer=layer
            )
        column = self.column_linear(qkv_name, qkv, qkv_bias)
        row = self.row_linear(
            f"{name}.linear_proj", Role.ATTENTION_OUTPUT, heads * head_dim, base.heads * base.head_dim, layer
        )
        q_norm = k_norm = None
        if model.qk_layernorm:
            q_norm = self.norm(f"{name}.q_layernorm", layer, Role.QK_NORM, heads)
            k_norm = self.norm(f"{name}.k_layernorm", layer, Role.QK_NORM, groups)
        return SelfAttention(column, row, q_norm, k_norm, head_dim=head_dim, **self.attention_core())

    def attention_core(self) -> dict[str, Any]:
        """What every kind of attention takes, see `Attention`."""
        model = self.config.model
        heads = model.num_attention_heads // self.axis.size
        return {
            "heads": heads,
            "first_head": self.axis.rank * heads,
            "groups": model.query_groups // self.axis.size,
            "scale": self.multipliers.attention_logits,
            "output_scale": attention_scale(self.config),
            "backend": self.config.training.attention_backend,
            "dropout": model.attention_dropout,
        }

    def row_linear(self, name: str, role: Role, fan_in: int, base_fan_in: float, layer: int) -> RowLinear:
        """Last linear layer of a branch, ``fan_in -> hidden``."""
        hidden = self.config.model.hidden_size
        weight = self.parameter(
            ParamMeta(
                name=f"{name}.weight",
                role=role,
                shape=(hidden, fan_in),
                fan_in=fan_in,
                fan_out=hidden,
                base_fan_in=base_fan_in,
                base_fan_out=self.base.hidden,
                layer=layer,
                branch="mlp" if role is Role.MLP_OUT else "attention",
                tp_dim=1,
            )
        )
        bias = None
        if self.config.model.linear_bias:
            bias = self.vector(
                f"{name}.bias",
                Role.BIAS,
                hidden,
                self.base.hidden,
                sharded=False,
                partial=self.sequence_parallel,
                layer=layer,
            )
        scales, static = self.scales(f"{name}.weight"), self.static_fp8(f"{name}.weight")
        if role is Role.ATTENTION_OUTPUT:
            # A factor of a product costs nothing, one on attention's gradient a pass over it.
            scales = replace(scales, backward=scales.backward * attention_scale(self.config))
        if static is not None:
            return StaticRowLinear(weight, self.axis, self.sequence_parallel, scales, static)
        if (product := self.te_product(f"{name}.weight")) is not None:
            return TERowLinear(weight, bias, self.axis, self.sequence_parallel, scales, product=product)
        return RowLinear(weight, bias, self.axis, self.sequence_parallel, scales)

    def column_linear(self, name: str, weight: nn.Parameter, bias: nn.Parameter | None) -> ColumnLinear:
        """A column-parallel layer around parameters made here; ``name`` is the weight's."""
        scales, static = self.scales(name), self.static_fp8(name)
        if static is not None:
            return StaticColumnLinear(weight, self.axis, self.sequence_parallel, scales, static)
        if (product := self.te_product(name)) is not None:
            return TEColumnLinear(weight, bias, self.axis, self.sequence_parallel, scales, product=product)
        return ColumnLinear(weight, bias, self.axis, self.sequence_parallel, scales)

    def in_fp8(self, name: str) -> bool:
        """Whether a matrix made here is multiplied in FP8."""
        fp8, meta = self.config.fp8, self.metas[name]
        critical = meta.role in (Role.ATTENTION_OUTPUT, Role.MLP_OUT)
        return meta.layer in fp8.layers(self.config.model.num_layers) and not (critical and fp8.fp8_critical_bf16)

    def static_fp8(self, name: str) -> StaticFP8 | None:
        """How a matrix made here is multiplied in static FP8; None: it isn't."""
        fp8 = self.config.fp8
        if fp8.fp8_recipe != "static" or not self.in_fp8(name):
            return None
        return StaticFP8(E5M2 if fp8.fp8_format == "hybrid" else E4M3, fp8_gradient_scale(self.config))

    def te_product(self, name: str) -> Product | None:
        """How Transformer Engine multiplies by a matrix made here; None: it doesn't, as where FP8 leaves a layer out,
        whose native product the compiler sees."""
        fp8 = self.config.fp8
        native = self.config.training.transformer_impl == "local"
        if native or (fp8.fp8_format is not None and not self.in_fp8(name)):
            return None
        return Product(fp8.fp8_wgrad)

    def mlp(self, name: str, layer: int, width: int | None = None, base_width: float | None = None) -> MLP:
        """The MLP branch of a layer, as wide as the configuration says or ``width``."""
        model, base = self.config.model, self.base
        width, base_width = width or model.ffn_size, base_width or base.ffn
        gates = 2 if model.swiglu else 1
        rows, base_rows = gates * width, gates * base_width
        weight = self.parameter(
            ParamMeta(
                name=f"{name}.linear_fc1.weight",
                role=Role.MLP_IN,
                shape=(rows, model.hidden_size),
                fan_in=model.hidden_size,
                fan_out=rows,
                base_fan_in=base.hidden,
                base_fan_out=base_rows,
                blocks=GLU_BLOCKS if model.swiglu else (),
                layer=layer,
                branch="mlp",
                tp_dim=0,
            )
        )
        bias = None
        if model.linear_bias:
            bias = self.vector(
                f"{name}.linear_fc1.bias", Role.BIAS, rows, base_rows, sharded=True, partial=False, layer=layer
            )
        activation = swiglu if model.swiglu else squared_relu if model.squared_relu else gelu
        if (mult := activation_mult(self.config)) != 1:
            activation = partial(swiglu if model.swiglu else gelu, mult=mult)
        elif model.swiglu and self.static_fp8(f"{name}.linear_fc1.weight") is not None:
            activation = partial(swiglu, alone=False)  # its gradient is cast to FP8 at once
        column = self.column_linear(f"{name}.linear_fc1.weight", weight, bias)
        row = self.row_linear(f"{name}.linear_fc2", Role.MLP_OUT, width, base_width, layer)
        if model.swiglu and isinstance(column, StaticColumnLinear) and isinstance(row, StaticRowLinear):
            return StaticMLP(column, row, activation, activation_scale(self.config), mult)
        kind = TEMLP if activation is swiglu and self.te_fuses(column, row) else MLP
        return kind(column, row, activation, activation_scale(self.config))

    def te_fuses(self, *linears: ColumnLinear | RowLinear) -> bool:
        """Whether two layers and the SwiGLU between them are Transformer Engine's and plain enough for `TEMLP`."""
        fp8, te = self.config.fp8, (TEColumnLinear, TERowLinear)
        plain = all(isinstance(each, te) and each.bias is None and each.scales == PLAIN for each in linears)
        return plain and fp8.fp8_format is not None and fp8.fp8_recipe == "delayed" and fp8.fp8_wgrad

    def moe(self, name: str, layer: int) -> MoE:
        """The MLP branch of a layer with experts."""
        model, moe, hidden = self.config.model, self.config.moe, self.config.model.hidden_size
        assert moe.num_experts is not None
        router = self.parameter(
            ParamMeta(
                name=f"{name}.router.weight",
                role=Role.ROUTER,
                shape=(moe.num_experts, hidden),
                fan_in=hidden,
                fan_out=moe.num_experts,
                base_fan_in=self.base.hidden,
                base_fan_out=moe.num_experts,
                layer=layer,
                branch="mlp",
                grad_sum_axes=("tp",) if self.sequence_parallel else (),
            )
        )
        ffn, base_ffn, gates = self.config.expert_ffn_size, self.base.expert_ffn, 2 if model.swiglu else 1
        base_hidden = self.base.hidden
        fc1 = f"{name}.experts.linear_fc1.weight"
        parts = (
            self.expert_linear(fc1, Role.EXPERT_IN, (gates * ffn, hidden), (gates * base_ffn, base_hidden), layer),
            self.expert_linear(
                f"{name}.experts.linear_fc2.weight", Role.EXPERT_OUT, (hidden, ffn), (base_hidden, base_ffn), layer
            ),
            halved_swiglu if model.swiglu else squared_relu if model.squared_relu else gelu,
        )
        # In bf16 PyTorch's grouped product is taken by either backend: it leaves the rows of each expert to the device.
        in_te_fp8 = self.config.training.transformer_impl == "transformer_engine" and self.in_fp8(fc1)
        experts = TEExperts(*parts, self.config.fp8.row_multiple) if in_te_fp8 else Experts(*parts)
        shared = None
        if (width := moe.moe_shared_expert_intermediate_size) is not None:
            shared = self.mlp(f"{name}.shared_experts", layer, width, width * self.base.shrink)
        sharing: list[TensorAxis | ContextAxis] = [self.context_axis]
        if self.sequence_parallel:
            sharing.append(self.axis)
        compiled = self.config.training.torch_compile
        return MoE(Router(router, moe, sharing), experts, shared, self.expert_axis, compiled)

    def expert_linear(
        self, name: str, role: Role, shape: tuple[int, int], base_shape: tuple[float, float], layer: int
    ) -> GroupedLinear:
        """A matrix ``[out, in]`` for each expert, stacked along the rows. Expert tensor ranks share the inner width."""
        experts = self.config.moe.num_experts
        assert experts is not None
        (rows, columns), (base_rows, base_columns) = shape, base_shape
        gated = role is Role.EXPERT_IN and self.config.model.swiglu
        weight = self.parameter(
            ParamMeta(
                name=name,
                role=role,
                shape=(experts * rows, columns),
                fan_in=columns,
                fan_out=rows,
                base_fan_in=base_columns,
                base_fan_out=base_rows,
                blocks=expert_blocks(rows, "gate", "up") if gated else expert_blocks(rows, "matrix"),
                layer=layer,
                branch="mlp",
                tp_dim=0 if role is Role.EXPERT_IN else 1,
                experts=experts,
                grad_sum_axes=("edp_replicate",) if self.expert_axis.sum_copies else (),
            )
        )
        return GroupedLinear(weight, experts // self.expert_axis.size)

    def word_embeddings(self) -> VocabParallelEmbedding:
        """The embedding; shared with the output layer unless untied."""
        tied_over_stages = (
            not self.config.model.untie_embeddings_and_output_weights
            and self.config.parallel.pipeline_model_parallel_size > 1
        )
        weight = self.parameter(
            ParamMeta(
                name=WORD_EMBEDDINGS,
                role=Role.EMBEDDING,
                shape=(self.vocab_size, self.config.model.hidden_size),
                fan_in=1,
                fan_out=self.config.model.hidden_size,
                base_fan_in=1,
                base_fan_out=self.base.hidden,
                tp_dim=0,
                grad_sum_axes=("embedding",) if tied_over_stages else (),
            )
        )
        scales = self.scales(WORD_EMBEDDINGS)
        return VocabParallelEmbedding(weight, self.first_row, self.axis, self.sequence_parallel, scales)

    def position_embeddings(self) -> PositionEmbedding:
        """The learned position table."""
        model = self.config.model
        rows = model.max_position_embeddings or self.config.training.seq_length
        weight = self.parameter(
            ParamMeta(
                name="embedding.position_embeddings.weight",
                role=Role.POSITION_EMBEDDING,
                shape=(rows, model.hidden_size),
                fan_in=1,
                fan_out=model.hidden_size,
                base_fan_in=1,
                base_fan_out=self.base.hidden,
                grad_sum_axes=("tp",) if self.sequence_parallel else (),
            )
        )
        return PositionEmbedding(weight, self.axis, self.sequence_parallel)

    def output_layer(self, embedding_is_here: bool) -> OutputLayer:
        """The projection to the vocabulary.

        Untied it has its own matrix; tied it takes the embedding's where that is on the same stage, and a copy of it
        elsewhere.
        """
        model = self.config.model
        tied = not model.untie_embeddings_and_output_weights
        weight = None
        if not (tied and embedding_is_here):
            weight = self.parameter(
                ParamMeta(
                    name="output_layer.weight",
                    role=Role.EMBEDDING if tied else Role.READOUT,
                    shape=(self.vocab_size, model.hidden_size),
                    fan_in=1 if tied else model.hidden_size,
                    fan_out=model.hidden_size if tied else self.vocab_size,
                    base_fan_in=1 if tied else self.base.hidden,
                    base_fan_out=self.base.hidden if tied else self.vocab_size,
                    tp_dim=0,
                    tied_to=WORD_EMBEDDINGS if tied else None,
                    grad_sum_axes=("embedding",) if tied else (),
                )
            )
        scales = PLAIN if weight is None else self.scales("output_layer.weight")
        return OutputLayer(weight, self.axis, self.sequence_parallel, model.make_vocab_size_divisible_by, scales)

    @property
    def first_row(self) -> int:
        """Token id of the first vocabulary row on this rank."""
        return self.axis.local(self.vocab_size)[0]
