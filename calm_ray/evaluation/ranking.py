"""Compares languages' rankings of the same candidates. Pure functions; Q questions, at most K candidates.

Candidates are identified by index; ties go to the lower index.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Weights = Literal["softmax", "norm1", "norm2"]


def ranks_of(scores: Floats) -> Ints:
    """Returns each candidate's rank [..., K], 0 for the highest score."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.asarray(np.argsort(order, axis=-1, kind="stable"))


def weights_of(count: int, kind: Weights = "softmax") -> Floats:
    """Returns the weights [N] of the cutoffs j = 1 ... N of a ranking; they sum to 1.

    `softmax` is RankC as published and as DCO reports it (Qi et al. 2023; DCO, appendix I): e^(N - j). `norm1` and
    `norm2` are the alternatives in the original script (Betswish/Cross-Lingual-Consistency, 13c9d46, RankC.py):
    N - j + 1 and (N - j + 1)^2.
    """
    ranks = np.arange(count, dtype=np.float64)
    raw = np.exp(-ranks) if kind == "softmax" else (count - ranks) ** {"norm1": 1, "norm2": 2}[kind]
    return np.asarray(raw / raw.sum())


def rankc(first: Ints, second: Ints, counts: Ints, kind: Weights = "softmax") -> Floats:
    """Returns RankC [Q] of two languages' ranks `first` and `second` [Q, K]; the reported figure is its mean.

    P@j is the fraction of the top j candidates that both rankings share; RankC is the weighted sum of P@j over j. A
    candidate is shared from the larger of its two ranks on, so it adds weight_j / j for every j from there.
    """
    later = np.maximum(first, second)
    values = np.zeros(len(later))
    for count in np.unique(counts):
        rows = counts == count
        terms = weights_of(int(count), kind) / np.arange(1, count + 1)
        by_rank = terms[::-1].cumsum()[::-1]
        values[rows] = by_rank[later[rows, :count]].sum(axis=1)
    return values


def probabilities(logps: Floats) -> Floats:
    """Returns the distribution over candidates given by log-probabilities [..., K], which may be padded with -inf."""
    weights = np.exp(logps - logps.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def entropies(logps: Floats) -> Floats:
    """Returns the entropy [...] in nats of the distribution over candidates given by log-probabilities [..., K]."""
    probs = probabilities(logps)
    safe = np.where(probs > 0, probs, 1.0)
    return np.asarray(-(probs * np.log(safe)).sum(axis=-1))
