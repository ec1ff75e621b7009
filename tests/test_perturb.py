"""`--perturb` changes rounding, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# In a process of its own: PyTorch's operators stay as they are in this one.
SCRIPT = """
import torch
from torch.nn.functional import linear
from tests.perturb import sum_in_another_order

def draw(*shape):
    return torch.randn(shape, generator=generator)

def results():
    x = a.clone().requires_grad_()
    (x @ b).square().sum().backward()
    return {
        "mm": a @ b, "addmm": torch.addmm(c, a, b), "in place": a.new_zeros(67, 53).addmm_(a, b),
        "out": torch.addmm(c, a, b, out=a.new_empty(67, 53)), "linear": linear(a, b.T, c),
        "bmm": A @ B, "mv": a @ b[:, 0], "sum": a.sum(1), "axes": A.sum((1, 2)),
        "mean": a.mean(0), "backward": x.grad,
        "sampled": torch.sparse.sampled_addmm(pattern, a, b).values(),
    }

generator = torch.Generator().manual_seed(0)
a, b, c, A, B = draw(67, 131), draw(131, 53), draw(53), draw(3, 67, 131), draw(3, 131, 53)
pattern = (draw(67, 53) > 1).float().to_sparse_csr()
whole = torch.randint(-9, 9, (67, 131), generator=generator).float()
before, exact = results(), (whole @ whole.T, whole.sum(0), a @ torch.eye(131))
sum_in_another_order(1)
for name, value in results().items():
    wanted = before[name]
    assert not torch.equal(value, wanted), f"{name} is not perturbed"
    assert (value - wanted).abs().max() <= 2e-6 * wanted.abs().max(), name
    assert torch.equal(value, results()[name]), f"{name} differs from one time to the next"
again = (whole @ whole.T, whole.sum(0), a @ torch.eye(131))
assert all(torch.equal(x, y) for x, y in zip(again, exact))
"""


def test_sums_are_taken_in_another_order_and_exact_ones_stay() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
