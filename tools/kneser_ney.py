"""Interpolated Kneser-Ney n-gram and unigram losses, the baselines for the embedded model.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling"
(1999), in the interpolated form with one discount D = n1 / (n1 + 2 n2) for each order.
"""

from __future__ import annotations

import numpy as np


class _Order:
    """Counts of one order, looked up by the n-gram packed into one integer."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, vocabulary: int) -> None:
        self.grams, self.counts = grams, counts  # grams sorted
        self.contexts, first = np.unique(grams // vocabulary, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.kinds = np.diff(np.append(first, len(grams)))
        ones, twos = np.sum(counts == 1), np.sum(counts == 2)
        # If no n-gram occurs once, the estimate is zero, and unseen tokens would be impossible.
        self.discount = ones / (ones + 2 * twos) if ones else 0.5


class KneserNey:
    """An n-gram model over rows of tokens; a row's first token (BOS) pads the contexts.

    Args:
        rows: (n, length) training tokens, the first column BOS, which is never predicted.
        order: the n of n-gram.
        vocabulary: number of tokens; vocabulary ** order must stay below 2 ** 63.
    """

    def __init__(self, rows: np.ndarray, order: int, vocabulary: int) -> None:
        self.order, self.vocabulary = order, vocabulary
        grams, counts = np.unique(self._pack(rows, order), return_counts=True)
        self.orders = [_Order(grams, counts, vocabulary)]  # lowest order first
        for n in range(order - 1, 0, -1):
            # Lower orders count the different preceding tokens ("continuation counts").
            grams, counts = np.unique(grams % vocabulary**n, return_counts=True)
            self.orders.insert(0, _Order(grams, counts, vocabulary))

    def _pack(self, rows: np.ndarray, order: int) -> np.ndarray:
        bos = np.repeat(rows[:, :1], order - 2, axis=1)
        padded = np.concatenate([bos, rows], axis=1).astype(np.int64)
        length = rows.shape[1] - 1
        packed = np.zeros((rows.shape[0], length), dtype=np.int64)
        for offset in range(order):
            packed = packed * self.vocabulary + padded[:, offset : offset + length]
        return packed.ravel()

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """Probability of every predicted token of `rows`, row after row."""
        packed = self._pack(rows, self.order)
        probability = np.full(len(packed), 1 / self.vocabulary)
        for n, table in enumerate(self.orders, start=1):
            grams = packed % self.vocabulary**n
            context, known = _find(table.contexts, grams // self.vocabulary)
            gram, gram_known = _find(table.grams, grams)
            count = np.where(gram_known, table.counts[gram], 0)
            discounted = np.maximum(count - table.discount, 0)
            lower_order = table.discount * table.kinds[context] * probability
            interpolated = (discounted + lower_order) / table.totals[context]
            probability = np.where(known, interpolated, probability)
        return probability

    def loss(self, rows: np.ndarray) -> float:
        """Mean nats per predicted token."""
        return float(-np.log(self.probabilities(rows)).mean())


def unigram_loss(train: np.ndarray, test: np.ndarray, vocabulary: int) -> float:
    """Mean nats per predicted token with add-one token frequencies."""
    counts = np.bincount(train[:, 1:].ravel(), minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[test[:, 1:].ravel()].mean())


def _find(table: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of each value in the sorted table, and whether the table has it."""
    index = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return index, table[index] == values
