"""Comparison of an export, read back with its tool's loader, with the original dictionary.

An export is written to a temporary folder, read back and compared, and only then renamed into
place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from jumprelu_plugin.records import provenance, write_json
from jumprelu_plugin.saes.parameters import Parameters

# The largest relative error of activations and outputs that passes.
TOLERANCE = 1e-5
RECORD_FILENAME = "export.json"

_INPUTS = 64
# Where a pre-activation is this close to its threshold, relative to the norms of its factors,
# rounding decides whether the latent fires, and both are right. The margin is 16 float32 roundings.
_MARGIN = 1e-6
# More of them would leave little to compare. Trained SAEs had 2e-5 to 3e-4.
_MOST_UNDECIDED = 0.01

Encode = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_sae"]]
Forward = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_out"]]


@dataclass(frozen=True)
class Check:
    """The result of a comparison that passed.

    Attributes:
        loader: the loader that read the export.
        inputs: number of random inputs.
        active: mean number of active latents on them.
        error: the largest relative error of activations and outputs.
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
    """The loader of the tool that a format belongs to.

    Attributes:
        name: the loading function, for messages.
        module, distribution: the tool's names in Python and in pip.
        install: the command that installs it in this package's environment.
    """

    name: str
    module: str
    distribution: str
    install: str

    @property
    def installed(self) -> bool:
        """Whether the tool can be imported."""
        return find_spec(self.module) is not None

    def __str__(self) -> str:
        try:
            return f"{self.name} ({self.distribution} {version(self.distribution)})"
        except PackageNotFoundError:
            return self.name

    def require(self) -> None:
        """Check that the tool is installed.

        Raises:
            ImportError: it is not; the message says how to install it.
        """
        try:
            import_module(self.module)
        except ImportError as error:  # the tool itself, or what it needs and does not declare
            raise ImportError(
                f"{self.distribution} cannot be imported ({error}), so the export cannot be read "
                f"back with {self.name} and compared. Install it with: {self.install}\n"
                "Or write without the comparison: --unchecked"
            ) from error


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export, which another export may replace."""
    return (folder / RECORD_FILENAME).is_file()


def write_record(folder: Path, target: str, check: Check | None, **fields: object) -> None:
    """Write the target, the comparison, the given fields and the provenance to export.json."""
    write_json(
        folder / RECORD_FILENAME,
        {"target": target, "check": check, **fields, "provenance": provenance()},
    )


def copy_in(source: Path, folder: Path) -> None:
    """Copy one file or folder into `folder`, under its own name."""
    if source.is_dir():
        shutil.copytree(source, folder / source.name)
    else:
        shutil.copy2(source, folder)


@torch.no_grad()
def compare_dictionary(
    parameters: Parameters,
    encode: Encode,
    forward: Forward,
    loader: str,
    tolerance: float = TOLERANCE,
) -> Check:
    """Compare a loaded dictionary in float32 with its parameters in float64, on random inputs.

    Args:
        parameters: the original parameters.
        encode, forward: the loaded dictionary's functions for activations and outputs.
        loader: name of the loader, for messages.
        tolerance: the largest relative error that passes.

    Raises:
        ValueError: activations or outputs differ by more than `tolerance`, or rounding decides of
            too many activations whether the latent fires.
    """
    exact = parameters.to(torch.float64)
    x = random_inputs(parameters)
    loaded = encode(x)
    f = expected_activations(exact, x.double(), loaded)
    outputs = {"activations": (loaded, f), "outputs": (forward(x), exact.decode(f, x.double()))}
    return compare_outputs(loader, outputs, len(x), f, tolerance)


def compare_outputs(
    loader: str,
    outputs: Mapping[str, tuple[Tensor, Tensor]],
    inputs: int,
    f: Float[Tensor, "*n d_sae"],
    tolerance: float,
) -> Check:
    """Compare pairs of loaded and expected outputs.

    Args:
        loader: name of the loader, for messages.
        outputs: pairs (loaded, expected) by name.
        inputs: number of inputs they were computed from.
        f: the expected activations.
        tolerance: the largest relative error that passes.

    Raises:
        ValueError: a pair differs by more than `tolerance`.
    """
    errors = {
        name: relative_error(loaded.double(), expected)
        for name, (loaded, expected) in outputs.items()
    }
    for name, error in errors.items():
        if not error <= tolerance:
            raise ValueError(
                f"read back with {loader}, the {name} differ by {error:.1e} (relative), more than "
                f"{tolerance:.0e}: nothing was written"
            )
    active = float((f > 0).sum(-1).double().mean())
    return Check(loader, inputs, active, max(errors.values()))


def random_inputs(parameters: Parameters, seed: int = 0) -> Float[Tensor, "n d_in"]:
    """Random inputs on which latents fire: sums of three encoder directions, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    d_in, d_sae = parameters.W_enc.shape
    latents = torch.randint(d_sae, (_INPUTS, 3), generator=generator)
    directions = parameters.W_enc.T[latents]  # [n, 3, d_in]
    squared = directions.square().sum(-1)
    offset = parameters.b_enc[latents]
    pre_activation = 2 * parameters.threshold[latents] + offset.abs() + squared.sqrt()
    amounts = torch.where(squared > 0, (pre_activation - offset) / squared.clamp_min(1e-30), 0.0)
    x = (amounts[..., None] * directions).sum(1)
    noise = torch.randn(_INPUTS, d_in, generator=generator)
    x = x + 0.1 * noise * x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-3)
    return x + parameters.b_dec if parameters.subtracts_b_dec else x


def expected_activations(
    exact: Parameters, x: Float[Tensor, "n d_in"], loaded: Float[Tensor, "n d_sae"]
) -> Float[Tensor, "n d_sae"]:
    """The activations of `x` in float64; where rounding decides if a latent fires, as in `loaded`.

    Raises:
        ValueError: rounding decides it in more than a hundredth of them, or `loaded` has another
            shape.
    """
    z = exact.pre_activations(x)
    require_shape(loaded, z)
    norms = exact.W_enc.norm(dim=0)
    size = x.norm(dim=-1, keepdim=True) * norms + exact.b_enc.abs()
    if exact.subtracts_b_dec:
        size = size + exact.b_dec.norm() * norms
    undecided = (z - exact.threshold).abs() <= _MARGIN * size
    share = float(undecided.double().mean())
    if share > _MOST_UNDECIDED:
        raise ValueError(
            f"the export cannot be compared: {share:.1%} of the pre-activations of random inputs "
            "are so close to their thresholds that rounding decides whether the latent fires. "
            "Check the scales of W_enc, b_dec and threshold"
        )
    fires = torch.where(undecided, loaded > 0, z > exact.threshold)
    return torch.relu(z) * fires


def relative_error(loaded: Float[Tensor, "*n d"], expected: Float[Tensor, "*n d"]) -> float:
    """The largest ‖loaded - expected‖ / ‖expected‖ of any row.

    Raises:
        ValueError: the shapes differ.
    """
    require_shape(loaded, expected)
    difference = (loaded - expected).norm(dim=-1)
    # The clamp makes any difference from an expected row of zeros a large error.
    return float((difference / expected.norm(dim=-1).clamp_min(1e-30)).max())


def require_shape(loaded: Tensor, expected: Tensor) -> None:
    """Check that both have one shape.

    Raises:
        ValueError: they have not.
    """
    if loaded.shape != expected.shape:
        raise ValueError(
            f"read back with shape {tuple(loaded.shape)}, expected {tuple(expected.shape)}"
        )
