"""Between checkpoints and model folders of Hugging Face's transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_mup.checkpoint.convert import logits
from megatron_mup.checkpoint.convert.architectures import (
    ARCHITECTURES,
    Multipliers,
    Target,
    from_hf_config,
    to_hf_config,
)
from megatron_mup.checkpoint.convert.hf_files import HFWeights, Planned, hf_library, write_weights
from megatron_mup.checkpoint.convert.names import HEAD, Entry, entries
from megatron_mup.checkpoint.convert.output import ConversionError, save_pieces, staged
from megatron_mup.checkpoint.convert.tokenizer import export_tokenizer, import_tokenizer
from megatron_mup.checkpoint.manifest import Manifest
from megatron_mup.checkpoint.state import MODEL, LazyPiece
from megatron_mup.checkpoint.whole import SavedModel, open_model
from megatron_mup.config import Config, ConfigError, to_dict
from megatron_mup.config.bounds import check_bounds
from megatron_mup.config.moe_rules import check_moe
from megatron_mup.config.rules import check_layout, check_model
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.parallel.mesh import AXES
from megatron_mup.parametrization.meta import Role
from megatron_mup.parametrization.report import table_rows
from megatron_mup.progress import track

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Check:
    """How the result is compared with its source.

    Attributes:
        tokens: ids to compare on; None draws some.
        tolerance: largest difference allowed; None follows the precision (`logits.TOLERANCE`).
    """

    tokens: list[int] | None = None
    tolerance: float | None = None

    def __call__(
        self, saved: SavedModel, hf_config: Any, weights: HFWeights, coarsest: torch.dtype
    ) -> logits.Comparison:
        """Compares.

        Raises:
            ConversionError: the models differ.
        """
        tokens = self.tokens or logits.random_tokens(saved.vocab_size)
        tolerance = logits.TOLERANCE.get(coarsest, 1e-5) if self.tolerance is None else self.tolerance
        theirs = logits.hf_logits(hf_config, weights, tokens)
        comparison = logits.compare(logits.our_logits(saved, tokens), theirs, tolerance)
        if not comparison.holds:
            raise ConversionError(comparison)
        return comparison


def to_hf(
    folder: str | Path,
    target: str | Path,
    *,
    step: int | None = None,
    architecture: str | None = None,
    multipliers: Multipliers | None = None,
    dtype: torch.dtype | None = None,
    eos: int | None = None,
    shard_bytes: int = 2 * 10**9,
    check: Check = Check(),
    say: Say = print,
) -> logits.Comparison:
    """Writes the model of a checkpoint as a model folder of transformers.

    Args:
        folder: what ``--save`` named.
        target: a new folder.
        step: iteration; default: the latest.
        architecture: ``model_type``; default: what the model was converted from, else the plainest that can hold it.
        multipliers: see `to_hf_config`.
        dtype: precision of the weights; default: as they were saved.
        eos: end-of-document id to name in ``config.json``.
        shard_bytes: size of the files.
        check: the comparison at the end.
        say: told what happens.

    Raises:
        ConfigError: no architecture can hold the model, or a folder can't be read or written.
        ConversionError: the result computes something else.
    """
    saved = open_model(folder, step)
    origin = saved.manifest.extra.get("huggingface", {})
    if architecture is None and multipliers is None:
        architecture = origin.get("model_type")
    plan = to_hf_config(saved.config, architecture, multipliers)
    say(f"{saved.path} becomes a {plan.architecture.model_class}; {_told_fold(plan)}")
    steps = [_Export(entry, plan, dtype) for entry in entries(saved.metas, plan.architecture.experts)]
    transformers = hf_library("transformers")
    fields = {name: origin.get(name) for name in _TOKEN_IDS}
    if eos is not None:
        fields["eos_token_id"] = eos
    planned = [one for s in steps for one in s.planned(saved)]
    fields["dtype"] = str(planned[0].dtype).removeprefix("torch.")
    values = transformers.AutoConfig.for_model(plan.architecture.model_type, **plan.fields, **fields)
    with staged(target) as temporary:
        values.save_pretrained(temporary)
        _add_older_names(temporary / "config.json")
        tensors = (pair for s in track(steps, "writing tensors") for pair in s.tensors(saved))
        write_weights(temporary, planned, tensors, shard_bytes)
        missing = export_tokenizer(saved.config.data, temporary)
        if missing:
            say(f"no tokenizer written: {missing}")
        written = read_hf_config(temporary)
        comparison = check(saved, written, HFWeights(temporary), _coarsest(p.dtype for p in planned))
    say(f"{comparison}\nwrote {target}")
    return comparison


def _add_older_names(file: Path) -> None:
    """Says the rotary embedding in the words of transformers 4 too, which would silently take its default base.

    And the number of experts, where its name was another.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    if values["model_type"] == "qwen3_moe":
        values["num_experts"] = values["num_local_experts"]
    rope = dict(values["rope_parameters"])
    values["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        values["rope_scaling"] = rope
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Export:
    """One parameter on its way out."""

    entry: Entry
    plan: Target
    dtype: torch.dtype | None

    def planned(self, saved: SavedModel) -> list[Planned]:
        dtype = self.dtype or saved.dtype(self.entry.meta.name)
        return [Planned(name, shape, dtype) for name, _, shape in self._outputs()]

    def tensors(self, saved: SavedModel) -> Iterator[tuple[str, torch.Tensor]]:
        tensor = saved.tensor(self.entry.meta.name)
        parts = self.entry.split(tensor)
        dtype = self.dtype or tensor.dtype
        for name, part, _ in self._outputs():
            yield name, scaled(parts[part], self._factor(name, part)).to(dtype)

    def _factor(self, name: str, part: int) -> float:
        """What a weight takes up of the multipliers that its architecture doesn't apply."""
        if name == HEAD:
            return self.plan.fold.factors.logits
        gates = self.plan.gates if self.entry.meta.role is Role.EXPERT_OUT else 1.0
        return gates * self.plan.fold.factor(self.entry.meta, self.entry.block(part))

    def _outputs(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """Names, parts and shapes of what it becomes; a tied embedding becomes two where the factors differ."""
        names, shapes = self.entry.names, self.entry.shapes()
        outputs = [(name, i, shapes[i]) for i, name in enumerate(names)]
        if self.entry.meta.role is Role.EMBEDDING and self.plan.unties:
            outputs.append((HEAD, 0, shapes[0]))
        return outputs


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The product, computed in fp32 at least; the tensor itself where the factor is 1."""
    if factor == 1.0:
        return tensor
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor).to(tensor.dtype)


def _told_fold(plan: Target) -> str:
    factors = {k: v for k, v in {**vars(plan.fold.factors), "gates": plan.gates}.items() if v != 1.0}
    if not factors:
        return "no multiplier to fold"
    told = ", ".join(f"{name} {value:.6g}" for name, value in factors.items())
    return f"folded into the weights: {told}" + ("; embedding and output layer are untied" if plan.unties else "")


def _coarsest(dtypes: Iterator[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda d: torch.finfo(d).eps)


def read_hf_config(folder: Path) -> Any:
    """The configuration of a model folder; nothing is downloaded and no code of the folder runs.

    Raises:
        ConfigError: it is missing or can't be read.
    """
    library = hf_library("transformers").AutoConfig
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--load {folder}", "holds no config.json", "give a model folder of Hugging Face's")
    try:
        return library.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"--load {folder}", f"config.json can't be read: {error}", "convert another model") from None


def from_hf(
    folder: str | Path,
    target: str | Path,
    *,
    check: Check = Check(),
    say: Say = print,
) -> logits.Comparison:
    """Writes a model folder of transformers as a checkpoint of iteration 0, weights only, in their own precision.

    Args:
        folder: the model folder.
        target: a new folder, for ``--load`` or ``--pretrained-checkpoint``.
        check: the comparison at the end.
        say: told what happens.

    Raises:
        ConfigError: something in the model is missing here, or a folder can't be read or written.
        ConversionError: the result computes something else.
    """
    source = Path(folder)
    values = read_hf_config(source)
    config = from_hf_config(values, f"--load {folder}")
    weights = HFWeights(source)
    check_bounds(config)
    check_model(config)
    check_layout(config, 1)
    check_moe(config, 1)
    assert config.model.vocab_size is not None
    metas = {meta.name: meta for meta in parameter_metas(config, config.model.vocab_size)}
    steps = entries(metas, ARCHITECTURES[values.model_type].experts)
    _check_names(source, steps, weights, tied=values.tie_word_embeddings)
    pieces = [_piece(entry, weights) for entry in steps]
    with staged(target) as temporary:
        data = import_tokenizer(source, temporary, Path(target).absolute())
        if not data:
            say("no tokenizer found")
        config = replace(config, data=replace(config.data, **data))
        save_pieces(temporary, pieces, _manifest(config, list(metas.values()), values))
        saved = open_model(temporary)
        comparison = check(saved, values, weights, torch.float32)
    say(f"{comparison}\nwrote {target}")
    return comparison


def _manifest(config: Config, metas: list[Any], values: Any) -> Manifest:
    origin = {"model_type": values.model_type, **{name: getattr(values, name, None) for name in _TOKEN_IDS}}
    return Manifest(
        iteration=0,
        consumed_samples=0,
        config=to_dict(config),
        parametrization=table_rows(metas, config),
        layout=dict.fromkeys(AXES, 1),
        extra={"huggingface": origin},
    )


def _piece(entry: Entry, weights: HFWeights) -> LazyPiece:
    facts = [weights.facts(name) for name in entry.names]
    for name, want, (shape, dtype) in zip(entry.names, entry.shapes(), facts, strict=True):
        if shape != want or dtype != facts[0][1]:
            raise ConfigError(
                f"--load {weights.folder}",
                f"{name} is {list(shape)} in {dtype}, and should be {list(want)} in {facts[0][1]}",
                "config.json and weights are of two models; restore them",
            )
    return LazyPiece(
        key=f"{MODEL}/{entry.meta.name}",
        tensor=torch.empty(entry.meta.shape, dtype=facts[0][1], device="meta"),
        shape=entry.meta.shape,
        offsets=(0,) * len(entry.meta.shape),
        make=partial(_fused, entry, weights),
    )


def _fused(entry: Entry, weights: HFWeights) -> torch.Tensor:
    return entry.fuse([weights.tensor(name) for name in entry.names])


def _check_names(source: Path, steps: list[Entry], weights: HFWeights, tied: bool) -> None:
    """Every tensor is wanted, and every one wanted is there."""
    wanted = {name for entry in steps for name in entry.names}
    # Old files hold tables of the rotary embedding; some hold the tied matrix twice.
    spare = {HEAD} if tied else set()
    there = {name for name in weights.files if not name.endswith("rotary_emb.inv_freq")} - spare
    odd = sorted(wanted - there)[:1] or sorted(there - wanted)[:1]
    if odd:
        why = "is missing" if odd[0] in wanted else "has no place here"
        raise ConfigError(f"--load {source}", f"{odd[0]} {why}", "convert another model, or restore its files")
