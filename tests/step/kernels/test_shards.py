"""Steps by kernels on several processes, by all or by one of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE
from jumprelu_plugin.training.distributed.gathering import gather_whole
from jumprelu_plugin.training.distributed.mesh import Mesh
from jumprelu_plugin.training.distributed.sharded_sae import shard_of
from tests.step.kernels.cases import DEVICE
from tests.training.distributed.processes import grouped, run_on
from tests.training.distributed.test_steps import batches, config, result, train

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(DEVICE == "cuda", reason="these processes exchange tensors of a CPU"),
]
# Few: an interpreted kernel takes a millisecond for every block.
STEPS, TOKENS = 3, 2 * 17


def source() -> Iterator[Tensor]:
    return (rows[:TOKENS] for rows in batches(torch.float32))


@grouped
def one_place(sizes: tuple[int, int], kernels: tuple[str, ...], room: int | None) -> Any:
    """Training on one process of a mesh; the last one has at first no more `room` than this."""
    from jumprelu_plugin.step.kernels import buffers

    torch.manual_seed(0)
    mesh = Mesh(*sizes)
    rank = torch.distributed.get_rank()
    shard = shard_of(config(step_kernel=kernels[rank]), mesh)
    steps_computed = []
    if room is not None and rank == len(kernels) - 1:
        buffers.GRAIN = 1
        shard.pair_buffers.capacity = room
    encode = shard._encode
    shard._encode = lambda *given: steps_computed.append(1) or encode(*given)  # type: ignore[method-assign]
    found = train(shard, STEPS, source())
    whole = gather_whole(shard)
    return found, len(steps_computed), None if whole is None else result(whole)


def one_process() -> tuple[list[tuple[float, ...]], dict[str, Tensor]]:
    torch.manual_seed(0)
    sae = JumpReLUTrainingSAE(config())
    return train(sae, STEPS, source()), result(sae)


@pytest.mark.parametrize(
    ("sizes", "kernels", "room"),
    [
        ((1, 2), ("sparse", "triton"), None),
        ((1, 2), ("triton", "triton"), 7),
        ((2, 1), ("screened", "triton"), 7),
    ],
    ids=["latents, one by kernels", "latents, one overflows", "tokens, one overflows"],
)
def test_processes_train_as_one(
    sizes: tuple[int, int],
    kernels: tuple[str, ...],
    room: int | None,
    tmp_path: Path,
    one_thread: None,
) -> None:
    expected, weights = one_process()
    places = run_on(2, one_place, tmp_path, sizes, kernels, room)
    for found, computed, _ in places:
        # An overflow in one process is every process's reason to compute the step again.
        assert computed == STEPS + (room is not None)
        for values, others in zip(found, expected, strict=True):
            assert values == pytest.approx(others, rel=1e-5)
    for name, value in places[0][2].items():
        assert (value - weights[name]).abs().max() <= 1e-5 * weights[name].abs().max(), name
