"""Rounding as on another processor: what `pytest --perturb` changes, and how.

    python -m pytest --perturb order:1 FILE    # every product and sum is taken in another order
    python -m pytest --perturb avx2 FILE       # the vector units of an older processor
    python -m pytest --perturb scalar FILE     # none at all

Processors differ in the order in which they add: in how many registers a sum is kept, and where a
matrix is cut into blocks. `order:SEED` permutes what is summed over, by a permutation that depends
on the seed and the length alone, before PyTorch's own kernel runs. So two equal computations stay
equal to the bit, as on any one machine, a sum that is exact stays exact, and everything else
differs from the unperturbed result by what rounding makes of it. Another seed is another machine.

`avx2` and `scalar` make PyTorch, MKL and oneDNN choose the code that they choose on such a
processor; elementary functions round differently there too. They read their settings before
`import torch`, so pytest starts itself again. `order` acts in this process, in every thread and in
backward passes, and not in processes that a test starts.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

PROCESSORS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "scalar": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}
# Copies of larger tensors would be what a test of memory finds.
LARGEST_SUM = 1 << 22
# Operator, position of the left factor, of the right one.
PRODUCTS = [("mm", 0, 1), ("bmm", 0, 1), ("addmm", 1, 2), ("baddbmm", 1, 2), ("addmv", 1, 2)]
SUMS = ["sum.dim_IntList", "sum.IntList_out", "mean.dim", "mean.out"]

_library: torch.library.Library | None = None


def apply(kind: str, config: pytest.Config) -> None:
    """Perturb this pytest run.

    Raises:
        pytest.UsageError: `kind` is neither a processor nor `order:SEED`.
    """
    if kind in PROCESSORS:
        restart_on(PROCESSORS[kind], config)
        return
    name, _, seed = kind.partition(":")
    if name != "order" or not seed.isdecimal():
        expected = ", ".join(["order:SEED (as in order:1)", *PROCESSORS])
        raise pytest.UsageError(f"--perturb {kind}: expected one of {expected}")
    sum_in_another_order(int(seed))


def restart_on(settings: dict[str, str], config: pytest.Config) -> None:
    """Replace this process by the same pytest under other settings, unless it has them already."""
    if settings.items() <= os.environ.items():
        return
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()  # else the new process writes where no one reads
    os.environ.update(settings)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *config.invocation_params.args])


def sum_in_another_order(seed: int) -> None:
    """Put a permutation before PyTorch's CPU kernels of products, sums and means, for good."""
    global _library
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, left, right in PRODUCTS:
            overloads = [name, f"{name}.out"] + [f"{name}_"] * name.startswith(("add", "badd"))
            for overload in overloads:
                _override(overload, _permuted_product(seed, left, right), "CPU")
        _override("sparse_sampled_addmm", _permuted_product(seed, 1, 2), "SparseCsrCPU")
        for overload in SUMS:
            _override(overload, _permuted_sum(seed), "CPU")


def _override(name: str, arguments: Callable[..., tuple], key: str) -> None:
    kernel = torch.library.get_kernel(f"aten::{name}", key)

    def call(keys: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        return kernel.call_boxed(keys, *arguments(*args), **kwargs)

    assert _library is not None
    _library.impl(name, call, key, with_keyset=True)


@cache
def permutation(length: int, seed: int) -> torch.Tensor:
    """A permutation of range(length), the same for the same length and seed."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + length)
    return torch.randperm(length, generator=generator)


def _permuted_product(seed: int, left: int, right: int) -> Callable[..., tuple]:
    def arguments(*args: Any) -> tuple:
        a, b = args[left], args[right]
        # [m, k] @ [k, n], [b, m, k] @ [b, k, n] or [m, k] @ [k]: the axis that is summed over.
        order = permutation(a.shape[-1], seed)
        changed = list(args)
        changed[left] = a.index_select(-1, order)
        changed[right] = b.index_select(max(b.dim() - 2, 0), order)
        return tuple(changed)

    return arguments


def _permuted_sum(seed: int) -> Callable[..., tuple]:
    def arguments(x: torch.Tensor, dim: Any = None, *rest: Any) -> tuple:
        if x.is_floating_point() and 0 < x.numel() <= LARGEST_SUM:
            for axis in dim or range(x.dim()):
                x = x.index_select(axis, permutation(x.shape[axis], seed))
        return (x, dim, *rest)

    return arguments
