"""Gamma: how far each language follows the others, and the policy that this leads to. Pure functions over arrays.

L languages, Q questions, K candidates at most; where a question has fewer, its log-probabilities end in -inf.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calm_ray.methods.dco.settings import Dco

Floats = NDArray[np.float64]

RANK_ONE = 1e-6
"""A second singular value below this share of the first is none."""


def gammas(settings: Dco, languages: Sequence[str], beta: float) -> Floats:
    """[L, L], gamma_ij: how far language i follows the margins of language j; 0 on the diagonal (DCO, Eq. 15)."""
    gamma = np.full((len(languages), len(languages)), float(beta))
    if isinstance(settings.gamma, dict):
        for pair, value in settings.gamma.items():
            follows, followed = pair.split("-")
            gamma[languages.index(follows), languages.index(followed)] = value
    elif settings.gamma is not None:
        gamma[:] = settings.gamma
    if settings.anchor is not None:
        anchor = languages.index(settings.anchor.language)
        gamma[anchor, :] = beta / settings.anchor.strength
        gamma[:, anchor] = beta * settings.anchor.strength
    np.fill_diagonal(gamma, 0.0)
    return gamma


def exponents(gamma: Floats, beta: float) -> Floats:
    """[L, L], Gamma of Eq. 17: ones on the diagonal, gamma_ij / beta elsewhere; the exponents of Eq. 10."""
    return np.eye(len(gamma)) + gamma / beta


def distance_from_rank_one(gamma: Floats, beta: float) -> float:
    """The second singular value of Gamma as a share of the first.

    Where it is 0, the optimal policy is consistent (DCO, Lemma 3); for two languages that is gamma_12 gamma_21 =
    beta^2 (Lemma 1).
    """
    first, second, *_ = np.linalg.svd(exponents(gamma, beta), compute_uv=False)
    return float(second / first)


def inconsistent_pairs(gamma: Floats, beta: float) -> list[tuple[int, int]]:
    """The pairs of languages that are not led to a consistent policy: gamma_ij gamma_ji is not beta^2 (Lemma 1)."""
    rows, columns = np.triu_indices(len(gamma), 1)
    products = gamma[rows, columns] * gamma[columns, rows] / beta**2
    off = np.abs(products - 1) > RANK_ONE
    return [(int(i), int(j)) for i, j in zip(rows[off], columns[off], strict=True)]


def check_gamma(settings: Dco, languages: Sequence[str], beta: float) -> str:
    """What a run's gamma means for the consistency of the policies it leads to, for a person."""
    gamma = gammas(settings, languages, beta)
    if settings.languages == "joint" or len(languages) == 2:
        return describe_gamma(distance_from_rank_one(gamma, beta))
    pairs = [f"{languages[i]}-{languages[j]}" for i, j in inconsistent_pairs(gamma, beta)]
    if not pairs:
        return "gamma_ij gamma_ji is beta^2 for every two languages: they are led to rank candidates alike"
    return (
        f"warning: gamma_ij gamma_ji is not beta^2 for {', '.join(pairs)}: these are not led to rank candidates alike"
    )


def describe_gamma(distance: float) -> str:
    """What the second singular value of Gamma, as a share of the first, says of the optimal policy (DCO, Lemma 3)."""
    if distance < RANK_ONE:
        return "Gamma is of rank one: the optimal policy ranks candidates alike in all languages"
    return (
        f"warning: Gamma is not of rank one (its second singular value is {distance:.3g} of the first): even the "
        "optimal policy ranks candidates differently in different languages; see dco.gamma and dco.anchor"
    )


def target_margins(ref_margins: Floats, gamma: Floats) -> Floats:
    """[P, L], what beta times each language's margin is fitted to: sum_j gamma_ij Delta_ref_j (DCO, Eq. 11 and 15).

    `ref_margins` [P, L]: log p(chosen) - log p(rejected) of each pair in each language, under the reference.
    """
    return np.asarray(ref_margins @ gamma.T)


def optimal_logps(logps: Floats, gamma: Floats, beta: float) -> Floats:
    """[L, Q, K], the optimal policy's log-probabilities but for a constant of each question (DCO, Eq. 10 and 16).

    A product of experts: the reference's own `logps` [L, Q, K], and the other languages' by their exponents.
    """
    weights = exponents(gamma, beta)
    # Language by language, since an exponent of 0 would make a missing candidate's -inf something else.
    return np.stack([sum(w * one for w, one in zip(row, logps, strict=True) if w) for row in weights])
