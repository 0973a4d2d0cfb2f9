"""Scored candidates as arrays, and the metrics computed from them.

Compared with lm-evaluation-harness (EleutherAI, 4e7e0d4, lm_eval/api/task.py) and DCO's released code
(Betswish/ConsistencyRL, e0e8f46, probe.py and consistency.py). Their results were computed elsewhere and are in
golden_metrics.json next to the data; small ones are repeated here.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from math import exp, log
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from factories import golden_metrics, scored, scored_tables

from calm_ray.core.rows import Scored, table
from calm_ray.evaluation.score_report import count_distance, count_scores, distance_report, score_report
from calm_ray.evaluation.scores import Scores, columns_of_convention, scores_of
from calm_ray.methods.dco.gamma import gammas, optimal_logps
from calm_ray.methods.dco.settings import Dco


def scores_of_row(row: Scored, convention: str) -> Scores:
    return scores_of({"en": table(Scored, [row])}, convention)


def scores_of_rankings(rankings: dict[str, list[list[int]]], right: Sequence[int] | None = None) -> Scores:
    """Scores that rank the candidates in this order; `rankings` holds candidate indices, best first."""
    logps = {code: [[-float(one.index(c)) for c in range(len(one))] for one in rows] for code, rows in rankings.items()}
    return scores_of(scored_tables(logps, right))


def test_questions_with_fewer_candidates_are_padded() -> None:
    scores = scores_of(scored_tables({"en": [[-1, -2], [-3, -2, -1]], "fr": [[-4, -3], [-1, -3, -2]]}, [1, None]))
    assert (scores.questions, scores.languages) == (["q0", "q1"], ["en", "fr"])
    missing = -np.inf
    assert scores.logps.tolist() == [[[-1, -2, missing], [-3, -2, -1]], [[-4, -3, missing], [-1, -3, -2]]]
    assert scores.counts.tolist() == [2, 3]
    assert scores.right.tolist() == [1, -1]
    assert scores.answers.tolist() == [[0, 2], [1, 0]]


def test_questions_are_aligned_across_languages() -> None:
    en = [scored([-1, -2], "a"), scored([-3, -1], "b"), scored([-5, -6], "c")]
    fr = [scored([-7, -8], "c", "fr"), scored([-4, -9], "x", "fr"), scored([-2, -1], "a", "fr")]
    scores = scores_of({"en": table(Scored, en), "fr": table(Scored, fr)})
    assert scores.questions == ["a", "c"]
    assert scores.places.tolist() == [[0, 2], [2, 0]]
    assert scores.logps.tolist() == [[[-1, -2], [-5, -6]], [[-2, -1], [-7, -8]]]


def test_selected_questions_keep_their_scores() -> None:
    """As when a question was skipped under one policy but not under the other."""
    logps = {"en": [[-1, -2], [-3, -2, -1], [-5, -4]], "fr": [[-4, -3], [-1, -3, -2], [-6, -7]]}
    scores = scores_of(scored_tables(logps, [1, None, 0]))
    selected = scores.only({"q2", "q0", "another"})
    assert selected.questions == ["q0", "q2"]
    assert selected.answers.tolist() == [[0, 1], [1, 0]]
    assert (selected.counts.tolist(), selected.right.tolist()) == ([2, 2], [1, 0])


@pytest.mark.parametrize("convention", ["sum", "per_char", "per_byte", "mean_full"])
def test_empty_chunk_counts_nothing(convention: str) -> None:
    scores = scores_of(scored_tables({"en": [], "fr": []}), convention)
    counts = count_scores(scores)
    assert score_report(counts) == {}
    counts.update(count_distance(scores, scores, 1.0))
    assert not any(counts.values())


@pytest.mark.parametrize("convention", ["sum", "per_char", "per_byte", "mean_full"])
def test_convention_reads_only_its_columns_of_chunked_tables(convention: str) -> None:
    rows = [scored([-6, -9, -7], f"q{i}", choices=["東京", "Amsterdam", "Bo"], prompt_logp=-5) for i in range(4)]
    whole = table(Scored, rows)
    parts = pa.concat_tables([whole.slice(0, 1), whole.slice(1)]).select(columns_of_convention(convention))
    assert scores_of({"en": parts}, convention).scores.tolist() == scores_of({"en": whole}, convention).scores.tolist()


@pytest.mark.parametrize(
    ("logps", "choices", "expected"),
    [
        ([-6, -8, -5.5], ["Rome", "Amsterdam", "Bo"], {"sum": 2, "per_char": 1, "per_byte": 1}),
        ([-6, -9], ["東京", "Amsterdam"], {"sum": 0, "per_char": 1, "per_byte": 0}),
        ([-4, -4, -4], ["aa", "bbbb", "cccccccc"], {"sum": 0, "per_char": 2, "per_byte": 2}),
        ([-10, -11], ["Wien", "Вена"], {"sum": 0, "per_char": 0, "per_byte": 1}),
    ],
)
def test_answers_match_lm_evaluation_harness(logps: list[float], choices: list[str], expected: dict[str, int]) -> None:
    row = scored(logps, choices=choices)
    assert {name: int(scores_of_row(row, name).answers.item()) for name in expected} == expected


def test_dco_score_includes_the_prompt() -> None:
    """The mean over the prompt's three tokens after the first and the candidate's one or two."""
    row = scored([-4.0, -5.0], prompt="four", choices=["A", "BB"], prompt_logp=-6.0)
    assert scores_of_row(row, "mean_full").scores.tolist() == [[[pytest.approx(-2.5), pytest.approx(-2.2)]]]
    assert scores_of_row(row, "mean_full").answers.item() == 1
    assert scores_of_row(row, "sum").answers.item() == 0


def test_replaced_logps_keep_the_convention() -> None:
    scores = scores_of_row(scored([-4.0, -5.0], prompt="four", choices=["A", "BB"], prompt_logp=-6.0), "mean_full")
    other = replace(scores, logps=np.array([[[-2.0, -9.0]]]))
    assert other.scores.tolist() == [[[-2.0, -3.0]]]
    assert other.answers.item() == 0


def test_golden_multiple_choice(data: Path) -> None:
    for case in golden_metrics(data)["lm_eval_multiple_choice"]:
        row = scored(case["loglikelihoods"], choices=case["choices"], right=case["gold"])
        for convention, name in (("sum", ""), ("per_char", "_norm"), ("per_byte", "_bytes")):
            scores = scores_of_row(row, convention)
            assert scores.answers.item() == case["expected"][f"pred{name}"]
            accuracy = score_report(count_scores(scores))["accuracy"]["en"]
            assert accuracy == pytest.approx(case["expected"][f"acc{name}"], abs=1e-9)


def test_golden_candidate_score(data: Path) -> None:
    """DCO's code uses the negative mean, so the lowest wins there and the highest here."""
    for case in golden_metrics(data)["dco_candidate_score"]:
        prompt = case["prompt_token_logps_after_first"]
        row = scored(
            [sum(logps) for logps in case["candidates"].values()],
            prompt="x" * (len(prompt) + 1),
            choices=[name * len(logps) for name, logps in case["candidates"].items()],  # a token is a byte
            prompt_logp=sum(prompt),
        )
        scores = scores_of_row(row, "mean_full")
        assert (-scores.scores).ravel().tolist() == pytest.approx([*case["scores"].values()], abs=1e-9)
        names = list(case["candidates"])
        assert names[scores.answers.item()] == case["order"][0]
        assert names[scores_of_row(row, "sum").answers.item()] == case["order_by_sum_of_candidate_logps"][0]


