"""The vote: the answer a model gives most often across languages is taken as what it knows (CALM, section 2.2).

Vectorized: counts the ballots of a whole chunk of questions at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calm_ray.core.languages import language_code
from calm_ray.core.rows import Completion, Vote
from calm_ray.core.seeds import rng_of
from calm_ray.methods.calm.settings import Preferences
from calm_ray.prompts.extraction import NO_ANSWER, Ints, letter, letter_index
from calm_ray.prompts.questions import LETTERS


@dataclass(frozen=True)
class Ballots:
    """One ballot for each of n completions, in order. All ballots count equally."""

    questions: list[str]
    """The ids of the Q questions."""
    languages: list[str]
    question: Ints
    """[n], indices into `questions`."""
    language: Ints
    """[n], indices into `languages`."""
    answer: Ints
    """[n], indices into the letters; NO_ANSWER if the answer is unparseable."""

    @property
    def own(self) -> Ints:
        """[n], index of each ballot's (question, language), 0 to Q * L - 1."""
        return self.question * len(self.languages) + self.language


@dataclass(frozen=True)
class Verdict:
    """The result of a vote within each of G groups of ballots."""

    counts: Ints
    """[G, letters]"""
    winner: Ints
    """[G], NO_ANSWER if there is none."""
    tied: NDArray[np.bool_]
    """[G], whether several answers are most frequent."""

    @property
    def agreement(self) -> NDArray[np.float64]:
        """[G], the fraction of parseable answers equal to the most frequent one; 0 if none is parseable."""
        return self.counts.max(axis=1) / np.maximum(self.counts.sum(axis=1), 1)


@dataclass(frozen=True)
class Election:
    """The joint vote of all languages on each question, and the vote of each language alone."""

    together: Verdict
    """G = Q."""
    alone: Verdict
    """G = Q * L."""


def ballots_of(completions: Sequence[Completion]) -> Ballots:
    """One ballot per completion, in order."""
    questions = {key: i for i, key in enumerate(dict.fromkeys(row["question_id"] for row in completions))}
    languages = {key: i for i, key in enumerate(dict.fromkeys(row["language"] for row in completions))}
    return Ballots(
        questions=list(questions),
        languages=list(languages),
        question=np.array([questions[row["question_id"]] for row in completions], dtype=np.int64),
        language=np.array([languages[row["language"]] for row in completions], dtype=np.int64),
        answer=np.array([letter_index(row["answer"]) for row in completions], dtype=np.int64),
    )


def merge_order(ballots: Ballots, order: Sequence[str]) -> Ints:
    """[n], ballot indices sorted by language in the given order (`preferences.merge_order`). The sort is stable.

    Languages not in `order` come first, with their ballots in the order of the data.
    """
    ranks = [order.index(code) if (code := language_code(name)) in order else NO_ANSWER for name in ballots.languages]
    rank = np.array(ranks, dtype=np.int64)[ballots.language]
    return np.argsort(rank, kind="stable").astype(np.int64)


def elect(ballots: Ballots, preferences: Preferences, seed: int, right: Ints | None = None) -> Election:
    """Holds the vote on every question. Unparseable completions do not vote.

    `winner: random` (a control) draws uniformly from the distinct answers given. `winner: gold` (a baseline) keeps the
    winner only if it is correct; only it uses `right` [Q], see `right_answers`.
    """
    questions, languages = len(ballots.questions), len(ballots.languages)
    alone = _count(ballots, ballots.own, questions * languages, preferences)
    together = _count(ballots, ballots.question, questions, preferences)
    if preferences.winner == "random":
        together = _randomize(together, ballots.questions, seed)
        alone = _randomize(alone, np.repeat(ballots.questions, languages).tolist(), seed)
    if preferences.winner == "gold":
        if right is None:
            raise ValueError("winner: gold needs the gold answers")
        together = _keep_right(together, right)
        alone = _keep_right(alone, np.repeat(right, languages))
    return Election(together, alone)


def right_answers(ballots: Ballots, gold: Mapping[str, str]) -> Ints:
    """[Q], the gold answers; NO_ANSWER for questions missing in `gold` (question_id -> letter)."""
    return np.array([letter_index(gold.get(question)) for question in ballots.questions], dtype=np.int64)


