"""RankC, compared with its definition and with the results of DCO's code and the original code, computed elsewhere.

Both are in golden_metrics.json next to the data; small cases of DCO's code (Betswish/ConsistencyRL, e0e8f46,
consistency.py) and of the original (Betswish/Cross-Lingual-Consistency, 13c9d46, RankC.py) are repeated here.
"""

from collections.abc import Sequence
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
from factories import golden_metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from calm_ray.evaluation.ranking import Floats, Weights, entropies, rankc, ranks_of, weights_of

Rankings = Sequence[Sequence[int]]
"""Candidate indices of each question, best first."""


def scores_of_rankings(rankings: Rankings) -> Floats:
    """Scores [Q, K] that rank the candidates in this order, padded with -inf for questions with fewer."""
    scores = np.full((len(rankings), max(len(ranking) for ranking in rankings)), -np.inf)
    for row, ranking in zip(scores, rankings, strict=True):
        row[list(ranking)] = -np.arange(len(ranking), dtype=np.float64)
    return scores


def mean_rankc(first: Rankings, second: Rankings, kind: Weights = "softmax") -> float:
    one, other = (ranks_of(scores_of_rankings(rankings)) for rankings in (first, second))
    return float(rankc(one, other, np.array([len(ranking) for ranking in first]), kind).mean())


def rankc_by_definition(first: Sequence[int], second: Sequence[int], kind: Weights) -> float:
    """Qi et al. 2023 as in DCO's appendix I, the sum of w_j P@j, or with the original script's other weights.

    Exponents start at N - 1, as they do there.
    """
    n = len(first)
    weight = {"softmax": lambda j: exp(n - j), "norm1": lambda j: n - j + 1, "norm2": lambda j: (n - j + 1) ** 2}[kind]
    total = sum(weight(j) for j in range(1, n + 1))
    precision = {j: len(set(first[:j]) & set(second[:j])) / j for j in range(1, n + 1)}
    return sum(weight(j) / total * precision[j] for j in range(1, n + 1))


def test_ranks_put_the_best_first_and_break_ties_by_index() -> None:
    assert ranks_of(np.array([0.1, 0.5, 0.5, -2.0])).tolist() == [2, 0, 1, 3]
    assert ranks_of(np.array([[-1.0, -0.5, -np.inf], [-3.0, -3.0, -3.0]])).tolist() == [[1, 0, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 1.0),
        ([0, 1], [1, 0], 0.2689414213699951),
        ([0, 1, 2, 3], [3, 2, 1, 0], 0.09015481577477337),
        ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], 0.06412943636522238),
        ([*range(10)], [*range(10)][::-1], 0.0030140386274752537),
        ([0, 1, 2, 3], [1, 0, 2, 3], 0.3560857401120277),
        ([0, 1, 2, 3], [0, 1, 3, 2], 0.9709518937526559),
        ([0], [0], 1.0),
    ],
)
def test_rankc_of_small_rankings(first: list[int], second: list[int], value: float) -> None:
    assert mean_rankc([first], [second]) == pytest.approx(value, abs=1e-9)
    assert mean_rankc([second], [first]) == pytest.approx(value, abs=1e-9)


def test_rankc_with_each_kind_of_weights() -> None:
    first, second = [[1, 0, 2], [3, 0, 1, 2]], [[0, 1, 2], [3, 0, 2, 1]]
    assert mean_rankc(first, second, "softmax") == pytest.approx(0.6528554689889169, abs=1e-9)
    assert mean_rankc(first, second, "norm1") == pytest.approx(0.7166666666666667, abs=1e-9)
    assert mean_rankc(first, second, "norm2") == pytest.approx(0.6563492063492063, abs=1e-9)


def test_weights_of_four_candidates() -> None:
    expected = [0.6439142598879722, 0.23688281808991013, 0.08714431874203257, 0.03205860328008499]
    assert weights_of(4).tolist() == pytest.approx(expected, abs=1e-9)
    assert weights_of(4, "norm1").tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert weights_of(3, "norm2").tolist() == pytest.approx([9 / 14, 4 / 14, 1 / 14])


def test_golden_rankc(data: Path) -> None:
    for case in golden_metrics(data)["rankc"]:
        value = mean_rankc(case["ranking_l1"], case["ranking_l2"])
        assert value == pytest.approx(case["rankc"], abs=1e-9), case["name"]


def test_golden_weights(data: Path) -> None:
    for case in golden_metrics(data)["rankc_weights"]:
        assert weights_of(case["n"]).tolist() == pytest.approx(case["weights"], abs=1e-9)


def test_golden_original_script(data: Path) -> None:
    for case in golden_metrics(data)["rankc_original_script"]:
        for kind, value in case["expected"].items():
            assert mean_rankc(case["ranking_l1"], case["ranking_l2"], kind) == pytest.approx(value, abs=1e-9), kind


two_rankings = st.integers(1, 10).flatmap(
    lambda count: st.tuples(st.permutations(range(count)), st.permutations(range(count)))
)


@settings(deadline=None)
@given(st.lists(two_rankings, min_size=1, max_size=8), st.sampled_from(["softmax", "norm1", "norm2"]))
def test_rankc_matches_its_definition(pairs: list[tuple[list[int], list[int]]], kind: Weights) -> None:
    first, second = zip(*pairs, strict=True)
    expected = [rankc_by_definition(one, other, kind) for one, other in pairs]
    assert mean_rankc(first, second, kind) == pytest.approx(np.mean(expected), abs=1e-9)


def test_entropy() -> None:
    logps = np.log([[0.5, 0.5, 1e-300], [0.25, 0.25, 0.5]])
    logps[0, 2] = -np.inf  # a question with two candidates
    assert entropies(logps).tolist() == pytest.approx([log(2), 1.5 * log(2)])
    assert entropies(logps - 7.0).tolist() == pytest.approx([log(2), 1.5 * log(2)])
    assert entropies(np.array([[-3.0]])).tolist() == [0.0]
    assert entropies(np.array([[0.0, -2000.0]])).tolist() == [0.0]
