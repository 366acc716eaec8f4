"""Spellings of Megatron-LM and Xmodel-2.5: for settings here, for what is so anyway, and for what can't be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Alias:
    """One foreign flag. One of ``renames``, ``sets`` and ``convert`` says what it does; without any it changes nothing.

    Attributes:
        flag: spelling without leading dashes.
        renames: setting of which this is another name.
        sets: values that the switch stands for.
        convert: settings that a value after the flag stands for. Raises ValueError.
        takes: values that ``convert`` knows, in words, and one of them.
        only: the one value that may follow the flag.
        needs: setting that must be given too.
        excludes: setting and value that it contradicts.
        note: why it changes nothing here; shown as a warning.
        refused: why nothing here does what it asks for; it ends the run.
    """

    flag: str
    renames: str = ""
    sets: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[str], Mapping[str, str]] | None = None
    takes: tuple[str, str] = ("a number", "0.2")
    only: str | None = None
    needs: str = ""
    excludes: tuple[str, object] | None = None
    note: str = ""
    refused: str = ""

    @property
    def takes_value(self) -> bool:
        """Whether a value follows the flag (a renamed setting's own type says it otherwise)."""
        return self.convert is not None or self.only is not None

    @property
    def meaning(self) -> str:
        """What it stands for, for help and docs."""
        if self.refused:
            return f"refused: {self.refused}"
        if self.renames:
            return "--" + self.renames.replace("_", "-")
        if self.sets:
            return " ".join(_flag(name, value) for name, value in self.sets.items())
        if self.convert:
            return self.note
        if self.needs:
            return f"nothing, but --{self.needs.replace('_', '-')} must be given"
        return f"nothing: {self.note}"


def _flag(name: str, value: str) -> str:
    kebab = name.replace("_", "-")
    return {"True": f"--{kebab}", "False": f"--no-{kebab}"}.get(value, f"--{kebab} {value}")


def _matched_rms(value: str) -> Mapping[str, str]:
    """Xmodel's target RMS; match_rms_adamw has 0.2 built in, so the rest is the extra factor."""
    return {"muon_scale_mode": "match_rms_adamw", "muon_extra_scale_factor": repr(float(value) / 0.2)}


def _tp_mode(value: str) -> Mapping[str, str]:
    """Megatron-LM's modes; duplicated gives what owner gives, with the work dealt out instead of repeated."""
    modes = {"duplicated": "owner", "blockwise": "local", "distributed": "gram"}
    if value not in modes:
        raise ValueError(value)
    return {"muon_distributed_mode": modes[value]}


_BF16_ATTENTION = "attention itself is computed in bf16, whatever the linear layers are in"
_FUSED = "fusions are the kernels' own business and change no result"
_OVERLAP = "communication overlaps by itself"
_SHARDED = "checkpoints are saved and loaded in parallel by all ranks"

_TABLE = (
    # Xmodel-2.5
    Alias(flag="use-mup", sets={"parametrization": "mup"}),
    Alias(flag="mup-base-width", renames="mup_base_hidden_size"),
    Alias(flag="mup-input-scale", renames="mup_embedding_mult"),
    Alias(flag="mup-output-scale", renames="mup_output_mult"),
    Alias(flag="muon-ns-steps", renames="muon_num_ns_steps"),
    Alias(
        flag="muon-matched-adamw-rms",
        convert=_matched_rms,
        note="--muon-scale-mode match_rms_adamw --muon-extra-scale-factor VALUE/0.2",
    ),
    Alias(flag="no-decay-norm-bias", note="norms and biases have no weight decay"),
    Alias(
        flag="no-decay-norm-bias-embed",
        excludes=("decay_embeddings", True),
        note="norms, biases and embeddings have no weight decay unless --decay-embeddings asks for it",
    ),
    # Megatron-LM: other words for settings
    Alias(flag="use-rotary-position-embeddings", sets={"position_embedding_type": "rope"}),
    Alias(flag="use-flash-attn", sets={"attention_backend": "flash"}),
    Alias(flag="enable-cuda-graph", sets={"cuda_graph_impl": "local"}),
    Alias(flag="muon-no-split-qkv", sets={"muon_split_qkv": "False"}),
    Alias(
        flag="muon-tp-mode",
        convert=_tp_mode,
        takes=("duplicated, blockwise or distributed", "duplicated"),
        note="--muon-distributed-mode owner (duplicated), local (blockwise), gram (distributed)",
    ),
    Alias(flag="group-query-attention", needs="num_query_groups"),
    # Megatron-LM: what holds here anyway
    Alias(
        flag="no-position-embedding",
        excludes=("position_embedding_type", "learned_absolute"),
        note="there is no position table unless --position-embedding-type learned_absolute asks for it",
    ),
    Alias(
        flag="accumulate-allreduce-grads-in-fp32",
        excludes=("grad_reduce_in_bf16", True),
        note="gradients are summed in fp32 unless --grad-reduce-in-bf16 asks for bf16",
    ),
    Alias(flag="use-mcore-models", note="there is one model implementation"),
    Alias(flag="ckpt-format", only="torch_dist", note="there is one checkpoint format, PyTorch's distributed one"),
    Alias(flag="use-dist-ckpt", note="checkpoints are always distributed"),
    Alias(flag="auto-detect-ckpt-format", note="there is one checkpoint format"),
    Alias(flag="ckpt-fully-parallel-save", note=_SHARDED),
    Alias(flag="ckpt-fully-parallel-load", note=_SHARDED),
    Alias(flag="moe-router-dtype", only="fp32", note="the router computes in fp32"),
    Alias(flag="moe-token-dispatcher-type", only="alltoall", note="there is one dispatcher"),
    Alias(flag="moe-grouped-gemm", note="experts of a rank are one grouped product on a GPU"),
    Alias(flag="moe-permute-fusion", note=_FUSED),
    Alias(flag="moe-router-fusion", note=_FUSED),
    Alias(flag="overlap-grad-reduce", note=_OVERLAP),
    Alias(flag="overlap-param-gather", note=_OVERLAP),
    Alias(flag="no-create-attention-mask-in-dataloader", note="the loader makes no attention mask"),
    Alias(flag="attention-softmax-in-fp32", note="the softmax is in fp32"),
    Alias(flag="use-cpu-initialization", note="initial weights don't depend on the device or the layout"),
    Alias(flag="no-masked-softmax-fusion", note=_FUSED),
    Alias(flag="no-gradient-accumulation-fusion", note=_FUSED),
    Alias(flag="no-bias-gelu-fusion", note=_FUSED),
    Alias(flag="no-bias-swiglu-fusion", note=_FUSED),
    Alias(flag="no-bias-dropout-fusion", note=_FUSED),
    Alias(flag="no-rope-fusion", note=_FUSED),
    Alias(flag="cross-entropy-loss-fusion", note=_FUSED),
    Alias(flag="use-precision-aware-optimizer", note="precisions of the optimizer's state are flags of their own"),
    Alias(flag="main-grads-dtype", only="fp32", note="gradients of micro-batches are summed in fp32"),
    Alias(flag="use-pytorch-profiler", note="--profile always uses PyTorch's profiler"),
    # Megatron-LM: what there is not
    Alias(flag="fp8-dot-product-attention", refused=_BF16_ATTENTION),
    Alias(flag="fp8-multi-head-attention", refused=_BF16_ATTENTION),
    Alias(flag="tp-comm-overlap", refused="messages between tensor ranks don't overlap with matrix products here"),
)

ALIASES: Mapping[str, Alias] = MappingProxyType({alias.flag: alias for alias in _TABLE})
"""By flag, without leading dashes."""
