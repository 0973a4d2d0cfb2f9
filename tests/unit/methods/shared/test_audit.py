"""The audit of a target: what every source of answers is worth, and the warning about a poor target."""

from collections import Counter

import numpy as np
import pytest
from factories import scored_tables

from calm_ray.evaluation.ranking import probabilities
from calm_ray.evaluation.scores import Scores, scores_of
from calm_ray.methods.dco.audit_target import POOLS, count_target
from calm_ray.methods.dco.gamma import gammas, optimal_logps
from calm_ray.methods.dco.settings import Dco
from calm_ray.methods.shared.audit import (
    RAW,
    TARGET,
    Report,
    Worth,
    answers_of,
    audit_report,
    better_sources,
    count_sources,
    worth_of,
)

A, B, SURE_B = [3.0, 0.0], [0.0, 2.0], [0.0, 4.0]


def example() -> Scores:
    """Four questions whose answer is A: en knows three, fr two, and sw none, which is surer than the others."""
    right = [0, 0, 0, 0]
    return scores_of(scored_tables({"en": [A, A, A, B], "fr": [A, A, B, B], "sw": [SURE_B] * 4}, right))


def count(scores: Scores) -> Counter[str]:
    return count_sources(probabilities(scores.logps), scores.right, scores.languages, RAW, POOLS)


def report_of(scores: Scores) -> Report:
    return audit_report(count(scores))


def target_of(scores: Scores, dco: Dco) -> Worth:
    optimal = optimal_logps(scores.logps, gammas(dco, scores.languages, 1.0), 1.0)
    return worth_of(count_target(scores, optimal), TARGET)


def test_every_source_is_counted() -> None:
    report = report_of(example())[RAW]
    accuracy = {name: worth["accuracy"] for name, worth in report.items()}
    assert accuracy == {
        "en": 0.75, "fr": 0.5, "sw": 0.0, "vote": 0.5, "product": 0.5,
        "vote without en": 0.0, "product without en": 0.0, "vote without fr": 0.0, "product without fr": 0.0,
        "vote without sw": 0.75, "product without sw": 0.75,
    }  # fmt: skip
    a, b, sure = (float(np.exp(x) / (1 + np.exp(x))) for x in (3, 2, 4))  # how sure A, B and SURE_B are

    def same(first: float, second: float) -> float:
        """How likely two draws agree if each gives its own answer, the same one, with these probabilities."""
        return first * second + (1 - first) * (1 - second)

    en_sw = (3 * same(a, 1 - sure) + same(b, sure)) / 4
    fr_sw = (2 * same(a, 1 - sure) + 2 * same(b, sure)) / 4
    assert report["sw"]["agreement"] == pytest.approx((en_sw + fr_sw) / 2)
    assert report["sw"]["confidence"] == pytest.approx(sure)


def test_counts_of_chunks_add_up() -> None:
    scores = example()
    halves = [scores.only({"q0", "q1"}), scores.only({"q2", "q3"})]
    total: Counter[str] = Counter()
    for half in halves:
        total.update(count(half))
    whole = count(scores)
    assert total.keys() == whole.keys()
    assert all(total[key] == pytest.approx(whole[key]) for key in whole)


def test_accuracy_is_unknown_without_gold_answers() -> None:
    scores = scores_of(scored_tables({"en": [A, B], "fr": [A, A]}))
    report = report_of(scores)
    assert {worth["accuracy"] for worth in report[RAW].values()} == {None}
    assert report[RAW]["en"]["agreement"] == pytest.approx(0.5, abs=0.05)
    target = target_of(scores, Dco())
    assert target["accuracy"] is None
    assert not better_sources(report, target, scores.languages)


def test_a_target_below_the_best_language_is_noticed() -> None:
    scores = example()
    report, target = report_of(scores), target_of(scores, Dco())
    assert target["accuracy"] == 0.5
    assert better_sources(report, target, scores.languages)[0] == (RAW, "en", 0.75)
    english = target_of(scores, Dco(weights={"en": 98, "fr": 1, "sw": 1}))
    assert not better_sources(report, english, scores.languages)


def test_ties_and_missing_answers_are_no_answers() -> None:
    distributions = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.2, 0.2, 0.6]])
    assert answers_of(distributions).tolist() == [-1, -1, 2]
