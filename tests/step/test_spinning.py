"""Waiting threads: when their spins are made short, and that they are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from jumprelu_plugin.step import spinning
from jumprelu_plugin.step.spinning import SleepingTeam, Spins, nanoseconds_run_and_waited

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
        self.now = 17.0
        self.times = {"3": (7_000_000_000, 5_000_000_000), "7": (13, 11)}  # ran, waited
        monkeypatch.setattr("jumprelu_plugin.step.spinning.time.monotonic", lambda: self.now)
        self.spins = Spins(lambda: dict(self.times))

    def pass_time(self, seconds: float, waiting: float, working: float = 0.9) -> bool:
        """A little at a time, with one thread working and waiting for these shares of it: are spins
        short?"""
        for _ in range(round(seconds / 0.13)):
            self.now += 0.13
            ran, waited = self.times["7"]
            self.times["7"] = ran + round(0.13e9 * working), waited + round(0.13e9 * waiting)
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
    del machine.times["3"]
    assert machine.pass_time(2, 0.4)


def test_a_pause_is_no_sign_of_a_free_cpu(machine: Machine) -> None:
    assert machine.pass_time(2, 0.7)
    assert machine.pass_time(9, 0.0, working=0.0)
    machine.now += 31.0  # by the clock, nearly nobody waited in this time
    assert machine.pass_time(0.3, 0.7)
    assert not machine.pass_time(3, 0.01)


def test_with_many_threads_one_that_waits_is_enough(machine: Machine) -> None:
    torch.set_num_threads(64)
    assert not machine.pass_time(4, 0.01, working=0.99)  # and 63 that have nothing to do
    assert machine.pass_time(2, 0.5, working=0.5)


def test_what_waits_in_a_pause_is_no_sign_of_a_busy_cpu(machine: Machine) -> None:
    assert not machine.pass_time(2, 0.0)
    assert not machine.pass_time(19, 0.001, working=0.01)
    assert not machine.pass_time(2, 0.0)


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
    first = nanoseconds_run_and_waited()
    assert first[str(os.getpid())][0] > 0 and min(map(min, first.values())) >= 0
    later = nanoseconds_run_and_waited()
    for thread in first.keys() & later.keys():
        assert later[thread][0] >= first[thread][0] and later[thread][1] >= first[thread][1]


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
    threads = len(nanoseconds_run_and_waited())
    team = SleepingTeam()
    short = cpu_seconds_of_waiting()
    assert torch.equal(numbers.sum(), total)
    assert torch.get_num_threads() == 2
    team.end()
    again = cpu_seconds_of_waiting()
    assert short < 0.25 * min(long, again)
    assert len(nanoseconds_run_and_waited()) <= threads
