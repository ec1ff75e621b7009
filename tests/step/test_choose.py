"""The choice of the step's kernel: what is timed, when, and what is kept."""

from __future__ import annotations

import pytest
import torch

from jumprelu_plugin.step.choose import PathChoice


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 17.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("jumprelu_plugin.step.choose.time.perf_counter", clock)
    return clock


def run_steps(
    choice: PathChoice, clock: Clock, steps: int, density: float, seconds: dict[str, float]
) -> list[str]:
    """Take steps whose time depends on the path; return the paths taken."""
    taken = []
    for _ in range(steps):
        path = choice.start(torch.device("cpu"))
        clock.now += seconds[path]
        choice.finish(density)
        taken.append(path)
    return taken


@pytest.mark.parametrize("fastest", ["sparse", "screened", "dense"])
def test_auto_times_every_kernel_and_keeps_the_fastest(clock: Clock, fastest: str) -> None:
    choice = PathChoice("auto")
    seconds = {"sparse": 1.9, "screened": 1.7, "dense": 2.3, fastest: 0.7}
    assert set(run_steps(choice, clock, 12, 0.03, seconds)) == {"sparse", "screened", "dense"}
    assert set(run_steps(choice, clock, 5, 0.03, seconds)) == {fastest}


def test_the_first_step_of_a_path_is_not_counted(clock: Clock) -> None:
    choice = PathChoice("auto")
    slow_start = {"sparse": 90.0, "screened": 1.7, "dense": 2.3}
    run_steps(choice, clock, 1, 0.03, slow_start)
    run_steps(choice, clock, 11, 0.03, {**slow_start, "sparse": 0.7})
    assert choice.current == "sparse"


def test_steps_that_lost_their_core_do_not_decide(clock: Clock) -> None:
    """Two of three timed steps of the best path, and one of the others, met a busy machine."""
    choice = PathChoice("auto")
    needs = {"sparse": 0.7, "screened": 1.1, "dense": 2.3}
    disturbed = {"sparse": (1, 3), "screened": (2,), "dense": (2,)}
    taken = dict.fromkeys(needs, 0)
    for _ in range(12):
        path = choice.start(torch.device("cpu"))
        clock.now += needs[path] * (16 if taken[path] in disturbed[path] else 1)
        taken[path] += 1
        choice.finish(0.03)
    assert taken == {"sparse": 4, "screened": 4, "dense": 4}
    assert choice.current == "sparse"


def test_paths_are_timed_again_when_density_has_halved_and_not_before(clock: Clock) -> None:
    choice = PathChoice("auto")
    run_steps(choice, clock, 12, 0.2, {"sparse": 3.1, "screened": 3.3, "dense": 2.3})
    assert choice.current == "dense"
    now = {"sparse": 1.1, "screened": 0.9, "dense": 2.3}
    assert set(run_steps(choice, clock, 5, 0.13, now)) == {"dense"}
    run_steps(choice, clock, 9, 0.07, now)
    assert choice.current == "screened"


@pytest.mark.parametrize(("product_seconds", "tried"), [(0.3, False), (0.1, True), (None, True)])
def test_dense_is_tried_only_where_its_products_leave_room(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, product_seconds: float | None, tried: bool
) -> None:
    requested = []

    def seconds(*sizes: int) -> float | None:
        requested.append(sizes)
        return product_seconds

    monkeypatch.setattr("jumprelu_plugin.step.choose.product.seconds", seconds)
    choice = PathChoice("auto")
    took = {"sparse": 1.3, "screened": 1.1, "dense": 0.9}
    paths = []
    for _ in range(15):
        paths.append(choice.start(torch.device("cpu"), (37, 23, 101)))
        clock.now += took[paths[-1]]
        choice.finish(0.03)
    assert ("dense" in paths) == tried
    assert choice.current == ("dense" if tried else "screened")
    assert set(requested) == {(37, 23, 101)}


def test_the_choice_and_its_reasons_are_logged(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="jumprelu_plugin.step.choose"):
        run_steps(PathChoice("screened"), clock, 3, 0.03, {"screened": 1.0})
        run_steps(
            PathChoice("auto"), clock, 13, 0.03, {"sparse": 0.31, "screened": 0.47, "dense": 2.3}
        )
    forced, chosen = (record.getMessage() for record in caplog.records)
    assert forced == "step path: screened, as configured"
    assert chosen.startswith("step path: sparse at 3 % density (sparse 310.0 ms, screened 470.0 ms")


@pytest.mark.parametrize("forced", ["sparse", "screened", "dense"])
def test_a_forced_path_is_taken_whatever_it_costs(clock: Clock, forced: str) -> None:
    seconds = {"sparse": 1.0, "screened": 1.0, "dense": 1.0, forced: 50.0}
    assert set(run_steps(PathChoice(forced), clock, 13, 0.03, seconds)) == {forced}


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast'.*auto, sparse, screened, triton, dense"):
        PathChoice("fast")


@pytest.mark.parametrize(("device", "tried"), [("cuda", True), ("cpu", False)])
def test_kernels_are_timed_on_a_gpu_alone(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, device: str, tried: bool
) -> None:
    monkeypatch.setattr("jumprelu_plugin.step.choose.kernels.available", lambda device: True)
    monkeypatch.setattr("jumprelu_plugin.step.choose.product.synchronize", lambda device: None)
    choice, paths = PathChoice("auto"), []
    for _ in range(23):
        paths.append(choice.start(torch.device(device), (37, 23, 101)))
        clock.now += {"sparse": 0.7, "screened": 0.5, "triton": 0.3, "dense": 2.9}[paths[-1]]
        choice.finish(0.03)
    assert ("triton" in paths) == tried
    assert choice.current == ("triton" if tried else "screened")


def test_a_slow_beginning_slows_every_path_alike(clock: Clock) -> None:
    """A process that takes a core: steps are slow until the spins of waiting threads are short."""
    choice = PathChoice("auto")
    needs = {"sparse": 0.7, "screened": 1.1, "dense": 2.3}
    for step in range(12):
        path = choice.start(torch.device("cpu"))
        clock.now += needs[path] * (16 if step < 5 else 1)
        choice.finish(0.03)
    assert choice.current == "sparse"
