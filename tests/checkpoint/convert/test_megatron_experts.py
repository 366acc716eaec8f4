"""Experts in checkpoints of Megatron-LM, in every form that its classes give them, become ours."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_mup.checkpoint.convert.megatron import config_of_arguments
from megatron_mup.config import ConfigError
from megatron_mup.inference import load_model
from tests.checkpoint.convert.hf_cases import convert, tokens
from tests.checkpoint.convert.test_megatron import PADDED, arguments, transformer_engine
from tests.runs import VOCAB_SIZE, config_of, model_of, saved_tensors

EXPERTS = 4
FLAGS = (
    "--num-layers 2 --seq-length 64 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    f"--num-experts {EXPERTS} --moe-ffn-hidden-size 24 --moe-shared-expert-intermediate-size 16 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5 "
    "--moe-router-num-groups 2 --moe-router-group-topk 1"
)
ROUTED = ".mlp.experts.linear_fc"
SAME = (
    *("num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk"),
    *("moe_router_score_function", "moe_router_enable_expert_bias", "moe_router_topk_scaling_factor"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_pre_softmax"),
)


def arguments_of(config, frequency: object, tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1) -> Namespace:
    own = {name: getattr(config.moe, name) for name in SAME} | {
        "moe_layer_freq": frequency,
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.2],
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    return Namespace(**{**vars(arguments(config)), **own})


def theirs(model) -> dict[str, torch.Tensor]:
    """Whole tensors by Megatron's names: gate above up; the experts of a layer as ``[experts, out, in]``."""
    out = {}
    tensors = {name: param.detach().clone() for name, param in model.named_parameters()}
    for name, value in (tensors | model.expert_biases()).items():
        if name.endswith((".mlp.linear_fc1.weight", ".shared_experts.linear_fc1.weight")):
            rows = torch.arange(len(value)) % 16 < 8
            value = torch.cat([value[rows], value[~rows]])
        if ROUTED in name:
            value = value.unflatten(0, (EXPERTS, -1))
        if "word_embeddings" in name or "output_layer" in name:
            value = torch.cat([value, torch.full((PADDED - len(value), value.shape[1]), 7.0)])
        out[name] = value
    return out


def shard(name: str, value: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A tensor rank's part, of experts along their own matrices."""
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(ranks, -2)[rank] for half in value.chunk(2, -2)], -2)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return value.chunk(ranks, -1)[rank]
    return value if "norm" in name or "router" in name else value.chunk(ranks)[rank]


def by_class(kind: str, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The experts of a rank ``[experts here, out, in]`` as one of Megatron's classes keeps them."""
    prefix, _, part = name.partition(".linear_")
    layer = f"linear_{part.removesuffix('.weight')}"
    if kind == "grouped":
        return {f"{prefix}.weight{layer[-1]}": value.transpose(1, 2).reshape(-1, value.shape[1])}
    if kind == "te":
        return {f"{prefix}.{layer}.weight{number}": matrix for number, matrix in enumerate(value)}
    return {f"{prefix}.local_experts.{number}.{layer}.weight": matrix for number, matrix in enumerate(value)}


def write_legacy(folder: Path, args: Namespace, state: dict[str, torch.Tensor], kind: str) -> None:
    tp, pp, ep = (getattr(args, f"{axis}_model_parallel_size") for axis in ("tensor", "pipeline", "expert"))
    etp = args.expert_tensor_parallel_size
    for rank, stage, group in [(r, s, e) for r in range(tp) for s in range(pp) for e in range(ep)]:
        if etp == 1 and tp > 1 and rank != group:
            continue  # each rank is one tensor rank and one expert rank
        mine: dict[str, torch.Tensor] = {}
        for name, value in state.items():
            layer = int(name.split(".")[2]) if ".layers." in name else None
            owner = pp - 1 if layer is None and not name.startswith("embedding") else layer or 0
            if pp > 1 and owner != stage:
                continue
            local = name.replace(f".layers.{layer}.", f".layers.{(layer or 0) - (stage if pp > 1 else 0)}.")
            if ROUTED in name:
                here = shard(name, value, rank % etp, etp) if etp > 1 else value
                mine |= by_class(kind, local, here.chunk(ep)[group])
            else:
                mine[transformer_engine(local) if kind == "te" else local] = shard(name, value, rank, tp)
        stages = f"_{stage:03d}" if pp > 1 else ""
        target = folder / "iter_0000012" / f"mp_rank_{rank:02d}{stages}{f'_{group:03d}' if ep > 1 else ''}"
        target.mkdir(parents=True)
        content = {"args": args, "checkpoint_version": 3.0, "iteration": 12, "model": mine}
        torch.save(content, target / "model_optim_rng.pt")


def write_dist(folder: Path, args: Namespace, state: dict[str, torch.Tensor], kind: str) -> None:
    """As megatron-core 0.16 names tensors: all layers and experts in one, by layer, or each expert by itself."""
    path, out = folder / "iter_0000012", dict[str, torch.Tensor]()
    path.mkdir(parents=True)
    for name, value in state.items():
        name = transformer_engine(name).replace(".mlp.experts.", ".mlp.experts.experts.")
        if kind == "stacked" and ".layers." in name:
            if ".layers.0." in name:
                own = transformer_engine(name.replace(".experts.experts.", ".experts."))
                second = {transformer_engine(n): v for n, v in state.items()}[own.replace(".layers.0.", ".layers.1.")]
                out[name.replace(".layers.0.", ".layers.")] = torch.stack([value, second])
        elif kind == "singleton" and name.endswith("linear_fc1.weight"):
            experts = enumerate(value) if value.dim() == 3 else [(None, value)]
            for number, matrix in experts:
                key = name if number is None else name.replace(".experts.experts.", f".experts.experts.{number}.")
                out[f"{key}_w"], out[f"{key}_v"] = matrix.chunk(2)
        elif kind == "singleton" and value.dim() == 3:
            for number, matrix in enumerate(value):
                out[name.replace(".experts.experts.", f".experts.experts.{number}.")] = matrix
        else:
            out[name] = value
    dcp.save(out, checkpoint_id=path, no_dist=True)
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 12}, path / "common.pt")


