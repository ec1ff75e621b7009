"""The metrics in two passes over all tokens, in NumPy."""

from __future__ import annotations

import numpy as np


def two_pass(x, x_hat, acts):
    x, x_hat, acts = x.double().numpy(), x_hat.double().numpy(), acts.numpy()
    frequency = (acts != 0).mean(axis=0)
    residual = ((x - x_hat) ** 2).sum()
    dots = (x * x_hat).sum(1)
    return {
        "n_tokens": len(x),
        "fvu": residual / ((x - x.mean(axis=0)) ** 2).sum(),
        "mse": residual / x.size,
        "cosine": (dots / (np.linalg.norm(x, axis=1) * np.linalg.norm(x_hat, axis=1))).mean(),
        "l0": (acts != 0).sum(axis=1).mean(),
        "dead_share": (frequency == 0).mean(),
        "share_above_1_percent": (frequency > 0.01).mean(),
        "share_above_10_percent": (frequency > 0.1).mean(),
    }
