"""Gamma and the optimal policy on small categorical policies: DCO's Lemmas 1 and 3, and the meaning of Gamma."""

from dataclasses import replace

import numpy as np
import pytest
from factories import scored_tables
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from calm_ray.evaluation.ranking import ranks_of
from calm_ray.evaluation.score_report import count_scores, score_report
from calm_ray.evaluation.scores import scores_of
from calm_ray.methods.dco.gamma import (
    RANK_ONE_TOLERANCE,
    Floats,
    describe_gamma,
    distance_from_rank_one,
    exponents,
    gammas,
    optimal_logps,
    target_margins,
)
from calm_ray.methods.dco.settings import Anchor, Dco

CODES = ["en", "fr", "sw", "zh", "ru", "de"]
CASES = 1_000
weights = st.floats(0.1, 10.0)


def reference_policy(rng: Generator) -> tuple[list[str], Floats]:
    """3 to 6 languages and their log-probabilities [L, 1, K] of a question's 4 to 10 candidates."""
    languages = CODES[: rng.integers(3, 7)]
    probabilities = rng.dirichlet(np.ones(rng.integers(4, 11)), size=(len(languages), 1))
    return languages, np.log(probabilities)


def is_consistent(logps: Floats) -> bool:
    """Definition 1 of DCO: all languages rank the candidates in the same order."""
    ranks = ranks_of(logps)
    return bool((ranks == ranks[0]).all())


def random_gamma(rng: Generator, languages: list[str]) -> Dco:
    pairs = [f"{one}-{other}" for one in languages for other in languages if one != other]
    return Dco(gamma={pair: float(rng.uniform(0.1, 3.0)) for pair in pairs})


