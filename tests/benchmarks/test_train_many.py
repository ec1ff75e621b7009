"""The benchmark of dictionaries trained in one run takes both ways."""

from __future__ import annotations

from benchmarks.train_many import measure


def test_both_ways_are_timed(one_thread: None, tokenized_once: None) -> None:
    (one, two) = measure((1, 2), d_sae=64, steps=2)
    assert (one["dictionaries"], two["dictionaries"]) == (1, 2)
    assert 0 < one["single_runs"] < two["single_runs"] and min(one["one_run"], two["one_run"]) > 0
