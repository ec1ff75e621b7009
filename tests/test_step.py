"""The fast step against the dense reference: same verbs, same loss, same gradients, less memory.

Float64 is compared tightly. Float32 follows the three-way rule: against the float64 reference, the
fast step may err at most twice as much as the float32 reference does.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.step.choose import PathChoice
from jumprelu_plugin.step.dense import encode_dense
from jumprelu_plugin.step.entries import Entries
from jumprelu_plugin.step.estimators import jumprelu
from jumprelu_plugin.step.losses import (
    L0,
    PreActivationLoss,
    Step,
    TanhL0,
    WithDensityPenalty,
    reconstruction,
)
from jumprelu_plugin.step.sparse import SparseEntries, encode_sparse

BATCH, D_IN, D_SAE, D_OUT = 37, 23, 101, 19
CHUNKS = {"less than a row": D_SAE // 2 + 3, "three rows": 3 * D_SAE + 5, "all": 10**9}
SPARSITY, TANH, PRE_ACT = 0.31, 0.17, 0.23


@dataclass
class Problem:
    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    b_pre: Tensor | None
    W_dec: Tensor
    threshold: Tensor
    bandwidth: float
    target: Tensor
    dead: Tensor
    to_input: bool = True

    def to(self, dtype: torch.dtype | None = None, device: str = "cpu") -> Problem:
        """Every tensor on `device`, numbers in `dtype`."""
        tensors = {name: v for name, v in vars(self).items() if isinstance(v, Tensor)}
        moved = {
            name: v.to(device, dtype if v.is_floating_point() else None)
            for name, v in tensors.items()
        }
        return replace(self, **moved)

    def leaves(self) -> dict[str, Tensor]:
        names = ("x", "W_enc", "b_enc", "b_pre", "W_dec", "threshold")
        found = {name: getattr(self, name) for name in names}
        return {n: v.detach().clone().requires_grad_() for n, v in found.items() if v is not None}


def problem(kind: str = "ordinary", dtype: torch.dtype = torch.float64) -> Problem:
    """A step with a window on both sides of θ; every number is a float32, whatever the dtype."""
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    made = Problem(
        x=normal(BATCH, D_IN),
        W_enc=normal(D_IN, D_SAE) / D_IN**0.5,
        b_enc=0.3 * normal(D_SAE),
        b_pre=0.4 * normal(D_IN),
        W_dec=normal(D_SAE, D_OUT) / D_OUT**0.5,
        threshold=0.7 + torch.rand(D_SAE, generator=g),
        bandwidth=0.43,
        target=normal(BATCH, D_OUT),
        dead=torch.rand(D_SAE, generator=g) < 0.4,
    )
    if kind == "nothing active":
        made.threshold = 50 + made.threshold
    elif kind == "all active":
        made.b_enc = 50 + made.b_enc
        made.dead[:] = False  # a latent that fires on every token is not dead
    elif kind == "window wider than θ":
        made.threshold, made.bandwidth = 0.1 * made.threshold, 1.7
    elif kind == "some latents never":
        made.threshold[::3] = 50.0
    elif kind == "no b_pre":
        made.b_pre = None
    elif kind == "estimator to θ only":
        made.to_input = False
    else:
        assert kind == "ordinary"
    return made.to(dtype)


KINDS = (
    "ordinary",
    "nothing active",
    "all active",
    "window wider than θ",
    "some latents never",
    "no b_pre",
    "estimator to θ only",
)


def encode(path: str, p: Problem, leaves: dict[str, Tensor], chunk: int = 10**9) -> Entries:
    inputs = leaves["x"], leaves["W_enc"], leaves["b_enc"], leaves.get("b_pre")
    if path == "dense":
        return encode_dense(*inputs)
    return encode_sparse(
        *inputs, leaves["threshold"], p.bandwidth, keep_mean=True, tile_bytes=8 * chunk
    )


def loss_of(entries: Entries, p: Problem, leaves: dict[str, Tensor]) -> Tensor:
    theta = leaves["threshold"]
    acts = jumprelu(entries.z, entries.per_latent(theta), p.bandwidth, p.to_input)
    step = Step(entries, acts, theta, p.bandwidth, p.to_input, leaves["W_dec"], p.dead)
    x_hat = entries.decode(acts, leaves["W_dec"])
    return (
        reconstruction(x_hat, p.target)
        + SPARSITY * WithDensityPenalty(L0(), 0.07)(step)
        + TANH * TanhL0(1.3)(step)
        + PRE_ACT * PreActivationLoss()(step)
    )


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


# ---------------------------------------------------------------- loss and gradients


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


# ---------------------------------------------------------------- the verbs


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[SparseEntries, Tensor, Tensor, Problem]]:
    """Sparse entries, the dense z, the mask of represented pairs, and the problem."""
    p = problem()
    leaves = p.leaves()
    sparse = encode("sparse", p, leaves, request.param)
    assert isinstance(sparse, SparseEntries)
    z = (p.x - p.b_pre) @ p.W_enc + p.b_enc  # type: ignore[operator]
    represented = torch.zeros(BATCH, D_SAE, dtype=torch.bool)
    represented[sparse.pattern.rows, sparse.pattern.cols] = True
    yield sparse, z, represented, p


def test_represented_are_exactly_the_active_and_the_window(pair) -> None:  # type: ignore[no-untyped-def]
    sparse, z, represented, p = pair
    assert torch.equal(represented, z > p.threshold - p.bandwidth / 2)
    torch.testing.assert_close(sparse.z.detach(), z[represented], rtol=1e-12, atol=1e-13)


def test_pattern_has_no_duplicates_and_is_sorted(pair) -> None:  # type: ignore[no-untyped-def]
    pattern = pair[0].pattern
    flat = pattern.rows * D_SAE + pattern.cols
    assert (flat.diff() > 0).all()


def test_sums_and_broadcast(pair) -> None:  # type: ignore[no-untyped-def]
    sparse, z, represented, p = pair
    values = torch.randn(BATCH, D_SAE, dtype=torch.float64) * represented
    at = values[represented]
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(sparse.sum_latents(at), values.sum(1), **close)
    torch.testing.assert_close(sparse.sum_tokens(at), values.sum(0), **close)
    torch.testing.assert_close(sparse.decode(at, p.W_dec), values @ p.W_dec, **close)
    assert torch.equal(sparse.per_latent(p.threshold), p.threshold.expand(BATCH, -1)[represented])


def test_threshold_deficit_counts_the_pairs_that_are_not_represented(pair) -> None:  # type: ignore[no-untyped-def]
    sparse, z, _, p = pair
    weight = torch.rand(D_SAE, dtype=torch.float64)
    expected = sum(
        weight[i] * max(0.0, float(p.threshold[i] - z[b, i])) / BATCH
        for b in range(BATCH)
        for i in range(D_SAE)
    )
    found = sparse.threshold_deficit(p.threshold, weight)
    torch.testing.assert_close(found.detach(), torch.as_tensor(expected), rtol=1e-12, atol=0.0)


def test_threshold_deficit_without_the_mean_is_refused() -> None:
    p = problem()
    entries = encode_sparse(p.x, p.W_enc, p.b_enc, p.b_pre, p.threshold, p.bandwidth)
    with pytest.raises(ValueError, match="threshold_deficit"):
        entries.threshold_deficit(p.threshold, p.threshold)


def test_as_matrix_is_what_the_trainer_reads(pair) -> None:  # type: ignore[no-untyped-def]
    sparse, z, represented, p = pair
    matrix = sparse.as_matrix(sparse.z)
    assert matrix.is_sparse and matrix.is_coalesced() and not matrix.requires_grad
    assert torch.equal(matrix.to_dense() != 0, represented)
    acts = jumprelu(sparse.z, sparse.per_latent(p.threshold), p.bandwidth)
    active = sparse.as_matrix(acts, where=acts > 0)
    expected = z * (z > p.threshold)
    torch.testing.assert_close(active.to_dense(), expected, rtol=1e-12, atol=1e-13)
    assert active._nnz() == expected.count_nonzero()
    # The trainer's own reductions (SAELens 6.54, `SAETrainer._train_step`).
    fired = active.bool().float()
    assert torch.equal(fired.sum(-2).to_dense(), (expected > 0).float().sum(-2))


# ---------------------------------------------------------------- memory


def tensors_kept(path: str) -> tuple[list[int], list[int]]:
    """Sizes saved for backward by the path's own pass, and sizes alive after the forward pass."""
    p = problem("some latents never")
    leaves = p.leaves()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(encode(path, p, leaves, chunk=3 * D_SAE), p, leaves)
    alive = [o.numel() for o in gc.get_objects() if type(o) is Tensor and o.layout is torch.strided]
    loss.backward()
    return saved, alive


