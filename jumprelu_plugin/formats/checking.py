"""Nothing counts as written before the target's own loader gives the same outputs.

An export is written into a folder beside its place, read back, compared, and only then moved.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jumprelu_plugin.records import provenance, write_json
from jumprelu_plugin.saes.parameters import Parameters

TOLERANCE = 1e-5  # largest relative error of outputs
RECORD_FILENAME = "export.json"

_INPUTS = 64
FEWEST_INPUTS = 8
# Inputs on which some latent lies this close to its threshold, relative to the norms that make its
# pre-activation, are left out: rounding alone decides there whether it fires. 16 float32 roundings.
_TOO_CLOSE = 1e-6

Encode = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_sae"]]
Forward = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_out"]]


@dataclass(frozen=True)
class Check:
    """How an export was compared.

    Attributes:
        loader: what read it back.
        inputs: random inputs compared.
        active: mean number of latents active on them.
        error: largest relative error of activations or outputs over the inputs.
    """

    loader: str
    inputs: int
    active: float
    error: float

    def __str__(self) -> str:
        return (
            f"read back with {self.loader}: largest relative error {self.error:.1e} on "
            f"{self.inputs} inputs, {self.active:.1f} latents active"
        )


@dataclass(frozen=True)
class Loader:
    """The tool that reads an export back.

    Attributes:
        what: its loading function, for people.
        module, distribution: how Python and pip call it.
        install: the command that installs it beside this package.
    """

    what: str
    module: str
    distribution: str
    install: str

    @property
    def installed(self) -> bool:
        return find_spec(self.module) is not None

    def __str__(self) -> str:
        try:
            return f"{self.what} ({self.distribution} {version(self.distribution)})"
        except PackageNotFoundError:
            return self.what

    def require(self) -> None:
        """Raises ImportError, saying what to do, when the tool is not installed."""
        if not self.installed:
            raise ImportError(
                f"{self.distribution} is not installed, so what is written could not be read back "
                f"with {self.what} and compared. Install it with: {self.install}\n"
                "Or write without the comparison: --unchecked"
            )


def is_export(folder: Path) -> bool:
    """Whether a folder holds an earlier export, which a new one may replace."""
    return (folder / RECORD_FILENAME).is_file()


def record(folder: Path, target: str, check: Check | None, **known: object) -> None:
    """Write what was exported, from where, and how it was compared, beside it."""
    write_json(
        folder / RECORD_FILENAME,
        {"target": target, "check": check, **known, "provenance": provenance()},
    )


def copy_in(source: Path, folder: Path) -> None:
    """Copy one file or folder into `folder`, under its own name."""
    if source.is_dir():
        shutil.copytree(source, folder / source.name)
    else:
        shutil.copy2(source, folder)


@torch.no_grad()
def compare(
    parameters: Parameters,
    encode: Encode,
    forward: Forward,
    loader: str,
    tolerance: float = TOLERANCE,
) -> Check:
    """Compare a loaded dictionary with the parameters it should have, computed in float64.

    Args:
        encode, forward: the loaded dictionary's latents and output; float32 in and out.

    Raises:
        ValueError: outputs differ by more than `tolerance`, or there was nothing to compare.
    """
    exact = parameters.to(torch.float64)
    x = random_inputs(parameters)
    x = x[far_from_thresholds(exact, x.double())]
    if len(x) < FEWEST_INPUTS:
        raise ValueError(
            f"{_INPUTS - len(x)} of {_INPUTS} random inputs put some latent so close to its "
            "threshold that rounding decides whether it fires, so nothing can be compared: are "
            "the dictionary's scales (W_enc, b_dec, threshold) what they should be?"
        )
    f = exact.encode(x.double())
    outputs = {"activations": (encode(x), f), "outputs": (forward(x), exact.decode(f, x.double()))}
    return agreement(loader, outputs, len(x), f, tolerance)


def agreement(
    loader: str,
    outputs: Mapping[str, tuple[Tensor, Tensor]],
    inputs: int,
    f: Float[Tensor, "*n d_sae"],
    tolerance: float,
) -> Check:
    """The check that (loaded, expected) pairs of outputs pass; f, the expected latents.

    Raises:
        ValueError: outputs differ by more than `tolerance`, relative.
    """
    errors = {name: relative_error(got.double(), want) for name, (got, want) in outputs.items()}
    for name, error in errors.items():
        if not error <= tolerance:
            raise ValueError(
                f"read back with {loader}, the {name} differ by {error:.1e} (relative), more than "
                f"{tolerance:.0e}: nothing was written"
            )
    active = float((f > 0).sum(-1).double().mean())
    return Check(loader, inputs, active, max(errors.values()))


def random_inputs(parameters: Parameters, seed: int = 0) -> Float[Tensor, "n d_in"]:
    """Random inputs that make latents fire: sums of three encoder directions, and noise."""
    generator = torch.Generator().manual_seed(seed)
    d_in, d_sae = parameters.W_enc.shape
    chosen = torch.randint(d_sae, (_INPUTS, 3), generator=generator)
    directions = parameters.W_enc.T[chosen]  # [n, 3, d_in]
    squared = directions.square().sum(-1)
    offset = parameters.b_enc[chosen]
    aim = 2 * parameters.threshold[chosen] + offset.abs() + squared.sqrt()
    amounts = torch.where(squared > 0, (aim - offset) / squared.clamp_min(1e-30), 0.0)
    x = (amounts[..., None] * directions).sum(1)
    noise = torch.randn(_INPUTS, d_in, generator=generator)
    x = x + 0.1 * noise * x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-3)
    return x + parameters.b_dec if parameters.subtracts_b_dec else x


def far_from_thresholds(exact: Parameters, x: Float[Tensor, "n d_in"]) -> Bool[Tensor, " n"]:
    """Inputs on which no latent's firing is for rounding to decide."""
    z = exact.pre_activations(x)
    norms = exact.W_enc.norm(dim=0)
    size = x.norm(dim=-1, keepdim=True) * norms + exact.b_enc.abs()
    if exact.subtracts_b_dec:
        size = size + exact.b_dec.norm() * norms
    return ((z - exact.threshold).abs() > _TOO_CLOSE * size).all(-1)


def relative_error(got: Float[Tensor, "*n d"], want: Float[Tensor, "*n d"]) -> float:
    """The largest ‖got − want‖ / ‖want‖ of any row."""
    if got.shape != want.shape:
        raise ValueError(f"read back with shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    difference = (got - want).norm(dim=-1)
    # A row of zeros must come back as zeros.
    return float((difference / want.norm(dim=-1).clamp_min(1e-30)).max())