def _count(ballots: Ballots, group: Ints, groups: int, preferences: Preferences) -> Verdict:
    letters = int(ballots.answer.max(initial=0)) + 1
    parseable = ballots.answer != NO_ANSWER
    cells = group[parseable] * letters + ballots.answer[parseable]
    counts = np.bincount(cells, minlength=groups * letters).reshape(groups, letters)
    top = counts.max(axis=1, keepdims=True)
    leading = (counts == top) & (counts > 0)
    tied = leading.sum(axis=1) > 1
    winner = counts.argmax(axis=1)  # the smallest of tied answers
    if tied.any() and preferences.ties in TIE_RULES:
        rank = TIE_RULES[preferences.ties](ballots, group, counts, tied, preferences)
        winner = np.where(tied, np.where(leading, rank, np.inf).argmin(axis=1), winner)
    agreement = top[:, 0] / np.maximum(counts.sum(axis=1), 1)
    has_winner = leading.any(axis=1) & (agreement >= preferences.min_agreement)
    if preferences.ties == "drop":
        has_winner &= ~tied
    return Verdict(counts, np.where(has_winner, winner, NO_ANSWER), tied)


def _first_ranks(
    ballots: Ballots, group: Ints, counts: Ints, tied: NDArray[np.bool_], preferences: Preferences
) -> NDArray[np.float64]:
    """[G, letters], position in `merge_order` at which each answer first occurs; tied groups only."""
    order = merge_order(ballots, preferences.merge_order)
    order = order[(ballots.answer[order] != NO_ANSWER) & tied[group[order]]]
    first = np.full(counts.shape, np.inf)
    np.minimum.at(first, (group[order], ballots.answer[order]), np.arange(len(order)))
    return first


def _entropy_ranks(
    ballots: Ballots, group: Ints, counts: Ints, tied: NDArray[np.bool_], preferences: Preferences
) -> NDArray[np.float64]:
    """[G, letters], in nats: mean entropy of the languages of each answer's ballots.

    A language's entropy is that of its sampled answers to the question: 0 if they are all identical.
    """
    letters = counts.shape[1]
    parseable = ballots.answer != NO_ANSWER
    own, answer = ballots.own[parseable], ballots.answer[parseable]
    cells = len(ballots.questions) * len(ballots.languages)
    of_language = np.bincount(own * letters + answer, minlength=cells * letters).reshape(cells, letters)
    fraction = of_language / np.maximum(of_language.sum(axis=1, keepdims=True), 1)
    entropy = -(fraction * np.log(np.where(fraction > 0, fraction, 1.0))).sum(axis=1)
    total = np.zeros(counts.shape)
    np.add.at(total, (group[parseable], answer), entropy[own])
    # Round so that sums of the same numbers in a different order still tie.
    return np.round(total / np.maximum(counts, 1), 12)


TIE_RULES = {"first": _first_ranks, "lowest_entropy": _entropy_ranks}
"""The tied answer with the lowest rank wins; if that ties as well, the alphabetically first."""


def _randomize(verdict: Verdict, questions: Sequence[str], seed: int) -> Verdict:
    winner = np.full(len(questions), NO_ANSWER)
    for number, (question_id, counts) in enumerate(zip(questions, verdict.counts, strict=True)):
        if counts.any():
            winner[number] = rng_of(seed, "winner", question_id).choice(np.flatnonzero(counts).tolist())
    return Verdict(verdict.counts, winner, np.zeros(len(questions), dtype=np.bool_))


def _keep_right(verdict: Verdict, right: Ints) -> Verdict:
    return Verdict(verdict.counts, np.where(verdict.winner == right, verdict.winner, NO_ANSWER), verdict.tied)


def vote_rows(ballots: Ballots, election: Election) -> list[Vote]:
    """The votes as rows, in the order of `ballots.questions`."""
    together, languages = election.together, ballots.languages
    alone = election.alone.winner.reshape(len(ballots.questions), len(languages))
    return [
        Vote(
            question_id=question_id,
            counts={LETTERS[i]: int(count) for i, count in enumerate(together.counts[number]) if count},
            winner=letter(together.winner[number]),
            agreement=float(together.agreement[number]),
            tied=bool(together.tied[number]),
            by_language={language: letter(alone[number, i]) for i, language in enumerate(languages)},
        )
        for number, question_id in enumerate(ballots.questions)
    ]