def test_nothing_as_large_as_batch_times_dictionary_outlives_the_forward_pass() -> None:
    gc.collect()
    saved, alive = tensors_kept("sparse")
    assert saved and BATCH * D_SAE not in saved
    assert alive.count(BATCH * D_SAE) == 0


def test_the_memory_test_would_see_a_dense_step() -> None:
    assert BATCH * D_SAE in tensors_kept("dense")[0]


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


# ---------------------------------------------------------------- choosing a path


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 17.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("jumprelu_plugin.step.choose.time.perf_counter", clock)
    return clock


def run_steps(
    choice: PathChoice, clock: Clock, steps: int, density: float, seconds: dict[str, float]
) -> list[str]:
    """Take steps whose time depends on the path; return the paths taken."""
    taken = []
    for _ in range(steps):
        path = choice.start(torch.device("cpu"))
        clock.now += seconds[path]
        choice.finish(density)
        taken.append(path)
    return taken


@pytest.mark.parametrize("fastest", ["sparse", "screened", "dense"])
def test_auto_times_every_path_and_keeps_the_fastest(clock: Clock, fastest: str) -> None:
    choice = PathChoice("auto")
    seconds = {"sparse": 1.9, "screened": 1.7, "dense": 2.3, fastest: 0.7}
    assert set(run_steps(choice, clock, 12, 0.03, seconds)) == {"sparse", "screened", "dense"}
    assert set(run_steps(choice, clock, 5, 0.03, seconds)) == {fastest}


