"""Statistics of sampled answers, their votes and their pairs. Counts are additive over chunks.

Gold answers are only used to report the accuracy of a finished vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from calm_ray.core.rows import Pair
from calm_ray.evaluation.metrics import ac3, pairwise_agreement
from calm_ray.methods.calm.vote_audit import audit_of, count_audit
from calm_ray.methods.calm.voting import Ballots, Election
from calm_ray.prompts.extraction import NO_ANSWER, Ints, letter_index

AGREEMENT_BINS = 10


@dataclass(frozen=True)
class PairColumns:
    """P pairs as indices into the questions and languages of a `Ballots`, and into the letters."""

    question: Ints
    language: Ints
    chosen: Ints
    rejected: Ints
    chosen_language: Ints


def columns_of_pairs(pairs: Iterable[Pair], ballots: Ballots) -> PairColumns:
    questions = {key: i for i, key in enumerate(ballots.questions)}
    languages = {key: i for i, key in enumerate(ballots.languages)}
    rows = [
        (
            questions[pair["question_id"]],
            languages[pair["language"]],
            letter_index(pair["chosen_answer"]),
            letter_index(pair["rejected_answer"]),
            languages[pair["chosen_language"]],
        )
        for pair in pairs
    ]
    return PairColumns(*np.array(rows, dtype=np.int64).reshape(-1, 5).T)


def columns_of_ballots(ballots: Ballots, winners: Ints, losers: Ints) -> PairColumns:
    """Columns of the pairs given by winning and losing ballots."""
    return PairColumns(
        ballots.question[losers],
        ballots.language[losers],
        ballots.answer[winners],
        ballots.answer[losers],
        ballots.language[winners],
    )


def first_answers(ballots: Ballots, parseable: bool) -> Ints:
    """[Q, L], the answer of each language's first completion, or first parseable one; NO_ANSWER if there is none."""
    count = len(ballots.answer)
    candidates = np.flatnonzero(ballots.answer != NO_ANSWER) if parseable else np.arange(count)
    first = np.full(len(ballots.questions) * len(ballots.languages), count)
    np.minimum.at(first, ballots.own[candidates], candidates)
    return np.append(ballots.answer, NO_ANSWER)[first].reshape(len(ballots.questions), len(ballots.languages))


def count_samples(
    ballots: Ballots, election: Election, pairs: PairColumns, right: Ints, *, as_released: bool
) -> Counter[str]:
    """Counts of one chunk for `sample_report`; keys per language or bin are `name/language` or `name/bin`.

    `right` [Q] are the gold answers, NO_ANSWER if unknown.

    `as_released` computes the metrics like CALM's published figures: a language answers with its first parseable
    completion, and Consistency skips questions that some language does not answer. Otherwise the first completion
    counts, and an unparseable one is wrong and agrees with nothing.
    """
    languages = ballots.languages
    known = right != NO_ANSWER
    counts: Counter[str] = Counter()

    def by_language(name: str, language: Ints) -> None:
        for code, count in zip(languages, np.bincount(language, minlength=len(languages)), strict=True):
            counts[f"{name}/{code}"] += int(count)

    together, parseable = election.together, ballots.answer != NO_ANSWER
    counts["questions"] = len(ballots.questions)
    counts["tied"] = int(together.tied.sum())
    counts["known"] = int(known.sum())
    counts["vote_right"] = int((known & (together.winner == right)).sum())
    agreement = np.minimum((together.agreement * AGREEMENT_BINS).astype(np.int64), AGREEMENT_BINS - 1)
    for bin_number, count in enumerate(np.bincount(agreement[together.counts.any(axis=1)], minlength=AGREEMENT_BINS)):
        counts[f"agreement/{bin_number}"] = int(count)

    counts["completions"] = len(ballots.answer)
    counts["unparseable"] = int((~parseable).sum())
    is_right = known[ballots.question] & (ballots.answer == right[ballots.question])
    by_language("samples", ballots.language[known[ballots.question]])
    by_language("sample_right", ballots.language[is_right])
    by_language("positives", ballots.language[parseable & (ballots.answer == together.winner[ballots.question])])

    # A question may be missing in a language because its translation failed; it does not count for that language.
    was_asked = (
        np.bincount(ballots.own, minlength=len(ballots.questions) * len(languages)).reshape(-1, len(languages)) > 0
    )
    by_language("asked", np.nonzero(was_asked & known[:, None])[1])
    own_right = (election.alone.winner.reshape(-1, len(languages)) == right[:, None]) & known[:, None]
    first = first_answers(ballots, parseable=as_released)
    first_right = (first == right[:, None]) & known[:, None]
    by_language("own_vote_right", np.nonzero(own_right)[1])
    by_language("answer_right", np.nonzero(first_right)[1])
    if len(languages) > 1:
        compared = first[((first != NO_ANSWER) if as_released else was_asked).all(axis=1)]
        counts["compared"] = len(compared)
        counts["agreeing"] = float(pairwise_agreement(compared).sum())  # type: ignore[assignment]

    known_pairs = known[pairs.question]
    counts["pairs"] = len(pairs.question)
    counts["translated"] = int((pairs.language != pairs.chosen_language).sum())
    counts["known_pairs"] = int(known_pairs.sum())
    for side, letters in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
        counts[f"{side}_right"] = int((known_pairs & (letters == right[pairs.question])).sum())
    by_language("pairs_in", pairs.language)
    by_language("chosen_from", pairs.chosen_language)
    if len(languages) > 1:
        counts.update(count_audit(ballots, election, right))
    return counts


