"""The GPT: embedding, transformer layers, output layer and loss; the whole model or one pipeline stage of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megatron_mup.config import Config
from megatron_mup.layers.dropout import hidden_dropout
from megatron_mup.layers.factory import LayerFactory
from megatron_mup.layers.info import TokenInfo, document_mask
from megatron_mup.layers.loss import vocab_parallel_cross_entropy
from megatron_mup.layers.rope import rotary_angles
from megatron_mup.models.block import TransformerLayer
from megatron_mup.models.recompute import run_layers
from megatron_mup.parallel.mesh import ALONE, TensorAxis
from megatron_mup.parametrization.counter import derive_key
from megatron_mup.parametrization.meta import ParamMeta


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
        self.axis, self.sequence_parallel = factory.axis, factory.sequence_parallel

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        sample_index: torch.Tensor | None,
        key: torch.Tensor | None,
    ) -> torch.Tensor:
        """Ids ``[seq, batch]`` to ``[seq (/ tp), batch, hidden]``; positions ``[seq, batch or 1]``."""
        x = self.word_embeddings(tokens)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions)
        if self.multiplier != 1:
            x = x * self.multiplier
        start = x.shape[0] * self.axis.rank if self.sequence_parallel else 0
        return hidden_dropout(x, self.dropout, key, sample_index, start)


class Decoder(nn.Module):
    """The transformer layers of a stage, named by their place in the whole model, and the final norm on the last."""

    def __init__(self, factory: LayerFactory, stage: Stage) -> None:
        super().__init__()
        self.training_config = factory.config.training
        self.layers = nn.ModuleDict({str(i): TransformerLayer(factory, i) for i in range(stage.start, stage.end)})
        self.final_layernorm = factory.norm("decoder.final_layernorm", None) if stage.is_last else None

    def forward(self, x: torch.Tensor, info: TokenInfo, salts: torch.Tensor | None) -> torch.Tensor:
        """``[seq (/ tp), batch, hidden]`` to the same shape. ``salts``: ``[layers here, 3]``, or None."""
        calls = [
            partial(layer, info=info, salts=None if salts is None else salts[place])
            for place, layer in enumerate(self.layers.values())
        ]
        x = run_layers(x, calls, self.training_config)
        return x if self.final_layernorm is None else self.final_layernorm(x)


class GPT(nn.Module):
    """A GPT, or the part of one that a pipeline stage holds.

    Args:
        config: the run's configuration.
        vocab_size: number of token ids.
        stage: which part.
        axis: tensor-parallel axis.
        dtype: precision of the parameters.

    Attributes:
        metas: full parameter name to `ParamMeta` for every parameter here, in order of birth.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        stage: Stage,
        axis: TensorAxis = ALONE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        factory = LayerFactory(config, vocab_size, axis, dtype)
        self.config, self.stage, self.axis, self.first_row = config, stage, axis, factory.first_row
        self.logits_multiplier = factory.multipliers.logits
        self.embedding = Embedding(factory) if stage.is_first else None
        self.decoder = Decoder(factory, stage)
        self.output_layer = factory.output_layer(stage.is_first) if stage.is_last else None
        self.metas: dict[str, ParamMeta] = factory.metas
        self.objective = self.head_and_loss

    def forward(
        self,
        x: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        sample_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs this stage on one micro-batch.

        Args:
            x: token ids ``[batch, seq]`` on the first stage, hidden states ``[seq (/ tp), batch, hidden]`` on others.
            labels: ``[batch, seq]`` ids to predict, `loss.IGNORE` where there is no loss; read on the last stage.
            position_ids: ``[batch, seq]``; None counts from 0.
            document_ids: ``[batch, seq]``; given, attention stays inside each document.
            sample_index: ``[batch]`` running number of each sample, the counter of dropout.

        Returns:
            Hidden states; on the last stage ``[1, 2]`` fp32: the objective to differentiate and the language-model
            loss, each summed over the tokens of the micro-batch, in nats. Without labels the last stage returns this
            rank's logits ``[seq, batch, about vocab / tp]``, multiplier applied.
        """
        model = self.config.model
        seq = x.shape[1] if self.embedding is not None else self.config.training.seq_length
        positions = torch.arange(seq, device=x.device)[:, None] if position_ids is None else position_ids.t()
        salts = self.salts(x.device)
        if self.embedding is not None:
            x = self.embedding(x.t(), positions, sample_index, None if salts is None else salts[-1, 0])
        cos = sin = None
        if model.position_embedding_type == "rope":
            cos, sin = rotary_angles(positions, model.head_dim, model.rotary_percent, model.rotary_base)
        mask = None if document_ids is None else document_mask(document_ids)
        info = TokenInfo(cos, sin, mask, sample_index if salts is not None else None)
        x = self.decoder(x, info, None if salts is None else salts[self.stage.start : self.stage.end])
        if self.output_layer is None:
            return x
        shared = None if self.output_layer.weight is not None else self.embedding.word_embeddings.weight
        if labels is None:
            return self.output_layer(x, shared) * self.logits_multiplier
        return self.objective(x, shared, labels)

    def head_and_loss(self, x: torch.Tensor, shared: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        """Output layer and loss sums ``[1, 2]``; a method of its own so that it can be compiled."""
        logits = self.output_layer(x, shared)
        if self.logits_multiplier != 1:
            logits = logits * self.logits_multiplier
        loss, normalizer = vocab_parallel_cross_entropy(logits, labels.t(), self.first_row, self.axis)
        total = loss.sum()
        objective = total
        if self.config.training.cross_entropy_z_loss:
            objective = total + self.config.training.cross_entropy_z_loss * normalizer.square().sum()
        # No view: FSDP2 hooks the output.
        return torch.stack([torch.stack([objective, total.detach()])])

    def salts(self, device: torch.device) -> torch.Tensor | None:
        """Keys of dropout, ``[layers + 1, 3]`` int64 by place (the last row is the embedding's); None without."""
        model = self.config.model
        if model.hidden_dropout == model.attention_dropout == 0 or not self.training:
            return None
        seed, rows = self.config.training.seed, range(model.num_layers + 1)
        keys = [[derive_key(seed, "dropout", row, place) for place in range(3)] for row in rows]
        return torch.tensor(keys, device=device)


def parameter_metas(config: Config, vocab_size: int) -> list[ParamMeta]:
    """Facts of every parameter of the whole model, without memory or ranks."""
    with torch.device("meta"):
        return list(GPT(config, vocab_size, Stage(0, config.model.num_layers)).metas.values())
