"""Gamma and the optimal policy on small categorical policies: DCO's Lemmas 1 and 3, and what its Gamma means."""

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
    RANK_ONE,
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
    """3 to 6 languages, and what they give 4 to 10 candidates of a question: log-probabilities [L, 1, K]."""
    languages = CODES[: rng.integers(3, 7)]
    shares = rng.dirichlet(np.ones(rng.integers(4, 11)), size=(len(languages), 1))
    return languages, np.log(shares)


def is_consistent(logps: Floats) -> bool:
    """Definition 1 of DCO: all languages have the candidates in the same order."""
    ranks = ranks_of(logps)
    return bool((ranks == ranks[0]).all())


def random_gamma(rng: Generator, languages: list[str]) -> Dco:
    pairs = [f"{one}-{other}" for one in languages for other in languages if one != other]
    return Dco(gamma={pair: float(rng.uniform(0.1, 3.0)) for pair in pairs})


def test_gamma_as_the_recipe_says_it() -> None:
    languages = ["en", "fr", "zh"]
    assert gammas(Dco(), languages, 0.5).tolist() == [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    assert gammas(Dco(gamma=2.0), languages, 0.5).tolist() == [[0, 2, 2], [2, 0, 2], [2, 2, 0]]
    # "en-fr" is how far en follows fr; what is not said is beta.
    table = gammas(Dco(gamma={"en-fr": 0.1, "fr-en": 10}), languages, 0.5)
    assert table.tolist() == [[0, 0.1, 0.5], [10, 0, 0.5], [0.5, 0.5, 0]]


def test_an_anchor_follows_the_others_less_than_they_follow_it() -> None:
    gamma = gammas(Dco(anchor=Anchor(language="fr", strength=4)), ["en", "fr", "zh"], 2.0)
    assert gamma.tolist() == [[0, 8, 2], [0.5, 0, 0.5], [2, 8, 0]]


def test_an_anchor_of_two_languages_is_the_stable_english_of_dco() -> None:
    """Eq. 11 with gamma_1 = 0.1 and gamma_2 = 10 (DCO, Remark 1; its released code's beta of 10)."""
    anchored = gammas(Dco(anchor=Anchor(language="en", strength=10)), ["en", "sw"], 1.0)
    assert anchored.tolist() == gammas(Dco(gamma={"en-sw": 0.1, "sw-en": 10}), ["en", "sw"], 1.0).tolist()


def test_exponents_are_gamma_over_beta_with_ones_on_the_diagonal() -> None:
    assert exponents(np.array([[0.0, 1.0], [4.0, 0.0]]), 2.0).tolist() == [[1, 0.5], [2, 1]]


def test_the_distance_from_rank_one_is_a_share() -> None:
    gamma = np.array([[0.0, 2.0], [2.0, 0.0]])  # the singular values of [[1, 2], [2, 1]] are 3 and 1
    assert distance_from_rank_one(gamma, 1.0) == pytest.approx(1 / 3)
    assert distance_from_rank_one(5 * gamma, 5.0) == pytest.approx(1 / 3)


def test_target_margins_by_hand() -> None:
    gamma = np.array([[0.0, 1.0, 0.5], [2.0, 0.0, 3.0], [0.25, 0.1, 0.0]])
    margins = np.array([[2.0, -1.0, 4.0]])
    assert target_margins(margins, gamma).tolist() == [pytest.approx([-1 + 2, 4 + 12, 0.5 - 0.1])]


def test_the_optimal_policy_is_a_product_of_experts() -> None:
    """DCO, Eq. 9: each language's own probabilities times the other's to the power of gamma / beta."""
    en, sw = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    gamma = gammas(Dco(gamma={"en-sw": 0.5, "sw-en": 8}), ["en", "sw"], 2.0)
    optimal = np.exp(optimal_logps(np.log([[en], [sw]]), gamma, 2.0))
    expected = [en * sw**0.25, sw * en**4]
    for found, wanted in zip(optimal[:, 0], expected, strict=True):
        assert found / found.sum() == pytest.approx(wanted / wanted.sum())


def test_where_nobody_follows_the_optimal_policy_is_the_reference() -> None:
    logps = np.array([[[-1.0, -2.0, -np.inf]], [[-3.0, -1.0, -np.inf]]])
    assert optimal_logps(logps, np.zeros((2, 2)), 1.0).tolist() == logps.tolist()


@settings(deadline=None)
@given(weights, weights, st.floats(0.05, 5.0))
def test_two_languages_are_of_rank_one_where_the_gammas_multiply_to_the_square_of_beta(
    first: float, second: float, beta: float
) -> None:
    """Lemma 1."""
    own = np.array([[0.0, first * beta], [beta / first, 0.0]])
    assert distance_from_rank_one(own, beta) < RANK_ONE
    assume(abs(first * second - 1) > 0.01)
    assert distance_from_rank_one(np.array([[0.0, first * beta], [second * beta, 0.0]]), beta) > RANK_ONE


@settings(deadline=None)
@given(weights, weights, st.floats(0.05, 5.0))
def test_otherwise_some_reference_leads_to_an_inconsistent_optimal_policy(
    first: float, second: float, beta: float
) -> None:
    """What Lemma 1 leaves open: its condition is needed, too."""
    assume(abs(first * second - 1) > 0.01)
    gamma = np.array([[0.0, first * beta], [second * beta, 0.0]])
    margins = np.linalg.solve(exponents(gamma, beta), [1.0, -1.0])  # under the reference, so that the optimum's differ
    logps = np.array([[[margin, 0.0]] for margin in margins])
    assert not is_consistent(optimal_logps(logps, gamma, beta))


@settings(deadline=None)
@given(st.lists(weights, min_size=2, max_size=6), st.data())
def test_gamma_is_of_rank_one_until_one_entry_changes(strengths: list[float], draw: st.DataObject) -> None:
    """Lemma 3: with ones on the diagonal, rank one is u_i / u_j."""
    u = np.array(strengths)
    gamma = np.outer(u, 1 / u) - np.eye(len(u))
    assert distance_from_rank_one(gamma, 1.0) < RANK_ONE
    assert distance_from_rank_one(0.3 * gamma, 0.3) < RANK_ONE
    i, j = draw.draw(st.permutations(range(len(u))))[:2]
    gamma[i, j] *= 2
    assert distance_from_rank_one(gamma, 1.0) > RANK_ONE


def test_the_user_is_warned_of_another_rank() -> None:
    assert "warning" not in describe_gamma(distance_from_rank_one(gammas(Dco(), CODES, 0.7), 0.7))
    assert "warning" in describe_gamma(distance_from_rank_one(gammas(Dco(gamma=2.0), CODES, 0.7), 0.7))


@pytest.mark.parametrize("anchored", [False, True])
def test_under_rank_one_all_languages_rank_alike_in_every_case(anchored: bool) -> None:
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(CASES):
        languages, logps = reference_policy(rng)
        anchor = Anchor(language=str(rng.choice(languages)), strength=rng.uniform(0.2, 5.0)) if anchored else None
        beta = rng.uniform(0.1, 3.0)
        gamma = gammas(Dco(anchor=anchor), languages, beta)
        assert distance_from_rank_one(gamma, beta) < RANK_ONE
        assert is_consistent(optimal_logps(logps, gamma, beta))
        changed += not is_consistent(logps)
    assert changed > 0.99 * CASES  # the references themselves disagree


def test_under_another_rank_some_languages_rank_differently() -> None:
    rng = np.random.default_rng(1)
    consistent = 0
    for _ in range(CASES):
        languages, logps = reference_policy(rng)
        gamma = gammas(random_gamma(rng, languages), languages, 1.0)
        assert distance_from_rank_one(gamma, 1.0) > RANK_ONE
        consistent += is_consistent(optimal_logps(logps, gamma, 1.0))
    assert consistent < 0.5 * CASES


def test_rankc_of_the_optimal_policy_is_1_under_rank_one_alone() -> None:
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
