"""Gamma, the weight of each language's margins in the others' targets, and the optimal policy it implies.

Pure functions over arrays: L languages, Q questions, at most K candidates (padded with log-probabilities of -inf).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from calm_ray.methods.dco.settings import AUTO, Dco

Floats = NDArray[np.float64]

RANK_ONE_TOLERANCE = 1e-6
"""Relative tolerance: a second singular value below this fraction of the first counts as 0."""


def gammas(
    settings: Dco, languages: Sequence[str], beta: float, agreement: Mapping[str, float] | None = None
) -> Floats:
    """Returns gamma [L, L]: gamma_ij weighs language j's margins in language i's target (DCO, Eq. 15).

    The diagonal is 0, except with `dco.weights`, where a language's own margins count less than in the reference.
    `agreement` is each language's mean agreement with the others (0 to 1), for what is `auto`; without it, all agree
    alike.
    """
    if settings.weights is not None:
        weights = weights_of(settings, languages, agreement)
        return np.asarray(beta * (np.tile(weights, (len(languages), 1)) - np.eye(len(languages))))
    gamma = np.full((len(languages), len(languages)), float(beta))
    if isinstance(settings.gamma, dict):
        for pair, value in settings.gamma.items():
            follows, followed = pair.split("-")
            gamma[languages.index(follows), languages.index(followed)] = value
    elif settings.gamma is not None:
        gamma[:] = settings.gamma
    if settings.anchor is not None:
        name = settings.anchor.language
        anchor = languages.index(most_agreeing(languages, agreement) if name == AUTO else name)
        gamma[anchor, :] = beta / settings.anchor.strength
        gamma[:, anchor] = beta * settings.anchor.strength
    np.fill_diagonal(gamma, 0.0)
    return gamma


def weights_of(settings: Dco, languages: Sequence[str], agreement: Mapping[str, float] | None) -> Floats:
    """Returns the weights [L] that `dco.weights` asks for; they add up to 1."""
    if isinstance(settings.weights, dict):
        weights = np.array([settings.weights[code] for code in languages])
    elif settings.weights == AUTO and agreement is not None:
        weights = np.maximum(0.0, np.array([agreement[code] for code in languages]) - 0.5) ** 2
        if not weights.any():  # no language agrees with the others more often than not
            weights = np.ones(len(languages))
    else:
        weights = np.ones(len(languages))
    return np.asarray(weights / weights.sum())


def most_agreeing(languages: Sequence[str], agreement: Mapping[str, float] | None) -> str:
    """Returns the language that agrees most with the others, the first of equals."""
    return max(languages, key=lambda code: agreement[code] if agreement is not None else 0.0)


def exponents(gamma: Floats, beta: float) -> Floats:
    """Returns Gamma [L, L] of Eq. 17, the exponents of Eq. 10: the identity plus gamma / beta."""
    return np.eye(len(gamma)) + gamma / beta


def distance_from_rank_one(gamma: Floats, beta: float) -> float:
    """Returns the ratio of Gamma's second singular value to its first.

    At 0 the optimal policy is consistent (DCO, Lemma 3); for two languages this means gamma_12 gamma_21 = beta^2
    (Lemma 1).
    """
    first, second, *_ = np.linalg.svd(exponents(gamma, beta), compute_uv=False)
    return float(second / first)


def inconsistent_pairs(gamma: Floats, beta: float) -> list[tuple[int, int]]:
    """Returns the language pairs whose optimal policy is inconsistent: gamma_ij gamma_ji is not beta^2 (Lemma 1)."""
    rows, columns = np.triu_indices(len(gamma), 1)
    products = gamma[rows, columns] * gamma[columns, rows] / beta**2
    off = np.abs(products - 1) > RANK_ONE_TOLERANCE
    return [(int(i), int(j)) for i, j in zip(rows[off], columns[off], strict=True)]


def check_gamma(settings: Dco, languages: Sequence[str], beta: float) -> str:
    """Tells the user whether a run's gamma leads to consistent policies."""
    gamma = gammas(settings, languages, beta)
    if settings.languages == "joint" or len(languages) == 2:
        return describe_gamma(distance_from_rank_one(gamma, beta))
    pairs = [f"{languages[i]}-{languages[j]}" for i, j in inconsistent_pairs(gamma, beta)]
    if not pairs:
        return "gamma_ij gamma_ji is beta^2 for every language pair: the optimal policies rank candidates consistently"
    return (
        f"warning: gamma_ij gamma_ji is not beta^2 for {', '.join(pairs)}: even the optimal policies of these pairs "
        "rank candidates inconsistently; see dco.gamma and dco.anchor"
    )


def describe_gamma(distance: float) -> str:
    """Explains `distance_from_rank_one` to the user (DCO, Lemma 3)."""
    if distance < RANK_ONE_TOLERANCE:
        return "Gamma has rank one: the optimal policy ranks candidates identically in all languages"
    return (
        f"warning: Gamma does not have rank one (its second singular value is {distance:.3g} times the first): even "
        "the optimal policy ranks candidates differently across languages; see dco.gamma and dco.anchor"
    )


def target_margins(ref_margins: Floats, gamma: Floats) -> Floats:
    """Returns the targets [P, L] for beta times each margin: sum_j gamma_ij Delta_ref_j (DCO, Eq. 11 and 15).

    `ref_margins` [P, L]: log p(chosen) - log p(rejected) under the reference.
    """
    return np.asarray(ref_margins @ gamma.T)


def optimal_logps(logps: Floats, gamma: Floats, beta: float) -> Floats:
    """Returns the optimal policy's log-probabilities [L, Q, K], up to a constant per question (DCO, Eq. 10 and 16).

    A product of experts: the reference's `logps` [L, Q, K] in all languages, weighted by their exponents.
    """
    weights = exponents(gamma, beta)
    # Not a matrix product: an exponent of 0 would turn a missing candidate's -inf into NaN.
    return np.stack([sum(w * one for w, one in zip(row, logps, strict=True) if w) for row in weights])
