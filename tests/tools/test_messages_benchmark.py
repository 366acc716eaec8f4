"""How the benchmark tells messages that hide from those that don't."""

from __future__ import annotations

from benchmarks.messages import covered, split


def test_spans_that_overlap_count_once():
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4
    assert covered([]) == 0


def test_messages_behind_products_are_not_alone():
    ran = [
        ("sm90_gemm", (0.0, 10.0)),
        ("ncclDevKernel_AllGather_RING_LL", (8.0, 13.0)),
        ("Memcpy PtoP (Device -> Device)", (12.0, 14.0)),
        ("Memcpy DtoD (Device -> Device)", (13.5, 15.0)),
    ]
    assert split(ran) == {"all": 6.0, "alone": 3.5}
    assert split(ran[:1]) == {"all": 0.0, "alone": 0.0}
