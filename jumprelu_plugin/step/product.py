"""The one dense product of a fast step, x @ W.T + b, through the library that is fastest here.

PyTorch carries two libraries for float32 products on a CPU, and sends plain ones to BLAS (MKL).
Which one is faster is for the machine to say. Both compute in full float32, so the first product of
each shape times both on real data and the rest take the winner. On an AMD Zen 5 (AVX-512, one
thread, 4096 × 2304 × 16384) BLAS took 2.9 s and oneDNN 1.4 s.

A device may also compute float32 products in fewer bits, when the user allows it (TF32).
`rounding` says what that can change, for whoever compares a result with a threshold.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)

Linear = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

# By how much, at most, rounding both operands changes a product, relative to their norms; a
# precision that is not in the table counts as the coarsest.
_OPERAND_ROUNDING = {"none": 0.0, "ieee": 0.0, "tf32": 2.0**-9, "bf16": 2.0**-6}
_REPEATS = 3
_CHECKED_ROWS = 16


@dataclass(frozen=True)
class _Choice:
    backend: str
    seconds_per_element: float
    elements: int


_choices: dict[tuple[object, ...], _Choice] = {}


def linear(
    x: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "latents d_in"],
    bias: Float[Tensor, " latents"],
    out: Float[Tensor, "rows latents"] | None = None,
) -> Float[Tensor, "rows latents"]:
    """x @ weight.T + bias. The result may or may not lie in `out`."""
    return _BACKENDS[_choice(x, weight, bias, out).backend](x, weight, bias, out)


def seconds(rows: int, d_in: int, latents: int) -> float | None:
    """How long a product of these sizes takes, from the largest tile timed; None if none was."""
    largest = _largest(d_in)
    return None if largest is None else largest.seconds_per_element * rows * latents


def backend(d_in: int) -> str | None:
    """The library that large products over `d_in` go through; None before the first of them."""
    largest = _largest(d_in)
    return None if largest is None else largest.backend


def _largest(d_in: int) -> _Choice | None:
    timed = [choice for key, choice in _choices.items() if key[-1] == d_in]
    return max(timed, key=lambda choice: choice.elements, default=None)


def rounding(x: Float[Tensor, "rows d_in"]) -> float:
    """Bound of |computed - exact| / (‖a‖‖w‖ + |b|) for a·w + b, a being a row of `x`.

    The sum may be taken in any order (Higham 2002, section 3.1); there is room for what the
    computation of the norms rounds away.
    """
    terms = x.shape[1] + 8
    bound = 0.51 * terms * torch.finfo(x.dtype).eps
    if x.dtype == torch.float32:
        bound += _OPERAND_ROUNDING.get(_precision(x.device), max(_OPERAND_ROUNDING.values()))
    return bound


def _by_blas(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    return torch.addmm(bias, x, weight.t(), out=out)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    # The operator that torch.compile calls; not a public name, so `_agree` has to pass first.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_onednn_layout(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    # The public way to the same routine, with one more copy of the result.
    return functional.linear(x.to_mkldnn(), weight, bias).to_dense()


_BACKENDS: dict[str, Linear] = {
    "BLAS": _by_blas,
    "oneDNN": _by_onednn,
    "oneDNN with a copy": _by_onednn_layout,
}


def _choice(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> _Choice:
    settings = torch.get_num_threads(), _precision(x.device)
    size = len(x).bit_length(), len(weight).bit_length()
    key = (x.device, x.dtype, settings, size, x.shape[1])
    if key not in _choices:
        _choices[key] = _fastest(x, weight, bias, out)
    return _choices[key]


def _fastest(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> _Choice:
    usable = {"BLAS": _by_blas}
    if x.device.type == "cpu" and x.dtype == torch.float32 and weight.is_contiguous():
        usable |= {name: way for name, way in _BACKENDS.items() if _agree(way, x, weight, bias)}
    took = {name: _seconds(way, x, weight, bias, out) for name, way in usable.items()}
    name = min(took, key=took.__getitem__)
    times = ", ".join(f"{library} {1e3 * s:.2f} ms" for library, s in took.items())
    shape = f"{len(x)} × {x.shape[1]} × {len(weight)}"
    logger.info("encoder product: %s (%s for %s)", name, times, shape)
    elements = len(x) * len(weight)
    return _Choice(name, took[name] / elements, elements)


def _seconds(way: Linear, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> float:
    took = []
    for _ in range(_REPEATS + 1):
        _wait(x.device)
        started = time.perf_counter()
        way(x, weight, bias, out)
        _wait(x.device)
        took.append(time.perf_counter() - started)
    return min(took[1:])


def _agree(way: Linear, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether a library is there, and its product is as near to BLAS's as rounding allows."""
    x = x[:_CHECKED_ROWS]  # of a tile, so that the check takes no memory to speak of
    expected = torch.addmm(bias, x, weight.t())
    try:
        found = way(x, weight, bias, torch.empty_like(expected))
    except (AttributeError, RuntimeError) as problem:
        logger.info("a library for the encoder product fails: %s", str(problem).splitlines()[0])
        return False
    norms = torch.linalg.vector_norm(x, dim=1)[:, None] * torch.linalg.vector_norm(weight, dim=1)
    allowed = 2 * rounding(x) * (norms + bias.abs())
    return bool(((found - expected).abs() <= allowed).all())


def _precision(device: torch.device) -> str:
    """What the user allows a float32 product on `device` to be computed in."""
    if device.type == "cuda":
        settings = torch.backends.cuda.matmul
    else:
        settings = getattr(torch.backends.mkldnn, "matmul", None)
    try:
        return settings.fp32_precision  # type: ignore[union-attr] # PyTorch 2.9 and later
    except AttributeError:
        named = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
        return named[torch.get_float32_matmul_precision()]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
