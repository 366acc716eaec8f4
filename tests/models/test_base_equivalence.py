"""At width and depth ratio 1 every relative scheme is bitwise the standard model; at other ratios it is not."""

from __future__ import annotations

import pytest
import torch

from tests.runs import batch_of, config_of, step_of, values

SIZES = "--num-layers 3 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --kv-channels 6"
OWN_BASE = (
    "--mup-base-hidden-size 32 --mup-base-ffn-hidden-size 64 --mup-base-num-attention-heads 4 "
    "--mup-base-head-dim 6 --base-num-layers 3"
)
SCHEMES = {
    "mup": "--parametrization mup",
    "completep-1": "--parametrization completep --depth-alpha 1",
    "completep-0.5": "--parametrization completep --depth-alpha 0.5",
    "completep-C": "--parametrization completep --mup-form C",
    "depth-mup": "--parametrization depth-mup",
    "spectral": "--parametrization spectral",
    "everett": "--parametrization everett",
}
FOLLOW_DEPTH = ("completep-1", "completep-0.5", "completep-C", "depth-mup")
TIES = {"tied": "", "untied": "--untie-embeddings-and-output-weights --cross-entropy-fusion-impl linear"}
ARCHITECTURE = "--num-query-groups 2 --swiglu --qk-layernorm --normalization LayerNorm"


def trained(mesh, *flags):
    """Losses, logits and weights of three steps."""
    config = config_of(SIZES, ARCHITECTURE, *flags)
    step = step_of(config, mesh)
    seen = {f"initial {name}": value for name, value in values(step).items()}
    for number in range(3):
        batch = batch_of(config, number)
        with torch.no_grad():
            seen[f"logits {number}"] = step.model(batch["tokens"])
        seen[f"loss {number}"] = step(batch, 1.0).loss
    return seen | values(step)


def differing(one, other):
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("tie", TIES)
def test_base_size_is_the_standard_model(lone_mesh, optimizer, tie):
    flags = (TIES[tie], f"--optimizer {optimizer}")
    standard = trained(lone_mesh, *flags)
    assert differing(standard, trained(lone_mesh, *flags)) == set(), "the run itself is deterministic"
    for name, scheme in SCHEMES.items():
        if name == "everett" and optimizer != "adam":
            continue  # refused
        assert differing(trained(lone_mesh, *flags, scheme, OWN_BASE), standard) == set()
        assert differing(trained(lone_mesh, *flags, scheme), standard) == set(), "the own size is the default base"


@pytest.mark.parametrize(
    ("scheme", "optimizer"), [(s, o) for s in SCHEMES for o in ("adam", "muon") if (s, o) != ("everett", "muon")]
)
def test_other_sizes_differ(lone_mesh, scheme, optimizer):
    flag = f"--optimizer {optimizer}"
    standard = trained(lone_mesh, flag)
    wider = trained(lone_mesh, flag, SCHEMES[scheme], "--mup-base-hidden-size 16")
    assert {"logits 0", "loss 1", "initial decoder.layers.0.mlp.linear_fc2.weight"} <= differing(wider, standard)
    deeper = trained(lone_mesh, flag, SCHEMES[scheme], "--base-num-layers 1")
    assert bool(differing(deeper, standard)) == (scheme in FOLLOW_DEPTH)