def test_golden_top1_and_onlycorrect(data: Path) -> None:
    seen = 0
    for case in golden_metrics(data)["rankc"]:
        right = [answers[0] for answers in case["gold"]] if "gold" in case else None
        report = score_report(
            count_scores(scores_of_rankings({"en": case["ranking_l1"], "zh": case["ranking_l2"]}, right))
        )
        assert report["rankc"]["en-zh"] == report["rankc_mean"] == pytest.approx(case["rankc"], abs=1e-9)
        assert report["top1"] == pytest.approx(case["top1"], abs=1e-9)
        if right is not None:
            seen += 1
            assert report["top1_right"]["en-zh"] == pytest.approx(case["onlycorrect"], abs=1e-9)
    assert seen


def test_top1_and_onlycorrect_of_six_questions() -> None:
    """The golden case with questions of different sizes."""
    en = [[3, 1, 0, 2], [1, 2, 3, 0], [1, 0, 3, 2], [3, 2, 0, 1, 4], [8, 2, 5, 3, 4, 0, 7, 1, 9, 6], [1, 2, 0]]
    zh = [[1, 2, 0, 3], [1, 3, 2, 0], [3, 0, 1, 2], [3, 1, 2, 0, 4], [5, 3, 0, 9, 7, 6, 4, 1, 2, 8], [1, 0, 2]]
    scores = scores_of_rankings({"en": en, "zh": zh}, [1, 1, 3, 3, 5, 1])
    report = score_report(count_scores(scores))
    assert report["rankc"]["en-zh"] == pytest.approx(0.5187495726330799, abs=1e-9)
    assert (report["top1"], report["top1_right"]["en-zh"]) == (0.5, 0.5)


# Probability of the first of two candidates. The last question's right answer is unknown.
FIRST = {"en": [0.8, 0.2, 0.5, 0.9], "fr": [0.8, 0.7, 0.1, 0.9], "zh": [0.2, 0.2, 0.5, 0.9]}
RIGHT = [0, 1, 0, None]


def small_scores() -> Scores:
    return scores_of(scored_tables({code: [[log(p), log(1 - p)] for p in row] for code, row in FIRST.items()}, RIGHT))


def entropy(first: float) -> float:
    return -first * log(first) - (1 - first) * log(1 - first)