def test_the_first_step_of_a_path_is_not_counted(clock: Clock) -> None:
    choice = PathChoice("auto")
    slow_start = {"sparse": 90.0, "screened": 1.7, "dense": 2.3}
    run_steps(choice, clock, 1, 0.03, slow_start)
    run_steps(choice, clock, 11, 0.03, {**slow_start, "sparse": 0.7})
    assert choice.current == "sparse"


def test_paths_are_timed_again_when_density_has_halved_and_not_before(clock: Clock) -> None:
    choice = PathChoice("auto")
    run_steps(choice, clock, 12, 0.2, {"sparse": 3.1, "screened": 3.3, "dense": 2.3})
    assert choice.current == "dense"
    now = {"sparse": 1.1, "screened": 0.9, "dense": 2.3}
    assert set(run_steps(choice, clock, 5, 0.13, now)) == {"dense"}
    run_steps(choice, clock, 9, 0.07, now)
    assert choice.current == "screened"


@pytest.mark.parametrize(("product_seconds", "tried"), [(0.3, False), (0.1, True), (None, True)])
def test_dense_is_tried_only_where_its_products_leave_room(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, product_seconds: float | None, tried: bool
) -> None:
    requested = []

    def seconds(*sizes: int) -> float | None:
        requested.append(sizes)
        return product_seconds

    monkeypatch.setattr("jumprelu_plugin.step.choose.product.seconds", seconds)
    choice = PathChoice("auto")
    took = {"sparse": 1.3, "screened": 1.1, "dense": 0.9}
    paths = []
    for _ in range(15):
        paths.append(choice.start(torch.device("cpu"), (37, 23, 101)))
        clock.now += took[paths[-1]]
        choice.finish(0.03)
    assert ("dense" in paths) == tried
    assert choice.current == ("dense" if tried else "screened")
    assert set(requested) == {(37, 23, 101)}


def test_the_choice_and_its_reasons_are_logged(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="jumprelu_plugin.step.choose"):
        run_steps(PathChoice("screened"), clock, 3, 0.03, {"screened": 1.0})
        run_steps(
            PathChoice("auto"), clock, 13, 0.03, {"sparse": 0.31, "screened": 0.47, "dense": 2.3}
        )
    forced, chosen = (record.getMessage() for record in caplog.records)
    assert forced == "step path: screened, as configured"
    assert chosen.startswith("step path: sparse at 3 % density (sparse 310.0 ms, screened 470.0 ms")


@pytest.mark.parametrize("forced", ["sparse", "screened", "dense"])
def test_a_forced_path_is_taken_whatever_it_costs(clock: Clock, forced: str) -> None:
    seconds = {"sparse": 1.0, "screened": 1.0, "dense": 1.0, forced: 50.0}
    assert set(run_steps(PathChoice(forced), clock, 13, 0.03, seconds)) == {forced}


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast'.*auto, sparse, screened, dense"):
        PathChoice("fast")
