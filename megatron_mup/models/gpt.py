"""The GPT: embedding, transformer layers, output layer and loss; the whole model or one pipeline stage of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megatron_mup.config import Config
from megatron_mup.layers.cache import KeyValueCache
from megatron_mup.layers.dropout import hidden_dropout
from megatron_mup.layers.factory import LayerFactory
from megatron_mup.layers.info import Context, TokenInfo, attention_mask
from megatron_mup.layers.linear_loss import Head, linear_cross_entropy
from megatron_mup.layers.loss import vocab_parallel_cross_entropy
from megatron_mup.layers.moe import MoE
from megatron_mup.layers.rope import rotary_angles
from megatron_mup.layers.router import Router
from megatron_mup.layers.scale import scale
from megatron_mup.models.block import TransformerLayer
from megatron_mup.models.recompute import keeping_products, run_layers
from megatron_mup.parallel.mesh import ALONE, ONE_CONTEXT_RANK, ONE_EXPERT_RANK, ContextAxis, ExpertAxis, TensorAxis
from megatron_mup.parametrization.counter import derive_key
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.operations import dropout_scale, logits_gradient


@dataclass(frozen=True)
class Stage:
    """Part of the model: layers ``start`` to ``end``, with the embedding and the output layer or without."""

    start: int
    end: int
    is_first: bool = True
    is_last: bool = True


class Embedding(nn.Module):
    """Token embedding, position table if learned, multiplier and dropout."""

    def __init__(self, factory: LayerFactory) -> None:
        super().__init__()
        model = factory.config.model
        self.word_embeddings = factory.word_embeddings()
        learned = model.position_embedding_type == "learned_absolute"
        self.position_embeddings = factory.position_embeddings() if learned else None
        self.multiplier, self.dropout = factory.multipliers.embedding, model.hidden_dropout
        self.dropout_scale = dropout_scale(factory.config)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        sample_index: torch.Tensor | None,
        key: torch.Tensor | None,
        places: torch.Tensor | None,
    ) -> torch.Tensor:
        """Ids ``[seq, batch]`` to ``[seq (/ tp), batch, hidden]``.

        Args:
            tokens: ids.
            positions: ``[seq, batch or 1]``.
            sample_index, key, places: what dropout needs, see `hidden_dropout`.
        """
        x = self.word_embeddings(tokens)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions)
        if self.multiplier != 1:
            x = x * self.multiplier
        x = hidden_dropout(x, self.dropout, key, sample_index, places)
        return scale(x, self.dropout_scale, self.dropout_scale)


class Decoder(nn.Module):
    """The transformer layers of a stage, named by their place in the whole model, and the final norm on the last."""

    def __init__(self, factory: LayerFactory, stage: Stage) -> None:
        super().__init__()
        self.training_config = factory.config.training
        self.layers = nn.ModuleDict({str(i): TransformerLayer(factory, i) for i in range(stage.start, stage.end)})
        self.final_layernorm = factory.norm("decoder.final_layernorm", None) if stage.is_last else None
        self.residuals: torch.Tensor | None = None
        if any(layer.mlp_residual.delayed for layer in self.layers.values()):
            pairs = [(layer.attention_residual, layer.mlp_residual) for layer in self.layers.values()]
            weights = [[[part.skip, part.branch] for part in pair] for pair in pairs]
            self.residuals = torch.tensor(weights, device="cpu")

    def forward(self, x: torch.Tensor, info: TokenInfo, salts: torch.Tensor | None) -> torch.Tensor:
        """``[seq (/ tp), batch, hidden]`` to the same shape. ``salts``: ``[layers here, 4]``, or None."""
        weights = self.residual_weights(x.device)
        calls = [
            partial(
                layer,
                info=info,
                salts=None if salts is None else salts[place],
                weights=None if weights is None else weights[place],
            )
            for place, layer in enumerate(self.layers.values())
        ]
        if self.training_config.recompute == "selective" and torch.is_grad_enabled():
            calls = [
                call if layer.keeps_products else partial(keeping_products, call)
                for call, layer in zip(calls, self.layers.values(), strict=True)
            ]
        x = run_layers(x, calls, self.training_config)
        return x if self.final_layernorm is None else self.final_layernorm(x)

    def residual_weights(self, device: torch.device) -> torch.Tensor | None:
        """Weights of stream and branch ``[layers here, 2, 2]`` where layers differ in them (u-muP), else None."""
        if self.residuals is not None and self.residuals.device != device:
            self.residuals = self.residuals.to(device)
        return self.residuals


class GPT(nn.Module):
    """A GPT, or the part of one that a pipeline stage holds.

    Args:
        config: the run's configuration.
        vocab_size: number of token ids.
        stage: which part.
        axis: tensor-parallel axis.
        dtype: precision of the parameters.
        expert_axis: expert-parallel axis.
        context_axis: context-parallel axis.

    Attributes:
        metas: full parameter name to `ParamMeta` for every parameter here, in order of birth.
        watched: whether someone looks at the output of modules, so that logits have to be there.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        stage: Stage,
        axis: TensorAxis = ALONE,
        dtype: torch.dtype = torch.float32,
        expert_axis: ExpertAxis = ONE_EXPERT_RANK,
        context_axis: ContextAxis = ONE_CONTEXT_RANK,
    ) -> None:
        super().__init__()
        factory = LayerFactory(config, vocab_size, axis, dtype, expert_axis, context_axis)
        self.context_axis, self.sequence_parallel = context_axis, factory.sequence_parallel
        self.config, self.stage, self.axis, self.first_row = config, stage, axis, factory.first_row
        self.vocab_size = vocab_size
        self.logits_multiplier = factory.multipliers.logits
        self.logits_gradient = logits_gradient(config, vocab_size, self.logits_multiplier)
        self.embedding = Embedding(factory) if stage.is_first else None
        self.decoder = Decoder(factory, stage)
        self.output_layer = factory.output_layer(stage.is_first) if stage.is_last else None
        self.metas: dict[str, ParamMeta] = factory.metas
        self.objective = self.head_and_loss
        self.watched = False

    def forward(
        self,
        x: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        sample_index: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Runs this stage on one micro-batch.

        Args:
            x: token ids ``[batch, seq]`` on the first stage, hidden states ``[seq (/ cp) (/ tp), batch, hidden]`` on
                others. Context-parallel ranks all get whole sequences of ids, labels, positions and documents.
            labels: ``[batch, seq]`` ids to predict, `loss.IGNORE` where there is no loss; read on the last stage.
            position_ids: ``[batch, seq]``; None counts from 0.
            document_ids: ``[batch, seq]``; given, attention stays inside each document.
            sample_index: ``[batch]`` running number of each sample, the counter of dropout.
            cache: what this stage has read of the same texts; ``x`` goes on from there.

        Returns:
            Hidden states; on the last stage ``[1, 2]`` fp32: the objective to differentiate and the language-model
            loss, each summed over this rank's tokens of the micro-batch, in nats. Without labels the last stage returns
            this rank's logits ``[seq (/ cp), batch, about vocab / tp]``, multiplier applied.
        """
        model = self.config.model
        seq = x.shape[1] if self.embedding is not None else self.config.training.seq_length
        positions = torch.arange(seq, device=x.device)[:, None] if position_ids is None else position_ids.t()
        if cache is not None:
            seq = x.shape[1 if self.embedding is not None else 0]
            positions = cache.positions(seq)
        places, context = torch.arange(seq, device=x.device), self._context(seq, document_ids, x.device)
        if context is not None:
            places, positions = context.here, positions[context.here]
            x = x[:, places] if self.embedding is not None else x
            labels = None if labels is None else labels[:, places]
        rows = places
        if self.sequence_parallel:
            start, size = self.axis.local(len(places))
            rows = places[start : start + size]
        salts = self.salts(x.device)
        if self.embedding is not None:
            x = self.embedding(x.t(), positions, sample_index, None if salts is None else salts[-1, 0], rows)
        cos = sin = None
        if model.position_embedding_type == "rope":
            stretch = model.rope_scaling_factor if model.use_rope_scaling else None
            cos, sin = rotary_angles(positions, model.rotary_dim, model.rotary_base, stretch)
        mask, window = None, self._window(seq)
        if cache is not None:
            mask = cache.mask(seq, model.window_size)
        elif (document_ids is not None or window is not None) and context is None:
            mask = attention_mask(places, places, document_ids, window)
        info = TokenInfo(cos, sin, mask, cache=cache, context=context)
        if salts is not None:
            info = info._replace(sample_index=sample_index, places=rows)
        x = self.decoder(x, info, None if salts is None else salts[self.stage.start : self.stage.end])
        if cache is not None:
            cache.advance(seq)
        if self.output_layer is None:
            return x
        shared = None if self.output_layer.weight is not None else self.embedding.word_embeddings.weight
        if labels is None:
            return self.output_layer(x, shared) * self.logits_multiplier
        return self.objective(x, shared, labels)

    def _window(self, seq: int) -> int | None:
        """The window of attention, where it is shorter than the sequence."""
        window = self.config.model.window_size
        return window if window is not None and window < seq - 1 else None

    def _context(self, seq: int, document_ids: torch.Tensor | None, device: torch.device) -> Context | None:
        if self.context_axis.size == 1:
            return None
        ring = self.config.parallel.cp_comm_type == "p2p"
        return Context(self.context_axis, ring, self.context_axis.places(seq, device), document_ids, self._window(seq))

    def head_and_loss(self, x: torch.Tensor, shared: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        """Output layer and loss sums ``[1, 2]``; a method of its own so that it can be compiled."""
        if self.config.training.cross_entropy_fusion_impl == "linear" and not self.watched:
            return self._fused_head_and_loss(x, shared, labels)
        logits, factors = self.output_layer(x, shared), (self.logits_multiplier, self.logits_gradient)
        loss, normalizer = vocab_parallel_cross_entropy(logits, labels.t(), self.first_row, self.axis, *factors)
        total = loss.sum()
        objective = total
        if self.config.training.cross_entropy_z_loss:
            objective = total + self.config.training.cross_entropy_z_loss * normalizer.square().sum()
        # No view: FSDP2 hooks the output.
        return torch.stack([torch.stack([objective, total.detach()])])

    def _fused_head_and_loss(self, x: torch.Tensor, shared: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        """The same over chunks of tokens, without ever holding all logits."""
        training = self.config.training
        assert self.output_layer is not None
        head = Head(
            self.axis,
            self.first_row,
            self.output_layer.rows(shared),
            self.logits_multiplier,
            self.logits_gradient,
            training.cross_entropy_z_loss,
            training.loss_chunk_size,
            training.torch_compile,
        )
        x, weight = self.output_layer.operands(x, shared)
        sums = linear_cross_entropy(x.flatten(0, 1), weight, labels.t().flatten(), head)
        return torch.stack([torch.stack(sums)])

    @property
    def parts(self) -> list[GPT]:
        """The stages of this rank: this one."""
        return [self]

    def routers(self) -> dict[int, Router]:
        """Routers of the layers with experts, by the number of the layer."""
        return {number: moe.router for number, moe in self._moes().items()}

    def experts(self) -> list[nn.Module]:
        """This rank's experts of each layer that has some."""
        return [moe.experts for moe in self._moes().values()]

    def heads(self) -> list[nn.Module]:
        """The output layer where FSDP2's hooks can be on it: it has weights, runs as a module, and returns no view."""
        head = self.output_layer
        if head is None or head.weight is None or self.config.training.cross_entropy_fusion_impl != "native":
            return []
        return [] if head.weight.shape[0] % head.multiple else [head]

    def _moes(self) -> dict[int, MoE]:
        mlps = {int(number): layer.mlp for number, layer in self.decoder.layers.items()}
        return {number: mlp for number, mlp in mlps.items() if isinstance(mlp, MoE)}

    def expert_biases(self) -> dict[str, torch.Tensor]:
        """Biases of the routers, live, by name: a part of the model that no gradient trains."""
        if not self.config.moe.moe_router_enable_expert_bias:
            return {}
        return {
            f"decoder.layers.{number}.mlp.router.expert_bias": router.expert_bias
            for number, router in self.routers().items()
        }

    def salts(self, device: torch.device) -> torch.Tensor | None:
        """Keys of dropout and jitter, ``[layers + 1, 4]`` int64 by place (the last row is the embedding's); None
        without."""
        model, jitter = self.config.model, self.config.moe.moe_input_jitter_eps
        if (model.hidden_dropout == model.attention_dropout == 0 and jitter is None) or not self.training:
            return None
        seed, rows = self.config.training.seed, range(model.num_layers + 1)
        keys = [[derive_key(seed, "dropout", row, place) for place in range(4)] for row in rows]
        return torch.tensor(keys, device=device)


def parameter_metas(config: Config, vocab_size: int) -> list[ParamMeta]:
    """Facts of every parameter of the whole model, without memory or ranks."""
    with torch.device("meta"):
        return list(GPT(config, vocab_size, Stage(0, config.model.num_layers)).metas.values())
