"""The dense product of a fast step, x @ W.T + b, by the fastest library on this machine.

PyTorch has two libraries for float32 products on a CPU, and uses BLAS (MKL) for plain products.
Which one is faster depends on the machine. Both compute in full float32, so the first product of
each shape times both on real data and later products use the faster one. On an AMD Zen 5 (AVX-512,
one thread, 4096 × 2304 × 16384) BLAS took 2.9 s and oneDNN 1.4 s.

A device may also compute float32 products in fewer bits if the user allows it (TF32). `rounding`
bounds the effect, for callers that compare a product with a threshold.
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

# The most by which rounding both operands changes a product, relative to their norms. A precision
# that is not in the table is treated as the coarsest.
_OPERAND_ROUNDING = {"none": 0.0, "ieee": 0.0, "tf32": 2.0**-9, "bf16": 2.0**-6}
_REPEATS = 3
_CHECKED_ROWS = 16


@dataclass(frozen=True)
class Choice:
    """The library for products of one shape.

    Attributes:
        backend: a name in `BACKENDS`.
        seconds_per_element: its time for each element of the result.
        elements: size of the result that was timed.
    """

    backend: str
    seconds_per_element: float
    elements: int


_choices: dict[tuple[object, ...], Choice] = {}


def linear(
    x: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "latents d_in"],
    bias: Float[Tensor, " latents"],
    out: Float[Tensor, "rows latents"] | None = None,
) -> Float[Tensor, "rows latents"]:
    """x @ weight.T + bias. The result may or may not be stored in `out`."""
    return BACKENDS[choice_for(x, weight, bias, out).backend](x, weight, bias, out)


def seconds(rows: int, d_in: int, latents: int) -> float | None:
    """Seconds a product of these sizes takes, from the largest tile timed; None if none was."""
    largest = _largest(d_in)
    return None if largest is None else largest.seconds_per_element * rows * latents


def backend(d_in: int) -> str | None:
    """The library that computes large products over `d_in`; None before the first product."""
    largest = _largest(d_in)
    return None if largest is None else largest.backend


def _largest(d_in: int) -> Choice | None:
    timed = [choice for key, choice in _choices.items() if key[-1] == d_in]
    return max(timed, key=lambda choice: choice.elements, default=None)


def rounding(x: Float[Tensor, "rows d_in"]) -> float:
    """Bound of |computed - exact| / (‖a‖‖w‖ + |b|) for a·w + b, where a is a row of `x`.

    The bound holds for any order of summation (Higham 2002, section 3.1), and allows for the
    rounding of the norms themselves.
    """
    terms = x.shape[1] + 8
    bound = 0.51 * terms * torch.finfo(x.dtype).eps
    if x.dtype == torch.float32:
        bound += _OPERAND_ROUNDING.get(_precision(x.device), max(_OPERAND_ROUNDING.values()))
    return bound


def _blas(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    return torch.addmm(bias, x, weight.t(), out=out)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    # The operator that torch.compile calls. It is not public, so `_agrees` checks it before use.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_layout(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    # The public interface to the same routine, which copies the result once more.
    return functional.linear(x.to_mkldnn(), weight, bias).to_dense()


BACKENDS: dict[str, Linear] = {
    "BLAS": _blas,
    "oneDNN": _onednn,
    "oneDNN with a copy": _onednn_layout,
}


def choice_for(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> Choice:
    """The fastest library for such a product, timed on these operands the first time."""
    settings = torch.get_num_threads(), _precision(x.device)
    size = len(x).bit_length(), len(weight).bit_length()
    key = (x.device, x.dtype, settings, size, x.shape[1])
    if key not in _choices:
        _choices[key] = _fastest(x, weight, bias, out)
    return _choices[key]


def _fastest(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> Choice:
    usable = {"BLAS": _blas}
    if x.device.type == "cpu" and x.dtype == torch.float32 and weight.is_contiguous():
        usable |= {
            name: multiply
            for name, multiply in BACKENDS.items()
            if _agrees(multiply, x, weight, bias)
        }
    seconds = {name: _seconds(multiply, x, weight, bias, out) for name, multiply in usable.items()}
    name = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{library} {1e3 * s:.2f} ms" for library, s in seconds.items())
    shape = f"{len(x)} × {x.shape[1]} × {len(weight)}"
    logger.info("encoder product: %s (%s for %s)", name, times, shape)
    elements = len(x) * len(weight)
    return Choice(name, seconds[name] / elements, elements)


def _seconds(
    multiply: Linear, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None
) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):
        synchronize(x.device)
        started = time.perf_counter()
        multiply(x, weight, bias, out)
        synchronize(x.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _agrees(multiply: Linear, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the library exists and its product agrees with BLAS's within rounding."""
    x = x[:_CHECKED_ROWS]  # a few rows, so that the check needs almost no memory
    expected = torch.addmm(bias, x, weight.t())
    try:
        result = multiply(x, weight, bias, torch.empty_like(expected))
    except (AttributeError, RuntimeError) as error:
        logger.info("a library for the encoder product fails: %s", str(error).splitlines()[0])
        return False
    norms = torch.linalg.vector_norm(x, dim=1)[:, None] * torch.linalg.vector_norm(weight, dim=1)
    allowed = 2 * rounding(x) * (norms + bias.abs())
    return bool(((result - expected).abs() <= allowed).all())


def _precision(device: torch.device) -> str:
    """The precision that the user allows for a float32 product on `device`."""
    if device.type == "cuda":
        settings = torch.backends.cuda.matmul
    else:
        settings = getattr(torch.backends.mkldnn, "matmul", None)
    try:
        return settings.fp32_precision  # type: ignore[union-attr] # PyTorch 2.9 and later
    except AttributeError:
        named = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
        return named[torch.get_float32_matmul_precision()]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
