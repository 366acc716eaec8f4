import itertools

import pytest
from config_cases import build, warnings

from megatron_mup.config import ConfigError, stage_layers, validate
from megatron_mup.config.schedules import (
    SCHEDULES,
    rank_of_stage,
    schedule_name,
    stages_of_rank,
    stages_per_rank,
)

SPLIT = [name for name, schedule in SCHEDULES.items() if schedule.splits_backward]


def pipeline(flags: str, layers: int = 12, ranks: int = 2):
    return build(*f"--num-layers {layers} --pipeline-model-parallel-size {ranks} {flags}".split())


def counts(flags: str, layers: int = 12, ranks: int = 2) -> list[int]:
    return [end - start for start, end in stage_layers(pipeline(flags, layers, ranks))]


@pytest.mark.parametrize(
    ("flags", "name", "held"),
    [
        ("", "1F1B", 1),
        ("--num-virtual-stages-per-pipeline-rank 1", "1F1B", 1),
        ("--num-virtual-stages-per-pipeline-rank 3", "Interleaved1F1B", 3),
        ("--num-layers-per-virtual-pipeline-stage 3", "Interleaved1F1B", 2),
        ("--num-layers-per-virtual-pipeline-stage 7 --account-for-loss-in-pipeline-split "
         "--account-for-embedding-in-pipeline-split", "1F1B", 1),
        ("--pipeline-schedule GPipe", "GPipe", 1),
        ("--pipeline-schedule Interleaved1F1B", "Interleaved1F1B", 2),
        ("--pipeline-schedule InterleavedZeroBubble", "InterleavedZeroBubble", 2),
        ("--pipeline-schedule InterleavedZeroBubble --num-virtual-stages-per-pipeline-rank 1",
         "InterleavedZeroBubble", 1),
        ("--pipeline-schedule ZBVZeroBubble", "ZBVZeroBubble", 2),
        ("--pipeline-schedule DualPipeV --num-virtual-stages-per-pipeline-rank 2", "DualPipeV", 2),
        ("--pipeline-model-parallel-layout Et*6|t*6L", "1F1B", 1),
        ("--pipeline-model-parallel-layout E|(t|)*4t*8L", "Interleaved1F1B", 3),
    ],
)  # fmt: skip
def test_schedule_and_stages_on_a_rank(flags, name, held):
    config = pipeline(flags)
    assert (schedule_name(config), stages_per_rank(config)) == (name, held)


def test_one_rank_has_one_stage():
    config = build("--pipeline-schedule", "DualPipeV")
    assert stages_of_rank(config, 0) == (0,)
    assert stage_layers(config) == ((0, config.model.num_layers),)


def test_places_of_stages():
    loop = pipeline("--pipeline-schedule Interleaved1F1B", ranks=3)
    assert [stages_of_rank(loop, rank) for rank in range(3)] == [(0, 3), (1, 4), (2, 5)]
    v = pipeline("--pipeline-schedule ZBVZeroBubble", ranks=3)
    assert [stages_of_rank(v, rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    for config in (loop, v):
        for rank in range(3):
            assert all(rank_of_stage(config, stage) == rank for stage in stages_of_rank(config, rank))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("Et*6|t*6L", [6, 6]),
        ("E,t*3|(tt|)*4,t|L", [3, 2, 2, 2, 2, 1, 0]),
        ("E|t*12|L", [0, 12, 0]),
        ("E((t|)*2t|)*3tttL", [1, 1, 1, 1, 1, 1, 1, 1, 1, 3]),
        ("E(tt)(tttt)|t*6 L", [6, 6]),
    ],
)
def test_layouts(layout, expected):
    stages = ["--num-layers", "12", "--pipeline-model-parallel-size", str(len(expected))]
    config = build(*stages, "--pipeline-model-parallel-layout", layout)
    assert [end - start for start, end in stage_layers(config)] == expected


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("Et*6|t*5L", "hold 11 layers, the model has 12"),
        ("Et*6|t*6mL", "multi-token prediction"),
        ("t*6|t*6L", "starts with the embedding"),
        ("Et*6|Et*6L", "starts with the embedding"),
        ("Et*6|t*6", "ends with the loss"),
        ("Et*6L|t*6L", "ends with the loss"),
        ("Et*6||t*6L", "stage 1 holds nothing"),
        ("Et*6|x*6L", "can't be read at * 6 x"),
        ("Et*6|(t*6L", "can't be read at ("),
        ("Et*6|t*L", "can't be read at *"),
        ("E(t*99999|)*99999L", "longer than any model"),
        ("Et*4|t*4|t*4L", "3 stages don't divide by 2"),
    ],
)
def test_layouts_that_cannot_be(layout, said):
    with pytest.raises(ConfigError) as caught:
        counts(f"--pipeline-model-parallel-layout {layout}")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--pipeline-schedule 1F1B --num-virtual-stages-per-pipeline-rank 2", "one stage on each rank, not 2"),
        ("--pipeline-schedule DualPipeV --num-virtual-stages-per-pipeline-rank 3", "two stages on each rank, not 3"),
        ("--pipeline-schedule Interleaved1F1B --num-virtual-stages-per-pipeline-rank 1", "two stages or more"),
        ("--num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 3", "keep one of them"),
        ("--num-virtual-stages-per-pipeline-rank 2 --pipeline-model-parallel-layout Et*6|t*6L", "keep one of them"),
        ("--num-layers-per-virtual-pipeline-stage 5", "12 layers don't divide by 10"),
        ("--num-virtual-stages-per-pipeline-rank 7", "can't be shared by 14 stages"),
        ("--pipeline-schedule ZBVZeroBubble --decoder-first-pipeline-num-layers 1", "--pipeline-model-parallel-layout"),
        ("--pipeline-model-parallel-layout Et*6|t*6L --decoder-last-pipeline-num-layers 6", "says what every stage"),
        ("--pipeline-model-parallel-layout Et*6|t*6L --account-for-loss-in-pipeline-split", "says what every stage"),
    ],
)
def test_stages_that_cannot_be(flags, said):
    with pytest.raises(ConfigError) as caught:
        counts(flags)
    assert said in str(caught.value)