def sample_report(counts: Counter[str]) -> dict[str, Any]:
    """The outcome of a vote and, if gold is known, its accuracy and that of each language alone. Fractions, 0 to 1.

    `positives`: winning completions by language (CALM, Table 7). `pairs_by_language`: pairs by language of the losing
    side, as counts (Table 8). `chosen_from`: pairs by original language of the winning side. `agreement`: questions by
    the fraction of parseable answers equal to the most frequent one, in tenths. A language's accuracy is measured in
    three ways: `sample_accuracy` over single completions, `own_vote_accuracy` of their majority, and
    `accuracy_by_language` of the first completion, which `consistency` and `ac3` also use. None without gold answers.
    `audit`: see `calm_ray.methods.calm.vote_audit.audit_of`; None with a single language.
    """

    def by_language(name: str) -> dict[str, int]:
        return {key.partition("/")[2]: count for key, count in counts.items() if key.startswith(f"{name}/")}

    def fractions(name: str) -> dict[str, float]:
        total = sum(by_language(name).values())
        return {code: count / max(1, total) for code, count in by_language(name).items()}

    report: dict[str, Any] = {
        "questions": counts["questions"],
        "completions": counts["completions"],
        "pairs": counts["pairs"],
        "pairs_by_language": by_language("pairs_in"),
        "accuracy_by_language": None,
        "vote_accuracy": None,
        "consistency": counts["agreeing"] / counts["compared"] if counts["compared"] else None,
        "ac3": None,
        "unparseable_samples": counts["unparseable"] / max(1, counts["completions"]),
        "tied": counts["tied"] / max(1, counts["questions"]),
        "translated": counts["translated"] / max(1, counts["pairs"]),
        "positives": fractions("positives"),
        "chosen_from": fractions("chosen_from"),
        "agreement": fractions("agreement"),
        "audit": audit_of(counts) if len(by_language("pairs_in")) > 1 else None,
    }
    if known := counts["known"]:
        samples, asked = by_language("samples"), by_language("asked")
        answer = {code: n / max(1, asked[code]) for code, n in by_language("answer_right").items()}
        report |= {
            "vote_accuracy": counts["vote_right"] / known,
            "sample_accuracy": {code: n / max(1, samples[code]) for code, n in by_language("sample_right").items()},
            "own_vote_accuracy": {code: n / max(1, asked[code]) for code, n in by_language("own_vote_right").items()},
            "accuracy_by_language": answer,
        }
        if report["consistency"] is not None:
            report["ac3"] = ac3(sum(answer.values()) / len(answer), report["consistency"])
    if pairs := counts["known_pairs"]:
        wrong = pairs - counts["chosen_right"] - counts["rejected_right"]
        report |= {name: counts[name] / pairs for name in ("chosen_right", "rejected_right")}
        report["both_wrong"] = wrong / pairs
    return report
