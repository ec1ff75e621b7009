"""A whole step by kernels: loss, gradients, overflow, Matryoshka, and what waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.step.kernels.buffers import PairBuffers
from tests.step.kernels.cases import DEVICE, assert_three_way
from tests.step.problems import KINDS, encode, loss_of, problem
from tests.step.test_gradients import loss_and_gradients

BATCH, D_IN, D_SAE = 29, 19, 61


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind: str) -> None:
    p = problem(kind, torch.float32).to(device=DEVICE)
    truth = loss_and_gradients("dense", p.to(torch.float64))
    plain, fast = loss_and_gradients("dense", p), loss_and_gradients("triton", p)
    for name in truth:
        assert_three_way(fast[name], plain[name], truth[name])


def sae(step_kernel: str, **options: Any) -> JumpReLUTrainingSAE:
    torch.manual_seed(7)
    cfg = JumpReLUTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        target_l0=5.0,
        step_kernel=step_kernel,  # type: ignore[arg-type]
        device=DEVICE,
        **options,
    )
    made = JumpReLUTrainingSAE(cfg).to(DEVICE).train()
    # On other rows than those of the steps: a calibrated θ is the z of one of them, and rounding
    # would decide whether that pair is active.
    made.calibrate_if_needed(rows(100))
    return made


def rows(seed: int) -> Tensor:
    drawn = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(seed))
    return (2 * drawn + 0.3).to(DEVICE)


def train(made: JumpReLUTrainingSAE, steps: int) -> list[Tensor]:
    """What a few steps give, and then the parameters.

    Steps of SGD: Adam's first would make a whole step of the last bit of a small gradient.
    """
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    seen = []
    for step in range(steps):
        given = TrainStepInput(
            sae_in=rows(step),
            coefficients={"l0": 1e-2},
            dead_neuron_mask=None,
            n_training_steps=step,
            is_logging_step=False,
        )
        output = made.training_forward_pass(given)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += [output.loss.detach(), output.feature_acts.to_dense(), output.sae_out.detach()]
    return seen + [parameter.detach() for parameter in made.parameters()]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * float(b.abs().max()))


@pytest.mark.kernels
@pytest.mark.parametrize(
    "options", [{}, {"matryoshka_widths": [13, 29]}], ids=["plain", "matryoshka"]
)
def test_training_is_that_of_the_screened_step(options: dict[str, Any]) -> None:
    made = sae("triton", **options)
    found = train(made, 2)
    assert made.path_choice.current == "triton" and made.pair_buffers.capacity
    assert_same(found, train(sae("screened", **options), 2))


@pytest.mark.kernels
def test_a_step_that_overflows_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from jumprelu_plugin.step.kernels import buffers

    monkeypatch.setattr(buffers, "GRAIN", 1)
    made = sae("triton")
    made.pair_buffers.capacity = 7
    found = train(made, 1)
    assert made.pair_buffers.capacity > 100
    assert_same(found, train(sae("screened"), 1))


def test_forced_where_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from jumprelu_plugin.step import kernels

    monkeypatch.setattr(kernels, "available", lambda device: False)
    with pytest.raises(ValueError, match="step_kernel is 'triton'.*step_kernel='auto'"):
        train(sae("triton"), 1)


# Operators whose result's size depends on numbers on the device, and reads of single numbers.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "bincount"}


class Waits(TorchDispatchMode):
    """Records the operators for which a GPU's host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in _WAITS or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.kernels
def test_forward_and_backward_ask_the_device_for_nothing() -> None:
    p = problem("ordinary", torch.float32).to(device=DEVICE)
    leaves = p.leaves()
    with Waits() as waits:
        entries = encode("triton", p, leaves)
        loss_of(entries, p, leaves).backward()
    # `loss_of` includes a loss on dead latents, which asks how many are dead.
    assert set(waits.seen) <= {"_local_scalar_dense"} and len(waits.seen) <= 1


@pytest.mark.gpu
@pytest.mark.kernels
def test_no_operator_waits_for_the_device() -> None:
    """As PyTorch counts it, once Triton has timed its tiles and the buffers have their size."""
    made = sae("triton")
    train(made, 3)
    given = TrainStepInput(
        sae_in=torch.randn(BATCH, D_IN, device=DEVICE),
        coefficients={"l0": 1e-2},
        dead_neuron_mask=None,
        n_training_steps=3,
        is_logging_step=False,
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.training_forward_pass(given).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_buffer_is_one_dictionarys() -> None:
    assert sae("triton").pair_buffers is not sae("triton").pair_buffers
    assert PairBuffers().capacity == 0