def test_gamma_from_the_recipe() -> None:
    languages = ["en", "fr", "zh"]
    assert gammas(Dco(), languages, 0.5).tolist() == [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    assert gammas(Dco(gamma=2.0), languages, 0.5).tolist() == [[0, 2, 2], [2, 0, 2], [2, 2, 0]]
    # "en-fr" is how far en follows fr; pairs not given default to beta.
    table = gammas(Dco(gamma={"en-fr": 0.1, "fr-en": 10}), languages, 0.5)
    assert table.tolist() == [[0, 0.1, 0.5], [10, 0, 0.5], [0.5, 0.5, 0]]


def test_anchor_follows_others_less_than_they_follow_it() -> None:
    gamma = gammas(Dco(anchor=Anchor(language="fr", strength=4)), ["en", "fr", "zh"], 2.0)
    assert gamma.tolist() == [[0, 8, 2], [0.5, 0, 0.5], [2, 8, 0]]


def test_anchor_of_two_languages_is_the_stable_english_of_dco() -> None:
    """Eq. 11 with gamma_1 = 0.1 and gamma_2 = 10 (DCO, Remark 1; its released code's beta of 10)."""
    anchored = gammas(Dco(anchor=Anchor(language="en", strength=10)), ["en", "sw"], 1.0)
    assert anchored.tolist() == gammas(Dco(gamma={"en-sw": 0.1, "sw-en": 10}), ["en", "sw"], 1.0).tolist()


def test_exponents_are_gamma_over_beta_with_ones_on_the_diagonal() -> None:
    assert exponents(np.array([[0.0, 1.0], [4.0, 0.0]]), 2.0).tolist() == [[1, 0.5], [2, 1]]


def test_distance_from_rank_one_is_relative() -> None:
    gamma = np.array([[0.0, 2.0], [2.0, 0.0]])  # the singular values of [[1, 2], [2, 1]] are 3 and 1
    assert distance_from_rank_one(gamma, 1.0) == pytest.approx(1 / 3)
    assert distance_from_rank_one(5 * gamma, 5.0) == pytest.approx(1 / 3)


def test_target_margins_on_a_small_example() -> None:
    gamma = np.array([[0.0, 1.0, 0.5], [2.0, 0.0, 3.0], [0.25, 0.1, 0.0]])
    margins = np.array([[2.0, -1.0, 4.0]])
    assert target_margins(margins, gamma).tolist() == [pytest.approx([-1 + 2, 4 + 12, 0.5 - 0.1])]


def test_optimal_policy_is_a_product_of_experts() -> None:
    """DCO, Eq. 9: each language's own probabilities times the other's raised to gamma / beta."""
    en, sw = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    gamma = gammas(Dco(gamma={"en-sw": 0.5, "sw-en": 8}), ["en", "sw"], 2.0)
    optimal = np.exp(optimal_logps(np.log([[en], [sw]]), gamma, 2.0))
    expected = [en * sw**0.25, sw * en**4]
    for found, wanted in zip(optimal[:, 0], expected, strict=True):
        assert found / found.sum() == pytest.approx(wanted / wanted.sum())


def test_zero_gamma_makes_the_reference_optimal() -> None:
    logps = np.array([[[-1.0, -2.0, -np.inf]], [[-3.0, -1.0, -np.inf]]])
    assert optimal_logps(logps, np.zeros((2, 2)), 1.0).tolist() == logps.tolist()


@settings(deadline=None)
@given(weights, weights, st.floats(0.05, 5.0))
def test_two_languages_have_rank_one_if_gammas_multiply_to_beta_squared(
    first: float, second: float, beta: float
) -> None:
    """Lemma 1."""
    own = np.array([[0.0, first * beta], [beta / first, 0.0]])
    assert distance_from_rank_one(own, beta) < RANK_ONE_TOLERANCE
    assume(abs(first * second - 1) > 0.01)
    assert distance_from_rank_one(np.array([[0.0, first * beta], [second * beta, 0.0]]), beta) > RANK_ONE_TOLERANCE


@settings(deadline=None)
@given(weights, weights, st.floats(0.05, 5.0))
def test_without_rank_one_the_optimal_policy_can_be_inconsistent(first: float, second: float, beta: float) -> None:
    """Lemma 1 leaves this open: its condition is also necessary."""
    assume(abs(first * second - 1) > 0.01)
    gamma = np.array([[0.0, first * beta], [second * beta, 0.0]])
    margins = np.linalg.solve(exponents(gamma, beta), [1.0, -1.0])  # chosen so that the optimal margins differ in sign
    logps = np.array([[[margin, 0.0]] for margin in margins])
    assert not is_consistent(optimal_logps(logps, gamma, beta))


@settings(deadline=None)
@given(st.lists(weights, min_size=2, max_size=6), st.data())
def test_gamma_has_rank_one_until_one_entry_changes(strengths: list[float], draw: st.DataObject) -> None:
    """Lemma 3: with ones on the diagonal, rank one is u_i / u_j."""
    u = np.array(strengths)
    gamma = np.outer(u, 1 / u) - np.eye(len(u))
    assert distance_from_rank_one(gamma, 1.0) < RANK_ONE_TOLERANCE
    assert distance_from_rank_one(0.3 * gamma, 0.3) < RANK_ONE_TOLERANCE
    i, j = draw.draw(st.permutations(range(len(u))))[:2]
    gamma[i, j] *= 2
    assert distance_from_rank_one(gamma, 1.0) > RANK_ONE_TOLERANCE


def test_higher_rank_prints_a_warning() -> None:
    assert "warning" not in describe_gamma(distance_from_rank_one(gammas(Dco(), CODES, 0.7), 0.7))
    assert "warning" in describe_gamma(distance_from_rank_one(gammas(Dco(gamma=2.0), CODES, 0.7), 0.7))


@pytest.mark.parametrize("anchored", [False, True])
def test_rank_one_makes_all_languages_consistent(anchored: bool) -> None:
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(CASES):
        languages, logps = reference_policy(rng)
        anchor = Anchor(language=str(rng.choice(languages)), strength=rng.uniform(0.2, 5.0)) if anchored else None
        beta = rng.uniform(0.1, 3.0)
        gamma = gammas(Dco(anchor=anchor), languages, beta)
        assert distance_from_rank_one(gamma, beta) < RANK_ONE_TOLERANCE
        assert is_consistent(optimal_logps(logps, gamma, beta))
        changed += not is_consistent(logps)
    assert changed > 0.99 * CASES  # the references themselves are not consistent


def test_higher_rank_often_leaves_languages_inconsistent() -> None:
    rng = np.random.default_rng(1)
    consistent = 0
    for _ in range(CASES):
        languages, logps = reference_policy(rng)
        gamma = gammas(random_gamma(rng, languages), languages, 1.0)
        assert distance_from_rank_one(gamma, 1.0) > RANK_ONE_TOLERANCE
        consistent += is_consistent(optimal_logps(logps, gamma, 1.0))
    assert consistent < 0.5 * CASES


def test_optimal_policy_has_rankc_1_only_with_rank_one() -> None:
    rng = np.random.default_rng(2)
    languages = CODES[:4]
    logps = {code: [np.log(rng.dirichlet(np.ones(5 + q % 3))).tolist() for q in range(50)] for code in languages}
    reference = scores_of(scored_tables(logps))

    def rankc_mean(dco: Dco) -> float:
        optimal = optimal_logps(reference.logps, gammas(dco, languages, 1.0), 1.0)
        return score_report(count_scores(replace(reference, logps=optimal)))["rankc_mean"]

    assert rankc_mean(Dco()) == pytest.approx(1.0, abs=1e-12)
    assert rankc_mean(Dco(anchor=Anchor(language="sw", strength=3))) == pytest.approx(1.0, abs=1e-12)
    assert score_report(count_scores(reference))["rankc_mean"] < rankc_mean(random_gamma(rng, languages)) < 0.99
