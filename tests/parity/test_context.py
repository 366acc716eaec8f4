"""Context-parallel ranks share sequences: every layout computes what one rank computes, and documents stay apart."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.layers.router import Tally
from megatron_mup.models.build import build_model
from megatron_mup.models.gpt import GPT
from megatron_mup.optim.main_params import MainParams
from megatron_mup.parallel.mesh import Mesh
from tests.parity import cases
from tests.parity.cases import FSDP, Case
from tests.parity.test_experts import BALANCING, EP2, EXPERTS
from tests.parity.test_layouts import assert_parity, compare

CP2 = "--context-parallel-size 2"
GATHERED = "--cp-comm-type all_gather"
TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "cp2": Case(2, CP2),
    "cp2-gathered": Case(2, f"{CP2} {GATHERED}"),
    "cp4": Case(4, "--context-parallel-size 4"),
    "cp4-gathered": Case(4, f"--context-parallel-size 4 {GATHERED}"),
    "cp2-dp2": Case(4, CP2),
    "cp2-tp2": Case(4, f"{CP2} {TP2}"),
    "cp2-tp2-sp": Case(4, f"{CP2} {TP2} --sequence-parallel"),
    "cp2-tp2-sp-gathered": Case(4, f"{CP2} {GATHERED} {TP2} --sequence-parallel"),
    "cp2-sharded": Case(2, f"{CP2} {FSDP}"),
    "cp2-fsdp2": Case(4, f"{CP2} {FSDP}"),
    "cp2-hsdp2": Case(4, f"{CP2} {GATHERED} {FSDP} --num-distributed-optimizer-instances 2"),
    "cp2-pp2": Case(4, f"{CP2} {PP2} --decoder-first-pipeline-num-layers 1"),
}
WINDOW = "--window-size 5"
KINDS = {
    "mup": (cases.SCHEMES["mup"],),
    "completep-muon": (cases.SCHEMES["completep"], cases.OPTIMIZERS["muon"]),
    "features": (cases.FEATURES,),
    "window": (WINDOW, "--recompute-granularity selective"),
    "window-features": (cases.FEATURES, WINDOW, "--recompute-granularity full"),
    "unfused": ("--attention-backend unfused",),
}
"""Flags; features are dropout, document masks, learned positions and more."""
IN_EVERY_LAYOUT = ("completep-muon", "features")
IN_EVERY_KIND = ("cp2", "cp2-gathered", "cp2-tp2-sp", "cp2-tp2-sp-gathered")
DAILY = {("cp2", "features"), ("cp2-gathered", "completep-muon")}

EXPERT_LAYOUTS = {
    "cp2": Case(2, CP2),
    "ep2-cp2": Case(2, f"{EP2} {CP2}"),
    "ep2-cp2-gathered": Case(2, f"{EP2} {CP2} {GATHERED}"),
    "ep2-cp2-tp2": Case(4, f"{EP2} {CP2} {TP2} --sequence-parallel"),
    "ep2-cp2-fsdp2": Case(4, f"{EP2} {CP2} {FSDP}"),
    "ep2-pp2-cp2": Case(8, f"{EP2} {PP2} {CP2}"),
}


@pytest.fixture(scope="module")
def reference(pool):
    """What one rank computes, by flags."""
    seen = {}

    def run(*flags: str):
        if flags not in seen:
            seen[flags] = pool.run(1, cases.observe, cases.config_of(*flags))[0]
        return seen[flags]

    return run


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param(layout, kind, marks=() if (layout, kind) in DAILY else pytest.mark.long)
        for layout in LAYOUTS
        for kind in KINDS
        if layout in IN_EVERY_KIND or kind in IN_EVERY_LAYOUT
    ],
)
def test_layout_matches_one_rank(pool, reference, layout, kind):
    compare(pool, reference, LAYOUTS[layout], KINDS[kind], "muon" if "muon" in kind else "adam")


@pytest.mark.long
@pytest.mark.parametrize("layout", ["cp2", "cp2-gathered", "cp2-tp2-sp"])
@pytest.mark.parametrize("scheme", cases.UNIT_SCALED)
def test_unit_scaled_layouts(pool, reference, scheme, layout):
    flags = (cases.UNIT_SCALED[scheme], "--hidden-dropout 0.1 --attention-dropout 0.1")
    compare(pool, reference, LAYOUTS[layout], flags, "adam")


@pytest.mark.long
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
# Room for tokens is counted on each rank, and ranks hold parts of sequences: not the same tokens drop.
@pytest.mark.parametrize("kind", [kind for kind in BALANCING if kind != "capacity"])
def test_experts(pool, reference, layout, kind):
    flags = (EXPERTS, BALANCING[kind])
    config = cases.with_layout(cases.config_of(*flags), EXPERT_LAYOUTS[layout])
    seen, expected = pool.run(EXPERT_LAYOUTS[layout].ranks, cases.observe, config)[0], reference(*flags)
    mine, theirs = Tally.of(seen["routing"]), Tally.of(expected["routing"])
    assert torch.equal(mine.tokens, theirs.tokens), "tokens of each step, layer and expert"
    torch.testing.assert_close(mine.balancing_loss, theirs.balancing_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(mine.z_loss, theirs.z_loss, rtol=1e-5, atol=0)
    assert_parity(seen, expected, "adam")


def packed_logits(config, lengths):
    """Logits ``[seq, vocab]``, on every rank, of documents packed into one sequence and of each of them alone.

    A document alone fills the front of a sequence; what follows it can't be seen from there.
    """
    mesh = Mesh.build(config, torch.device("cpu"))
    model = build_model(config, cases.VOCAB_SIZE, mesh)
    assert isinstance(model, GPT)
    MainParams(model, model.metas, config, mesh).initialise()
    tokens = torch.randint(0, cases.VOCAB_SIZE, (1, cases.SEQ_LENGTH), generator=torch.Generator().manual_seed(3))
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    places = torch.cat([torch.arange(length) for length in lengths])[None]

    def logits(ids, **info):
        with torch.no_grad():
            mine = model(ids, **info)[:, 0]
        here = mesh.cp.places(cases.SEQ_LENGTH, ids.device)[mesh.cp.rank]
        whole = mine.new_zeros(cases.SEQ_LENGTH, mine.shape[1]).index_copy(0, here, mine)
        torch.distributed.all_reduce(whole)
        return whole

    packed, alone, start = logits(tokens, document_ids=numbers, position_ids=places), [], 0
    for length in lengths:
        alone.append(logits(tokens.roll(-start, 1))[:length])
        start += length
    return packed, torch.cat(alone)


@pytest.mark.parametrize("layout", [None, "cp2", pytest.param("cp2-gathered", marks=pytest.mark.long)])
def test_packed_documents_are_each_alone(pool, layout):
    """Documents of all kinds of places: of one token, inside a chunk, over chunks and over ranks."""
    config, ranks = cases.config_of("--init-method-std 0.3"), 1
    if layout is not None:
        config, ranks = cases.with_layout(config, LAYOUTS[layout]), LAYOUTS[layout].ranks
    for packed, alone in pool.run(ranks, packed_logits, config, [3, 1, 7, 5]):
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
        assert packed.std() > 0.1
