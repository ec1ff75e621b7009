"""Waiting threads: when their spins are made short, and that they are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from jumprelu_plugin.step import spinning
from jumprelu_plugin.step.spinning import SleepingTeam, Spins, nanoseconds_waited

pytestmark = pytest.mark.skipif(
    spinning.libgomp() is None, reason="PyTorch's threads are not libgomp's"
)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in spinning.USER_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


class Machine:
    """Two threads on a machine where time passes, and threads wait, when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waited = 17.0, {"3": 5_000_000_000, "7": 11}
        monkeypatch.setattr("jumprelu_plugin.step.spinning.time.monotonic", lambda: self.now)
        self.spins = Spins(lambda: dict(self.waited))

    def pass_time(self, seconds: float, waiting: float) -> bool:
        """A little at a time, with one thread waiting for a share of it: are spins short?"""
        for _ in range(round(seconds / 0.13)):
            self.now += 0.13
            self.waited["7"] += round(0.13e9 * waiting)
            self.spins.adapt()
        return self.spins.short


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine(monkeypatch)
    yield machine
    torch.set_num_threads(2)
    machine.pass_time(2, 0.0)  # so that no team is left


def test_spins_are_short_while_threads_wait_for_a_cpu(machine: Machine) -> None:
    assert not machine.pass_time(3, 0.01)
    assert machine.pass_time(2, 0.7)
    assert machine.pass_time(3, 0.5)  # what remains of the waiting when they are short
    assert not machine.pass_time(2, 0.01)
    assert machine.pass_time(2, 0.7)


def test_a_thread_that_ends_or_waits_seldom_changes_nothing(machine: Machine) -> None:
    assert not machine.pass_time(2, 0.15)
    assert machine.pass_time(2, 0.4)
    assert machine.pass_time(2, 0.15)
    del machine.waited["3"]
    assert machine.pass_time(2, 0.4)


def test_what_the_user_set_stays(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("GOMP_SPINCOUNT", "1000"), ("OMP_WAIT_POLICY", "ACTIVE")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not machine.pass_time(2, 0.7)
    assert machine.pass_time(2, 0.7)


def test_one_thread_waits_for_no_other(machine: Machine) -> None:
    torch.set_num_threads(1)
    assert not machine.pass_time(2, 0.7)


def test_nothing_changes_where_the_system_does_not_say(machine: Machine) -> None:
    spins = Spins(dict)
    for _ in range(9):
        machine.now += 1.3
        spins.adapt()
    assert not spins.short


def test_the_system_says_how_long_each_thread_waited() -> None:
    first = nanoseconds_waited()
    assert str(os.getpid()) in first and all(waited >= 0 for waited in first.values())
    later = nanoseconds_waited()
    assert all(later[thread] >= waited for thread, waited in first.items() if thread in later)


def cpu_seconds_of_waiting() -> float:
    """Of the thread that has nothing to do after an operator of two threads."""
    x, used = torch.ones(2**18), 0.0
    for _ in range(12):
        began = time.process_time()
        x.add_(1.0)
        time.sleep(0.02)
        used += time.process_time() - began
    return used


def test_a_waiting_thread_sleeps_while_the_team_is_kept_and_sums_stay_the_same() -> None:
    numbers = torch.randn(2**19 + 7)
    total, long = numbers.sum(), cpu_seconds_of_waiting()
    if long < 0.012:  # libgomp's 300,000 turns take 3 ms at least, twelve times
        pytest.skip("spins are short already: one CPU when PyTorch was loaded, or a busy machine")
    threads = len(nanoseconds_waited())
    team = SleepingTeam()
    short = cpu_seconds_of_waiting()
    assert torch.equal(numbers.sum(), total)
    assert torch.get_num_threads() == 2
    team.end()
    again = cpu_seconds_of_waiting()
    assert short < 0.25 * min(long, again)
    assert len(nanoseconds_waited()) <= threads