def test_stages_add_up():
    """Every layer is on exactly one stage, every stage on exactly one rank, and shares are as even as they can be."""
    accounts = ("", "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split")
    for name, ranks, layers, account in itertools.product(SCHEDULES, (2, 3, 4), (12, 13, 31), accounts):
        config = pipeline(f"--pipeline-schedule {name} {account}", layers, ranks)
        stages = stage_layers(config)
        assert [layer for start, end in stages for layer in range(start, end)] == list(range(layers))
        held = [stages_of_rank(config, rank) for rank in range(ranks)]
        assert sorted(stage for one in held for stage in one) == list(range(len(stages)))
        assert {len(one) for one in held} == {stages_per_rank(config)}
        loads = [end - start for start, end in stages]
        loads[0] += bool(account)
        loads[-1] += bool(account)
        assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--pipeline-schedule Interleaved1F1B --global-batch-size 5", "5 micro-batches"),
        ("--pipeline-schedule InterleavedZeroBubble --global-batch-size 7", "multiples of 2"),
        ("--pipeline-schedule DualPipeV --global-batch-size 3", "batches of 4 or more"),
        ("--pipeline-schedule ZBVZeroBubble --global-batch-size 1", "one per stage"),
        ("--pipeline-schedule DualPipeV --global-batch-size 8 --rampup-batch-size 2 2 100", "--rampup-batch-size 2 2"),
        ("--pipeline-schedule Interleaved1F1B --global-batch-size 8 --rampup-batch-size 2 1 100",
         "a step has 5 micro-batches"),
    ],
)  # fmt: skip
def test_numbers_of_micro_batches(flags, said):
    with pytest.raises(ConfigError) as caught:
        validate(pipeline(flags), 2)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize(
    ("flags", "ranks", "said"),
    [
        ("--torch-compile", 2, "one backward"),
        ("--recompute-granularity selective", 2, "recomputed for each of its weights"),
        ("--recompute-activations", 2, "recomputed for each of its weights"),
        ("--use-torch-fsdp2", 4, "optim_grads_params"),
    ],
)
def test_what_a_split_backward_refuses(name, flags, ranks, said):
    batch = "--global-batch-size 16 --pipeline-schedule"
    with pytest.raises(ConfigError) as caught:
        validate(pipeline(f"{flags} {batch} {name}"), ranks)
    assert said in str(caught.value)
    assert name in str(caught.value)
    validate(pipeline(f"{flags} {batch} Interleaved1F1B"), ranks)
    validate(pipeline(f"{batch} {name}"), ranks)


def test_flags_without_a_pipeline_are_told():
    flags = ["--num-virtual-stages-per-pipeline-rank", "2", "--pipeline-schedule", "DualPipeV"]
    said = " ".join(warnings(*flags, "--num-layers-per-virtual-pipeline-stage", "1"))
    for flag in (*flags[::2], "--num-layers-per-virtual-pipeline-stage"):
        assert flag in said
