"""What the planner says of a schedule is what PyTorch's own order of its passes gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import get_schedule_class

from megatron_mup.config import parse_config
from megatron_mup.planning.cut import Cut
from tests.runs import words

KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
SECONDS = {"F": 1, "I": 1, "W": 1, "B": 2}


def passes(name: str, ranks: int, held: int, count: int) -> list[list[tuple[str, int, int]]]:
    """Kind, stage and micro-batch of each pass of each rank, in order."""
    facts = {"num_stages": ranks * held, "group_size": ranks, "group_rank": 0, "is_first": False, "is_last": False}
    stages = [SimpleNamespace(**facts, stage_index=index, submod=None, has_backward=True) for index in range(held)]
    order = get_schedule_class(name)(stages, count).pipeline_order
    found = []
    for rank in range(ranks):
        actions = [sub for action in order[rank] if action for sub in action.sub_actions or (action,)]
        found.append([(KINDS[a.computation_type.name], a.stage_index, a.microbatch_index) for a in actions])
    return found


def played(name: str, ranks: int, held: int, count: int) -> tuple[int, list[int]]:
    """Time of the whole step less a rank's own work, and the most micro-batches that each rank holds for a stage."""
    order, last = passes(name, ranks, held, count), ranks * held - 1
    done: dict[tuple[str, int, int], int] = {}
    clock, place, now, most = [0] * ranks, [0] * ranks, [0] * ranks, [0] * ranks
    while (before := sum(place)) < sum(map(len, order)):
        for rank in range(ranks):
            while place[rank] < len(order[rank]):
                kind, stage, index = order[rank][place[rank]]
                needs = {"F": [("F", stage - 1)] * (stage > 0), "W": [("I", stage)]}.get(
                    kind, [("F", stage), *[("I", stage + 1)] * (stage < last)]
                )
                if any((*need, index) not in done for need in needs):
                    break
                clock[rank] = max([clock[rank], *(done[(*need, index)] for need in needs)]) + SECONDS[kind]
                done["I" if kind == "B" else kind, stage, index] = clock[rank]
                place[rank] += 1
                now[rank] += (kind == "F") - (kind in "BW")
                most[rank] = max(most[rank], now[rank])
        assert sum(place) > before, "each rank waits for another"
    return max(clock) - 3 * held * count, most


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("Interleaved1F1B", 2),
        ("Interleaved1F1B", 3),
        ("InterleavedZeroBubble", 1),
        ("InterleavedZeroBubble", 2),
        ("ZBVZeroBubble", 2),
        ("DualPipeV", 2),
    ],
)
def test_idle_time_and_micro_batches_in_flight(name, held, ranks):
    for rounds in (2, 4):
        flags = f"--num-layers 12 --global-batch-size {rounds * ranks} --micro-batch-size 1 --pipeline-schedule {name}"
        virtual = f"--pipeline-model-parallel-size {ranks} --num-virtual-stages-per-pipeline-rank {held}"
        cut = Cut.of(parse_config(words(flags, virtual)).config, ranks)
        idle, most = played(name, ranks, held, rounds * ranks)
        assert cut.micro_batches == rounds * ranks
        assert cut.idle == pytest.approx(idle / (3 * held))
        assert [cut.in_flight(rank) for rank in range(ranks)] == [passes / held for passes in most]
