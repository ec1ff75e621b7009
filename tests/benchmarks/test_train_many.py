"""The benchmark of dictionaries trained in one run takes both ways."""

from __future__ import annotations

from benchmarks.train_many import measure


def test_both_ways_are_timed(one_thread: None, tokenized_once: None) -> None:
    (two,) = measure((2,), d_sae=64, steps=2)
    assert two["dictionaries"] == 2
    assert min(two["single_runs"], two["one_run"]) > 0