def test_report_on_a_small_example() -> None:
    report = score_report(count_scores(small_scores()))
    other = 1 / (1 + exp(1))  # RankC of two candidates in opposite orders: the weight of j = 2
    rankc = {"en-fr": (2 + 2 * other) / 4, "en-zh": (3 + other) / 4, "fr-zh": (1 + 3 * other) / 4}
    assert report["rankc"] == pytest.approx(rankc)
    assert report["rankc_mean"] == pytest.approx(fmean(rankc.values()))
    assert report["rankc_en"] == pytest.approx(fmean([rankc["en-fr"], rankc["en-zh"]]))
    assert report["top1"] == pytest.approx(0.5)
    assert report["consistency"] == {"2": pytest.approx(0.5), "3": pytest.approx(0.25)}
    assert report["accuracy"] == pytest.approx({"en": 1.0, "fr": 1 / 3, "zh": 2 / 3})
    assert report["accuracy_mean"] == pytest.approx(2 / 3)
    assert report["accuracy_others"] == pytest.approx(0.5)
    assert report["ac3"] == {"2": pytest.approx(4 / 7), "3": pytest.approx(4 / 11)}
    assert report["top1_right"] == pytest.approx({"en-fr": 1 / 3, "en-zh": 2 / 3, "fr-zh": 0.0})
    right, wrong = [entropy(p) for p in (0.8, 0.2, 0.5, 0.8, 0.2, 0.5)], [entropy(p) for p in (0.7, 0.1, 0.2)]
    for name, values in (("right", right), ("wrong", wrong)):
        assert report["entropy"][name] == pytest.approx({"mean": fmean(values), "deviation": pstdev(values)})


def test_report_without_gold_answers_has_no_accuracy() -> None:
    report = score_report(count_scores(scores_of_rankings({"fr": [[0, 1]], "zh": [[1, 0]]})))
    assert not report.keys() & {"accuracy", "accuracy_mean", "ac3", "top1_right", "entropy"}
    assert report["rankc_en"] is None  # no English either
    assert report["top1"] == 0.0


def test_mean_of_no_cases_is_null() -> None:
    report = score_report(count_scores(scores_of_rankings({"en": [[0, 1]], "fr": [[0, 1]]}, [1])))
    assert report["top1_right"] == {"en-fr": None}
    assert report["entropy"]["right"] == {"mean": None, "deviation": None}
    assert report["entropy"]["wrong"]["deviation"] == 0.0


def test_chunk_counts_add_up_after_a_json_round_trip() -> None:
    whole = small_scores()
    tables = scored_tables({code: [[log(p), log(1 - p)] for p in row] for code, row in FIRST.items()}, RIGHT)
    total: Counter[str] = Counter()
    for rows in ([0], [1, 2, 3]):
        total.update(json.loads(json.dumps(count_scores(scores_of({c: t.take(rows) for c, t in tables.items()})))))
    assert flatten(score_report(total)) == pytest.approx(flatten(score_report(count_scores(whole))))


def flatten(report: dict[str, Any], name: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in report.items():
        found |= flatten(value, f"{name}{key}/") if isinstance(value, dict) else {f"{name}{key}": value}
    return found


def test_margin_distance_is_the_remaining_dco_loss() -> None:
    """The mean of |beta m - target| over all pairs of candidates (DCO, Eq. 11), with questions of different sizes."""
    rng = np.random.default_rng(0)
    reference, policy = (
        {code: [rng.normal(size=n).tolist() for n in (2, 4, 3)] for code in ("en", "fr", "zh")} for _ in range(2)
    )
    settings, beta = Dco(gamma={"en-fr": 0.3, "zh-en": 2.0}), 0.5
    gamma = gammas(settings, list(reference), beta)
    distances, agreements = [], []
    for q, count in enumerate((2, 4, 3)):
        for i, code in enumerate(reference):
            for one, other in combinations(range(count), 2):
                ref = [row[q][one] - row[q][other] for row in reference.values()]
                margin = policy[code][q][one] - policy[code][q][other] - ref[i]
                distances.append(abs(beta * margin - sum(gamma[i, j] * ref[j] for j in range(3))))
            best = [
                reference[code][q][c] + sum(gamma[i, j] / beta * row[q][c] for j, row in enumerate(reference.values()))
                for c in range(count)
            ]
            agreements.append(best.index(max(best)) == policy[code][q].index(max(policy[code][q])))
    scores = scores_of(scored_tables(reference))
    optimal = replace(scores, logps=optimal_logps(scores.logps, gamma, beta))
    with np.errstate(all="raise"):
        report = distance_report(count_distance(scores_of(scored_tables(policy)), optimal, beta))
    assert report == pytest.approx({"top1_with_optimal": fmean(agreements), "margin_distance": fmean(distances)})
    assert 0 < fmean(agreements) < 1
    assert distance_report(count_distance(optimal, optimal, beta)) == {"top1_with_optimal": 1.0, "margin_distance": 0.0}
