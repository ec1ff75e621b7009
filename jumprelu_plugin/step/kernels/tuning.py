"""Tile sizes of the kernels: several for Triton to time on a GPU, one in its interpreter.

Triton times them at the first call with new sizes of the matrices and keeps the fastest. The number
of pairs, which changes at every step, is no reason to time them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton

from jumprelu_plugin.step.kernels import interpreted

# Triton's decorator, whose types know neither compile-time arguments nor launch options.
jit: Any = triton.jit


def tiles(
    key: Sequence[str],
    interpreter: dict[str, int],
    *compiled: tuple[dict[str, int], int, int],
    zeroed: Sequence[str] = (),
) -> Callable[[Any], Any]:
    """A decorator that gives a kernel its tile sizes.

    Args:
        key: the arguments whose new values are a reason to time again.
        interpreter: the sizes in the interpreter: small, so that tests meet several tiles.
        compiled: the sizes to time on a GPU, each with its warps and pipeline stages.
        zeroed: arguments that the kernel adds to, set to zero before each timed call.
    """
    if interpreted():
        configs = [triton.Config(interpreter)]
    else:
        configs = [
            triton.Config(sizes, num_warps=warps, num_stages=stages)
            for sizes, warps, stages in compiled
        ]
    return triton.autotune(configs=configs, key=list(key), reset_to_zero=list(zeroed))