CASES = {
    "stacked": (write_dist, {}),
    "by-layer": (write_dist, {}),
    "singleton": (write_dist, {}),
    "modules": (write_legacy, {}),
    "te": (write_legacy, {"pp": 2, "ep": 2}),
    "grouped": (write_legacy, {"tp": 2, "ep": 2, "etp": 2}),
    "te-etp1": (write_legacy, {"tp": 2, "ep": 2, "etp": 1}),
}


@pytest.mark.parametrize("kind", CASES)
def test_become_ours(tmp_path, kind, capsys):
    frequency = 1 if kind == "stacked" else [0, 1]
    config = config_of(FLAGS, "--moe-layer-freq", str(frequency).replace(" ", ""))
    model = model_of(config).eval()
    for number, bias in enumerate(model.expert_biases().values()):
        bias.copy_(torch.linspace(-0.3, 0.2, EXPERTS).roll(number))
    write, layout = CASES[kind]
    write(tmp_path / "theirs", arguments_of(config, frequency, **layout), theirs(model), kind.partition("-")[0])
    (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").write_text("12")
    flags = ("--true-vocab-size", VOCAB_SIZE)
    assert convert("from-megatron", "--load", tmp_path / "theirs", "--save", tmp_path / "ours", *flags) == 0
    values = saved_tensors(tmp_path / "ours" / "iter_0000012")
    want = dict(model.named_parameters()) | model.expert_biases()
    assert values.keys() == {f"model/{name}" for name in want}
    assert [name for name, value in want.items() if not torch.equal(values[f"model/{name}"], value)] == []
    assert torch.equal(load_model(tmp_path / "ours").model(tokens()), model(tokens()))
    assert convert("to-megatron", "--load", tmp_path / "ours", "--save", tmp_path / "back") == 0
    assert "largest difference of logits 0.00e+00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("moe_router_load_balancing_type", "sinkhorn", "--moe-router-load-balancing-type sinkhorn"),
        ("moe_shared_expert_gate", True, "--moe-shared-expert-gate True"),
        ("moe_router_score_function", "sqrtsoftplus", "--moe-router-score-function sqrtsoftplus"),
    ],
)
def test_other_routers_are_refused(name, value, message):
    args = arguments_of(config_of(FLAGS), 1)
    setattr(args, name, value)
    with pytest.raises(ConfigError, match=message):
        config_of_arguments(args)


def test_other_cuts_of_experts_are_refused(tmp_path, capsys):
    config = config_of(FLAGS)
    state = theirs(model_of(config))
    write_legacy(tmp_path, arguments_of(config, 1, tp=4, etp=2), state, "modules")
    assert convert("from-megatron", "--load", tmp_path / "iter_0000012", "--save", tmp_path / "ours") == 2
    assert "--expert-tensor-parallel-size 2: with 4 tensor ranks" in capsys.readouterr().err
