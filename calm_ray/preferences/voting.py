"""The vote: what a model says most often, over all languages, is taken for what it knows (CALM, section 2.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from calm_ray.config import Preferences
from calm_ray.rows import Completion, Vote
from calm_ray.seeds import rng_of


def most_frequent(answers: Sequence[str | None], ties: str) -> tuple[str | None, bool]:
    """The winner among the readable answers, and whether the top was tied.

    Every sample counts the same. `ties` "drop": a tie has no winner; "smallest": the alphabetically first of the tied.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return None, False
    top = max(counts.values())
    tied = sorted(answer for answer, count in counts.items() if count == top)
    if len(tied) == 1:
        return tied[0], False
    return (None if ties == "drop" else tied[0]), True


def vote(completions: Sequence[Completion], preferences: Preferences, seed: int) -> Vote:
    """The vote on one question, from all of its completions in all languages.

    With `winner: random` (a control) the winner is drawn from the answers that were given, each once.
    Unreadable completions do not vote.
    """
    answers = [row["answer"] for row in completions]
    question_id = completions[0]["question_id"]
    counts = Counter(answer for answer in answers if answer is not None)
    winner, tied = most_frequent(answers, preferences.ties)
    if preferences.winner == "random" and counts:
        winner, tied = rng_of(seed, "winner", question_id).choice(sorted(counts)), False
    languages = dict.fromkeys(row["language"] for row in completions)
    by_language = {
        code: most_frequent([row["answer"] for row in completions if row["language"] == code], preferences.ties)[0]
        for code in languages
    }
    return Vote(
        question_id=question_id,
        counts=dict(sorted(counts.items())),
        winner=winner,
        agreement=max(counts.values()) / counts.total() if counts else 0.0,
        tied=tied,
        by_language=by_language,
    )
