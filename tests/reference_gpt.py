"""A GPT in plain PyTorch, written from the papers and not from this package, and how it is trained.

It shares no code with `megatron_mup`: separate matrices, ``[batch, seq]`` order, rotary positions by complex numbers,
attention by its formula, `torch.optim.AdamW`, `clip_grad_norm_`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An architecture."""

    vocab_size: int
    seq_length: int
    hidden: int = 32
    ffn: int = 64
    layers: int = 2
    heads: int = 4
    groups: int = 4
    head_dim: int = 8
    activation: str = "gelu"
    layer_norm: bool = False
    qk_norm: bool = False
    positions: str = "rope"
    rotary_dim: int = 8
    rotary_base: float = 10000.0
    rotary_stretch: float | None = None
    window: int | None = None
    biases: bool = True
    qkv_biases: bool = True
    tied: bool = True
    eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Forward multipliers; ``attention`` is the whole factor on query . key."""

    embedding: float = 1.0
    attention: float
    branch: float = 1.0
    logits: float = 1.0


class Norm(nn.Module):
    def __init__(self, width: int, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if shape.layer_norm else None
        self.eps = shape.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * centred / (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() + self.bias


def rope(x: torch.Tensor, positions: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Rotates ``x`` ``[batch, seq, heads, head_dim]``: channel pairs (i, i + width / 2) are complex numbers."""
    width = shape.rotary_dim
    frequency = shape.rotary_base ** (-torch.arange(width // 2) * 2.0 / width)
    if shape.rotary_stretch is not None:
        frequency = torch.tensor([llama3(f.item(), shape.rotary_stretch) for f in frequency])
    angle = positions[..., None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None]
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    turned = torch.complex(first.contiguous(), second.contiguous()) * turn
    return torch.cat([turned.real, turned.imag, x[..., width:]], -1)


def llama3(frequency: float, factor: float) -> float:
    """A frequency of Llama 3.1: by its wavelength, in tokens, kept, divided by the factor, or between the two."""
    wavelength, short, long = 2 * math.pi / frequency, 8192 / 4, 8192 / 1
    if wavelength < short:
        return frequency
    if wavelength > long:
        return frequency / factor
    smooth = (8192 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


class Layer(nn.Module):
    def __init__(self, shape: Shape, factors: Factors) -> None:
        super().__init__()
        self.shape, self.factors = shape, factors
        attention, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
        self.attention_norm = Norm(shape.hidden, shape)
        self.query = nn.Linear(shape.hidden, attention, bias=shape.qkv_biases)
        self.key = nn.Linear(shape.hidden, keys, bias=shape.qkv_biases)
        self.value = nn.Linear(shape.hidden, keys, bias=shape.qkv_biases)
        self.query_norm = Norm(shape.head_dim, shape) if shape.qk_norm else nn.Identity()
        self.key_norm = Norm(shape.head_dim, shape) if shape.qk_norm else nn.Identity()
        self.attention_output = nn.Linear(attention, shape.hidden, bias=shape.biases)
        self.mlp_norm = Norm(shape.hidden, shape)
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=shape.biases) if shape.activation == "swiglu" else None
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=shape.biases)
        self.mlp_output = nn.Linear(shape.ffn, shape.hidden, bias=shape.biases)

    def attend(self, x: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        heads = {"query": self.query(x), "key": self.key(x), "value": self.value(x)}
        query, key, value = (t.unflatten(-1, (-1, self.shape.head_dim)) for t in heads.values())
        query, key = self.query_norm(query), self.key_norm(key)
        if self.shape.positions == "rope":
            query, key = rope(query, positions, self.shape), rope(key, positions, self.shape)
        share = self.shape.heads // self.shape.groups
        # Query head h reads key/value head h // share.
        query = query.unflatten(2, (self.shape.groups, share))
        logits = torch.einsum("bqgsd,bkgd->bgsqk", query, key) * self.factors.attention
        weights = logits.masked_fill(~allowed[:, None, None], -math.inf).softmax(-1)
        return self.attention_output(torch.einsum("bgsqk,bkgd->bqgsd", weights, value).flatten(2))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        if self.gate is not None:
            gate = self.gate(x)
            return self.mlp_output(gate * torch.sigmoid(gate) * up)
        if self.shape.activation == "squared_relu":
            return self.mlp_output(up.clamp(min=0) ** 2)
        tanh = torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))
        return self.mlp_output(0.5 * up * (1 + tanh))

    def forward(self, x: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        x = x + self.factors.branch * self.attend(self.attention_norm(x), positions, allowed)
        return x + self.factors.branch * self.feed_forward(self.mlp_norm(x))


class ReferenceGPT(nn.Module):
    """The model; ``factors`` None is the standard one."""

    def __init__(self, shape: Shape, factors: Factors | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.factors = factors or Factors(attention=1 / math.sqrt(shape.head_dim))
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden)
        learned = shape.positions == "learned_absolute"
        self.position = nn.Embedding(shape.seq_length, shape.hidden) if learned else None
        self.layers = nn.ModuleList(Layer(shape, self.factors) for _ in range(shape.layers))
        self.final_norm = Norm(shape.hidden, shape)
        self.head = None if shape.tied else nn.Linear(shape.hidden, shape.vocab_size, bias=False)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor | None = None, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits ``[batch, seq, vocab]`` of ``[batch, seq]`` ids."""
        seq = tokens.shape[1]
        if positions is None:
            positions = torch.arange(seq).expand_as(tokens)
        allowed = torch.tril(torch.ones(seq, seq, dtype=torch.bool)).expand(len(tokens), seq, seq)
        if self.shape.window is not None:
            place = torch.arange(seq)
            allowed = allowed & (place[:, None] - place <= self.shape.window)
        if documents is not None:
            allowed = allowed & (documents[:, :, None] == documents[:, None])
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position(positions)
        x = x * self.factors.embedding
        for layer in self.layers:
            x = layer(x, positions, allowed)
        x = self.final_norm(x)
        head = self.embedding.weight if self.head is None else self.head.weight
        return self.factors.logits * (x @ head.T)


class Numbers(NamedTuple):
    """What one parameter is trained with."""

    lr: float
    weight_decay: float
    eps: float


def standard_std(name: str, std: float, layers: int) -> float | None:
    """Standard deviation of the initial normal values: GPT-2's; None for constants."""
    if name.endswith("bias") or "norm" in name:
        return None
    return std / math.sqrt(2 * layers) if "output" in name else std


def standard_numbers(name: str, lr: float, weight_decay: float, eps: float) -> Numbers:
    """One learning rate; decay on matrices other than the embeddings."""
    matrix = not (name.endswith("bias") or "norm" in name)
    decays = matrix and not name.startswith(("embedding", "position"))
    return Numbers(lr, weight_decay if decays else 0.0, eps)


@torch.no_grad()
def initialise(model: ReferenceGPT, std: Callable[[str], float | None], seed: int = 0, jitter: float = 0.0) -> None:
    """Draws normal initial weights; gains 1 and biases 0, moved by ``jitter`` so that a lost one would show."""
    torch.manual_seed(seed)
    for name, param in model.named_parameters():
        deviation = std(name)
        if deviation is not None:
            param.normal_(0.0, deviation)
        else:
            param.fill_(0.0 if name.endswith("bias") else 1.0).add_(torch.randn_like(param), alpha=jitter)


class Training:
    """AdamW with decay coupled to the learning rate, and clipping."""

    def __init__(
        self,
        model: ReferenceGPT,
        numbers: Callable[[str], Numbers],
        betas: tuple[float, float] = (0.9, 0.95),
        clip: float = 1.0,
        z_loss: float = 0.0,
    ) -> None:
        self.model, self.clip, self.z_loss = model, clip, z_loss
        groups = [{"params": [p], **numbers(name)._asdict()} for name, p in model.named_parameters()]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, foreach=False)

    def losses(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Objective and language-model loss, means over the tokens that have a label."""
        logits = self.model(batch["tokens"], batch.get("position_ids"), batch.get("document_ids"))
        labels = batch["labels"]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        z = logits.logsumexp(-1)[labels != -100]
        return loss + self.z_loss * z.square().mean(), loss

    def gradients(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of the objective, left on the parameters too."""
        self.optimizer.zero_grad()
        self.losses(batch)[0].backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def step(self, batch: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """One step; loss and gradient norm before clipping."""
        self.optimizer.zero_grad()
        objective, loss = self.losses(batch)
        objective.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item(), norm.item()
