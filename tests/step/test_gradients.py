"""Loss and gradients of the step, by every kernel, against a float64 reference.

Tolerances follow the three-way rule: a kernel's error against the reference is at most twice that
of the dense definition in the same dtype.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.step.dense import encode_dense
from tests.step.problems import CHUNKS, KINDS, PRE_ACT, Problem, encode, loss_of, problem


def loss_and_gradients(path: str, p: Problem, chunk: int = 10**9) -> dict[str, Tensor]:
    leaves = p.leaves()
    loss = loss_of(encode(path, p, leaves, chunk), p, leaves)
    loss.backward()
    zero = torch.zeros(())
    return {"loss": loss.detach()} | {
        name: zero if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
    }


def assert_three_way(fast: Tensor, plain: Tensor, truth: Tensor, name: str) -> None:
    """`fast` errs at most twice as much as `plain`, plus one rounding of the largest value."""
    allowed = 2 * (plain.double() - truth).abs().max()
    floor = torch.finfo(plain.dtype).eps * truth.abs().max()
    error = (fast.double() - truth).abs().max()
    assert error <= allowed + floor, f"{name}: {error:.2e}, allowed {allowed:.2e} + {floor:.2e}"


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_the_reference(kind: str, chunk: int) -> None:
    p = problem(kind)
    expected, found = loss_and_gradients("dense", p), loss_and_gradients("sparse", p, chunk)
    for name, want in expected.items():
        torch.testing.assert_close(
            found[name], want, rtol=1e-12, atol=1e-12 * float(want.abs().max()), msg=name
        )


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_errs_no_more_than_twice_the_reference(kind: str, chunk: int) -> None:
    p = problem(kind, torch.float32)
    truth = loss_and_gradients("dense", p.to(torch.float64))
    plain, fast = loss_and_gradients("dense", p), loss_and_gradients("sparse", p, chunk)
    for name in truth:
        assert_three_way(fast[name], plain[name], truth[name], name)


def test_the_problems_are_what_they_say() -> None:
    """No pair so near θ or a window edge that rounding decides; every regime is really met."""
    for kind in KINDS:
        p = problem(kind)
        z = encode_dense(p.x, p.W_enc, p.b_enc, p.b_pre).z
        for edge in (-p.bandwidth / 2, 0.0, p.bandwidth / 2):
            assert (z - p.threshold - edge).abs().min() > 1e-5
        active = (z > p.threshold).double().mean()
        in_window = ((z - p.threshold).abs() < p.bandwidth / 2).double().mean()
        if kind == "nothing active":
            assert active == 0 == in_window
        elif kind == "all active":
            assert active == 1 and in_window == 0
        else:
            assert 0.02 < active < 0.6 and in_window > 0.02
        assert (p.threshold.min() < p.bandwidth / 2) == (kind == "window wider than θ")


def test_empty_active_set_trains_only_the_pre_activation_term() -> None:
    found = loss_and_gradients("sparse", problem("nothing active"))
    p = problem("nothing active")
    # Each dead latent's θ - z has slope weight_i in θ; nothing else moves θ.
    torch.testing.assert_close(
        found["threshold"], PRE_ACT * p.W_dec.norm(dim=1) * p.dead, rtol=1e-12, atol=0.0
    )


def test_no_gradient_is_computed_for_what_does_not_want_it() -> None:
    p = problem()
    leaves = p.leaves()
    leaves["x"] = p.x
    loss_of(encode("sparse", p, leaves), p, leaves).backward()
    assert p.x.grad is None
    expected = loss_and_gradients("dense", p)
    torch.testing.assert_close(leaves["W_enc"].grad, expected["W_enc"], rtol=1e-12, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind: str) -> None:
    p = problem(kind, torch.float32)
    truth = loss_and_gradients("dense", p.to(torch.float64))
    allow, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        on_gpu = p.to(device="cuda")
        plain, fast = loss_and_gradients("dense", on_gpu), loss_and_gradients("sparse", on_gpu)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow
    for name in truth:
        assert_three_way(fast[name].cpu(), plain[name].cpu(), truth[name], name)
