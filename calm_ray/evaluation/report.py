"""What a round's rows say in numbers: the entry of summary.json, and what gold answers say of a vote."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from calm_ray.evaluation.metrics import ac3, accuracy, consistency, unreadable
from calm_ray.rows import Completion, Pair, Prediction, Question, Vote


def gold_of(questions: Iterable[Question]) -> dict[str, str]:
    """question_id -> right letter, where it is known."""
    return {row["question_id"]: row["gold"] for row in questions if row["gold"] is not None}


def evaluation_report(predictions: Iterable[Prediction], gold: Mapping[str, str]) -> dict[str, Any]:
    """Accuracy, Consistency_s and AC3_s for s = 2 ... L, and the share of unreadable answers, of one policy."""
    answers: dict[str, dict[str, str | None]] = defaultdict(dict)
    for row in predictions:
        answers[row["language"]][row["question_id"]] = row["answer"]
    by_language = {language: accuracy(of_language, gold) for language, of_language in answers.items()}
    mean = sum(by_language.values()) / len(by_language)
    consistencies = {str(size): consistency(answers, size) for size in range(2, len(answers) + 1)}
    return {
        "accuracy": by_language,
        "accuracy_mean": mean,
        "consistency": consistencies,
        "ac3": {size: ac3(mean, value) for size, value in consistencies.items()},
        "unreadable": unreadable(answers),
    }


def count_votes(
    votes: Iterable[Vote], completions: Iterable[Completion], pairs: Iterable[Pair], gold: Mapping[str, str]
) -> Counter[str]:
    """What `vote_report` needs of one chunk; counts of chunks add up.

    Where gold is known, a question without a winner counts as wrong.
    """
    counts: Counter[str] = Counter()
    winners = {row["question_id"]: row["winner"] for row in votes}
    for row in votes:
        right = gold.get(row["question_id"])
        counts["questions"] += 1
        counts["tied"] += row["tied"]
        counts["known"] += right is not None
        counts["vote_right"] += right is not None and row["winner"] == right
        for language, winner in row["by_language"].items():
            counts[f"own_vote_right/{language}"] += right is not None and winner == right
    for completion in completions:
        language, answer, question_id = completion["language"], completion["answer"], completion["question_id"]
        counts["completions"] += 1
        counts["unreadable"] += answer is None
        counts[f"positives/{language}"] += answer is not None and answer == winners.get(question_id)
        counts[f"samples/{language}"] += question_id in gold
        counts[f"sample_right/{language}"] += question_id in gold and answer == gold[question_id]
    for pair in pairs:
        counts["pairs"] += 1
        counts["carried"] += pair["language"] != pair["chosen_language"]
        counts["known_pairs"] += pair["question_id"] in gold
        counts["chosen_right"] += pair["chosen_answer"] == gold.get(pair["question_id"])
    return counts


def vote_report(counts: Counter[str]) -> dict[str, Any]:
    """How the vote went, and, where gold is known, how right it is on the sampled questions and each language alone.

    `positives` is the share of the winning completions by language; `sample_accuracy` that of a language's single
    samples, `own_vote_accuracy` that of its samples' own majority.
    """

    def by_language(name: str) -> dict[str, int]:
        return {key.split("/")[1]: count for key, count in counts.items() if key.startswith(f"{name}/")}

    winning = by_language("positives")
    report: dict[str, Any] = {
        "unreadable_samples": counts["unreadable"] / max(1, counts["completions"]),
        "tied": counts["tied"] / max(1, counts["questions"]),
        "carried": counts["carried"] / max(1, counts["pairs"]),
        "positives": {code: count / max(1, sum(winning.values())) for code, count in winning.items()},
    }
    if counts["known"]:
        samples = by_language("samples")
        report["vote_accuracy"] = counts["vote_right"] / counts["known"]
        report["sample_accuracy"] = {code: n / max(1, samples[code]) for code, n in by_language("sample_right").items()}
        report["own_vote_accuracy"] = {code: n / counts["known"] for code, n in by_language("own_vote_right").items()}
        report["chosen_right"] = counts["chosen_right"] / counts["known_pairs"] if counts["known_pairs"] else None
    return report
