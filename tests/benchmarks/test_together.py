"""The benchmark of SAEs trained together takes both ways through the same steps."""

from __future__ import annotations

from benchmarks.together import harvest_of, measure, shares


def test_both_ways_take_turns(one_thread: None) -> None:
    found = measure(3, d_in=12, d_sae=64, batch=128, warm_up=1, seconds=0.05)
    assert set(found) == {"alone", "together"}
    for times in found.values():
        assert times["seconds"] and all(seconds > 0 for seconds in times["seconds"])
        assert all(0 <= share <= 1.5 for share in times["others"])


def test_a_harvest_takes_its_turn(one_thread: None) -> None:
    width, harvest = harvest_of("tiny-gemma-2", batch=256)
    assert width == 256
    found = measure(2, 12, 64, 128, warm_up=1, seconds=0.05, harvest=harvest)
    assert set(found) == {"alone", "together", "harvest"}
    assert all(seconds > 0 for seconds in found["harvest"]["seconds"])


def test_the_profile_has_shares_of_one(one_thread: None) -> None:
    found = shares(d_in=12, d_sae=64, batch=128, steps=2)
    assert 0.5 < sum(operator["share"] for operator in found) <= 1
    assert {"aten::mm", "aten::sort"} & {operator["operator"] for operator in found}
