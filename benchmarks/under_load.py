"""What a busy process on one of two cores costs training, with short spins and without them.

    python -m benchmarks.under_load            two shapes and a harvest, two minutes
    python -m benchmarks.under_load --quick    small sizes, to check that it runs

Two processes of two threads take turns, and each is measured undisturbed and beside a process that
keeps one core busy: one as this package is (`jumprelu_plugin.step.spinning`), one with libgomp's
own number of spins given by the user, which switches that off. Steps are the whole steps of
SAELens' trainer on the path that `auto` chose under the same condition; the harvest is the forward
pass of the embedded model. Needs Linux and two cores that nothing else uses.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "2"  # before PyTorch loads

import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.tables import RESULTS, terminal
from benchmarks.trainers import AUTO, TRAINERS, Shape
from jumprelu_plugin import load_model
from jumprelu_plugin.records import append_jsonl, provenance
from jumprelu_plugin.step import spinning

CASES: dict[str, Shape | None] = {
    "step at 256 × 2,048, batch 1,024": Shape(256, 2048, 1024, 32),
    "step at 576 × 8,192, batch 2,048": Shape(576, 8192, 2048, 40),
    "harvest, 8 sequences of 128": None,
}
SMALL: dict[str, Shape | None] = {"step at 16 × 64, batch 256": Shape(16, 64, 256, 4)}
HARVEST = (8, 128)
POLICIES = {"adapted": {}, "libgomp's own": {"GOMP_SPINCOUNT": "300000"}}
CHOOSING_STEPS = 13  # after them `auto` has chosen
TURNS = 5
SETTLING = 1.0  # seconds in which it adapts to what changed


class Worker:
    """A process that repeats one case at a time, under one policy."""

    def __init__(self, policy: str):
        self._pipe, its_end = multiprocessing.get_context("spawn").Pipe()
        for name in spinning.USER_SETTINGS:
            os.environ.pop(name, None)
        os.environ.update(POLICIES[policy])  # a new process reads it when it loads PyTorch
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(its_end,), daemon=True
        )
        self._process.start()

    def measure(self, *task: Any) -> dict[str, Any]:
        """What `_serve` answers to a task of its kind."""
        self._pipe.send(task)
        found = self._pipe.recv()
        if isinstance(found, BaseException):
            raise found
        return found

    def end(self) -> None:
        """Let the process end, which it does when nobody can ask it any more."""
        self._pipe.close()
        self._process.join(timeout=30)
        self._process.kill()


def _serve(pipe: Connection) -> None:
    """Answer tasks (case, shape, what is kept for the next one by this name, seconds before and
    within the measurement) until nobody asks."""
    kept: dict[tuple[str, str], tuple[Callable[[], object], int, str | None]] = {}
    with suppress(EOFError, BrokenPipeError):
        while True:
            case, shape, name, settling, seconds = pipe.recv()
            try:
                if (case, name) not in kept:
                    kept[case, name] = _prepare(shape)
                act, tokens, path = kept[case, name]
                _repeat(act, settling)
                rate = tokens * _repeat(act, seconds)
                short = spinning.SPINS.short
                pipe.send({"tokens_per_second": rate, "short_spins": short, "path": path})
            except Exception as error:
                pipe.send(error)


def _prepare(shape: Shape | None) -> tuple[Callable[[], object], int, str | None]:
    """What is repeated, the tokens of each time, and the path that was chosen."""
    torch.manual_seed(0)
    if shape is None:
        model = load_model()
        tokens = torch.randint(1, model.cfg.d_vocab, HARVEST)

        def harvest() -> None:
            spinning.adapt()
            with torch.no_grad():
                model(tokens, return_type=None)

        return harvest, tokens.numel(), None
    trainer: Any = TRAINERS[AUTO](shape)
    for _ in range(CHOOSING_STEPS):
        trainer.step()
    return trainer.step, shape.batch, trainer.sae.path_choice.current


def _repeat(act: Callable[[], object], seconds: float) -> float:
    """How often a second."""
    began, times = time.perf_counter(), 0
    while times < 2 or time.perf_counter() - began < seconds:
        act()
        times += 1
    return times / (time.perf_counter() - began)


@contextmanager
def busy_core(busy: bool) -> Iterator[None]:
    """A process that keeps this process's last core busy, if it shall."""
    if not busy:
        yield
        return
    loop = f"import os; os.sched_setaffinity(0, {{{max(os.sched_getaffinity(0))}}})\nwhile 1: pass"
    process = subprocess.Popen([sys.executable, "-S", "-c", loop])
    time.sleep(0.2)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(
    cases: dict[str, Shape | None], rounds: int, seconds: float
) -> Iterator[list[dict[str, Any]]]:
    """Of each case, its records under both policies, undisturbed and not, `rounds` times in turn.

    Args:
        seconds: of each policy under each condition of a round, in `TURNS` turns.
    """
    workers = {policy: Worker(policy) for policy in POLICIES}
    try:
        for case, shape in cases.items():
            found: dict[tuple[str, bool], dict[str, Any]] = {}
            for _ in range(rounds):
                for busy in (False, True):
                    with busy_core(busy):
                        for turn in range(TURNS):
                            for policy, worker in workers.items():
                                settling = SETTLING if turn == 0 else 0.0
                                task = (case, shape, f"busy {busy}", settling, seconds / TURNS)
                                one = worker.measure(*task)
                                about = {"case": case, "spins": policy, "busy_core": busy}
                                record = found.setdefault((policy, busy), about)
                                for name, value in one.items():
                                    record.setdefault(name, []).append(value)
            yield list(found.values())
    finally:
        for worker in workers.values():
            worker.end()


def show(records: list[dict[str, Any]]) -> Table:
    table = Table(title="tokens a second, two threads")
    for name in ("", "spins", "undisturbed", "one core busy", "share", "path"):
        table.add_column(name, justify="right" if name and name != "spins" else "left")
    by = {(r["case"], r["spins"], r["busy_core"]): r for r in records}
    for case, spins, busy in by:
        if busy:
            continue
        alone, beside = by[case, spins, False], by[case, spins, True]
        before, after = (statistics.median(r["tokens_per_second"]) for r in (alone, beside))
        paths = dict.fromkeys(path or "" for r in (alone, beside) for path in r["path"])
        table.add_row(
            case, spins, f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.2f}",
            " / ".join(paths),
        )  # fmt: skip
    return table


def main(
    quick: Annotated[bool, typer.Option(help="Small sizes, to check that it runs.")] = False,
    rounds: Annotated[int, typer.Option(help="Of all conditions.")] = 1,
    only: Annotated[str, typer.Option(help="The cases with this in their name.")] = "",
    seconds: Annotated[float, typer.Option(help="Of each condition in a round.")] = 3.0,
    output: Annotated[Path | None, typer.Option(help="Records are added to this file.")] = None,
) -> None:
    """Measure, print a table of each case, and add its records."""
    if not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2:
        raise typer.BadParameter("it needs Linux and two cores: one process is bound to one")
    if quick:
        rounds, seconds = 1, 0.3
    path, origin = output or RESULTS / f"under_load{'_quick' * quick}.jsonl", provenance(seed=0)
    cases = SMALL if quick else {name: shape for name, shape in CASES.items() if only in name}
    for records in measure(cases, rounds, seconds):
        for record in records:
            append_jsonl(path, {**record, "provenance": origin})
        terminal().print(show(records))


if __name__ == "__main__":
    typer.run(main)
