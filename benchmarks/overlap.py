"""What splitting a batch over two processes costs, and what is saved by exchanging gradients early.

    OMP_NUM_THREADS=1 python -m benchmarks.overlap            (576, 8192), 2 x 1,024 tokens
    OMP_NUM_THREADS=1 python -m benchmarks.overlap --quick    small sizes, to check that it runs

Two gloo processes on this machine take steps in three ways, in turns: gradients exchanged while the
backward pass goes on, all of them after it, and not at all, which is no training but has the
same work.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from benchmarks.together import KERNEL, rows
from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.records import append_jsonl, provenance
from jumprelu_plugin.training.distributed.mesh import Group, Mesh
from jumprelu_plugin.training.distributed.sharded_sae import ShardOfSAE, shard_of

RESULTS = Path(__file__).parent / "results" / "overlap.jsonl"
PROCESSES, WARM_UP = 2, 4


def afterwards(group: Group, values: Tensor) -> Callable[[], Any]:
    """As `Group.start_sum`, but the sum is only taken where it is waited for."""
    return partial(group.sum_in_place, values)


def never(group: Group, values: Tensor) -> Callable[[], Any]:
    """Exchange nothing."""
    return lambda: None


WAYS = {"beside": Group.start_sum, "afterwards": afterwards, "never": never}


def step(shard: ShardOfSAE, optimizer: torch.optim.Optimizer, batch: Tensor, number: int) -> None:
    """One step of SAELens' trainer."""
    own = shard.processes.mesh.tokens_of(batch)
    output = shard.train().training_forward_pass(
        TrainStepInput(own, {"l0": 1.0}, None, number, False)
    )
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(rank: int, port: int, sizes: tuple[int, int, int], rounds: int, folder: str) -> None:
    """Times of each way on one process, which pins itself to a core of its own."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(PROCESSES), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    d_in, d_sae, tokens = sizes
    torch.manual_seed(0)
    cfg = DEFAULT.sae_config(d_in, d_sae, target_l0=40, step_kernel=KERNEL)
    shard = shard_of(cfg, Mesh(PROCESSES, 1))
    optimizer = torch.optim.Adam(shard.parameters(), lr=1e-3)
    data = rows(d_in, 4 * PROCESSES * tokens).split(PROCESSES * tokens)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    usual = Group.start_sum
    for number, name in enumerate(["beside"] * WARM_UP + list(WAYS) * rounds):
        Group.start_sum = WAYS[name]
        dist.barrier()
        started = time.perf_counter()
        step(shard, optimizer, data[number % len(data)], number)
        if number >= WARM_UP:
            found[name].append(time.perf_counter() - started)
    Group.start_sum = usual
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def main(
    quick: Annotated[bool, typer.Option(help="Small sizes, to check that it runs.")] = False,
    rounds: Annotated[int, typer.Option(help="Steps of each way.")] = 25,
    output: Annotated[Path | None, typer.Option(help="Records are added to this file.")] = None,
) -> None:
    """Time the three ways and add one record."""
    sizes = (48, 512, 128) if quick else (576, 8192, 1024)
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        arguments = (port, sizes, 2 if quick else rounds, folder)
        start_processes(measure, arguments, PROCESSES, start_method="fork")
        times = torch.load(Path(folder, "0.pt"), weights_only=True)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print({name: f"{1e3 * seconds:.1f} ms" for name, seconds in medians.items()})
    d_in, d_sae, tokens = sizes
    record = {"d_in": d_in, "d_sae": d_sae, "tokens_each": tokens, "processes": PROCESSES}
    append_jsonl(
        output or (RESULTS.with_stem("overlap_quick") if quick else RESULTS),
        {**record, "seconds": times, "medians": medians, "provenance": provenance(seed=0)},
    )


if __name__ == "__main__":
    typer.run(main)
