"""Metrics, compared with SeaEval's code (SeaEval/SeaEval, dd3be0f, cross_lingual_assessment.py) and CALM's.

Their results were computed elsewhere and are in golden_metrics.json next to the data; a few small ones are repeated.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from factories import golden_metrics
from hypothesis import given
from hypothesis import strategies as st

from calm_ray.evaluation.metrics import ac3, accuracy, consistency, pairwise_agreement, unparseable

Letters = dict[str, list[str | None]]


def by_question(answers: Letters) -> dict[str, dict[str, str | None]]:
    return {code: {str(i): answer for i, answer in enumerate(column)} for code, column in answers.items()}


def test_consistency_on_a_small_example() -> None:
    answers = by_question({"en": ["A", "B", "C"], "zh": ["A", "B", "D"], "fr": ["A", "C", "D"]})
    # Pairs en-zh 2/3, en-fr 1/3, zh-fr 2/3; all three agree on one question of three.
    assert consistency(answers, 2) == pytest.approx(5 / 9)
    assert consistency(answers, 3) == pytest.approx(1 / 3)


def test_unparseable_answer_is_wrong_and_never_agrees() -> None:
    answers = by_question({"en": [None, "A"], "fr": [None, "A"]})
    assert consistency(answers, 2) == 0.5
    assert accuracy(answers["en"], {"0": "A", "1": "A"}) == 0.5
    assert unparseable(answers) == 0.5


def test_ac3() -> None:
    assert ac3(0.5, 0.5) == 0.5
    assert ac3(0.0, 0.0) == 0.0
    # CALM, Table 1, row Llama: accuracies of six languages, consistency 57.73, AC3 58.24.
    mean = sum([73.1, 52.1, 60.8, 59.8, 57.5, 49.2]) / 600
    assert ac3(mean, 0.5773) == pytest.approx(0.5824, abs=1e-4)


@given(st.lists(st.lists(st.sampled_from(["A", "B", None]), min_size=4, max_size=4), min_size=1, max_size=12))
def test_consistency_matches_brute_force_over_subsets(rows: list[list[str | None]]) -> None:
    answers = by_question({code: [row[i] for row in rows] for i, code in enumerate(["en", "fr", "ru", "zh"])})
    for size in (2, 3, 4):
        subsets = list(combinations(range(4), size))
        agreeing = sum(
            row[subset[0]] is not None and len({row[i] for i in subset}) == 1 for row in rows for subset in subsets
        )
        assert consistency(answers, size) == pytest.approx(agreeing / len(subsets) / len(rows))


def test_golden_consistency_and_ac3(data: Path) -> None:
    for case in golden_metrics(data)["consistency_s_ac3_s"]:
        answers = by_question(case["answers"])
        gold = {str(i): right for i, right in enumerate(case["gold"])}
        mean = sum(accuracy(answers[code], gold) for code in answers) / len(answers)
        assert mean == pytest.approx(case["expected"]["accuracy"], abs=1e-9)
        for size in range(2, len(answers) + 1):
            value = consistency(answers, size)
            assert value == pytest.approx(case["expected"][f"consistency_score_{size}"], abs=1e-9)
            assert ac3(mean, value) == pytest.approx(case["expected"][f"AC3_{size}"], abs=1e-9)


def test_golden_pairwise_agreement_and_its_released_quirk(data: Path) -> None:
    """CALM's function visits the languages in the order en, cn, fr, de, ja, it."""
    seen = 0
    for case in golden_metrics(data)["calm_pairwise_consistency"]:
        order = [code for code in ("en", "zh", "cn", "fr", "de", "ja", "it") if code in case["answers"]]
        columns = [case["answers"][code] for code in order]
        letters = np.array([["ABCDE".find(answer) for answer in row] for row in zip(*columns, strict=True)])
        for name, variant in (
            ("expected", "unequal"), ("expected_clean", "dropped"), ("expected_with_quirk", "released"),
        ):  # fmt: skip
            if name in case:
                seen += 1
                value = pairwise_agreement(letters, variant).mean()  # type: ignore[arg-type]
                assert value == pytest.approx(case[name], abs=1e-9), (case["name"], name)
    assert seen >= 4


def test_golden_ac3_of_printed_table(data: Path) -> None:
    for case in golden_metrics(data)["calm_table1_ac3_arithmetic"]:
        accuracies = case["accuracies_en_zh_fr_it_de_ja"]
        assert ac3(sum(accuracies) / 6, case["consistency"]) == pytest.approx(case["ac3"], abs=1e-9)
        assert (abs(case["ac3"] - case["printed_ac3"]) <= 0.01) == case["agrees"]


@given(st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=3, max_size=3), min_size=1, max_size=8))
def test_pairwise_agreement_equals_consistency_of_pairs(rows: list[list[int]]) -> None:
    answers = by_question(
        {code: [None if row[i] < 0 else "AB"[row[i]] for row in rows] for i, code in enumerate(["en", "fr", "ru"])}
    )
    assert pairwise_agreement(np.array(rows)).mean() == pytest.approx(consistency(answers, 2))
