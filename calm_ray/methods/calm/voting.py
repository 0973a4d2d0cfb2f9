"""The vote: what a model says most often, over all languages, is taken for what it knows (CALM, section 2.2).

Columns in, columns out: the ballots of a whole chunk of questions are counted at once.
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
from calm_ray.prompts.extraction import NOBODY, Ints, letter, letter_index
from calm_ray.prompts.questions import LETTERS


@dataclass(frozen=True)
class Ballots:
    """One ballot for each of n completions, in the order in which they were given. Every ballot counts the same."""

    questions: list[str]
    """The ids of the Q questions."""
    languages: list[str]
    question: Ints
    """[n], indices into `questions`."""
    language: Ints
    """[n], indices into `languages`."""
    answer: Ints
    """[n], indices into the letters, NOBODY where an answer could not be read."""

    @property
    def own(self) -> Ints:
        """[n], the number of each ballot's question in its language alone, from 0 to Q * L - 1."""
        return self.question * len(self.languages) + self.language


@dataclass(frozen=True)
class Verdict:
    """What the ballots of each of G groups say together."""

    counts: Ints
    """[G, letters]"""
    winner: Ints
    """[G], NOBODY where there is none."""
    tied: NDArray[np.bool_]
    """[G], whether several answers are the most frequent."""

    @property
    def agreement(self) -> NDArray[np.float64]:
        """[G], the share of the readable answers that the most frequent one has; 0 where none is readable."""
        return self.counts.max(axis=1) / np.maximum(self.counts.sum(axis=1), 1)


@dataclass(frozen=True)
class Election:
    """The vote on each question over all languages, and that of each language alone."""

    together: Verdict
    """G = Q."""
    alone: Verdict
    """G = Q * L."""


def ballots_of(completions: Sequence[Completion]) -> Ballots:
    """The ballots of completions, in their order."""
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
    """[n], the ballots' numbers language by language in the order of `preferences.merge_order`.

    Languages that it does not name come before, in the order of the data; within a language, ballots keep their order.
    """
    ranks = [order.index(code) if (code := language_code(name)) in order else NOBODY for name in ballots.languages]
    rank = np.array(ranks, dtype=np.int64)[ballots.language]
    return np.argsort(rank, kind="stable").astype(np.int64)


def elect(ballots: Ballots, preferences: Preferences, seed: int, right: Ints | None = None) -> Election:
    """The vote on every question.

    `winner: random` (a control) draws from the answers that were given, each once. `winner: gold` (a baseline, the only
    user of `right` [Q], see `right_answers`) keeps the vote only where it is right. Unreadable completions do not vote.
    """
    questions, languages = len(ballots.questions), len(ballots.languages)
    alone = _count(ballots, ballots.own, questions * languages, preferences)
    together = _count(ballots, ballots.question, questions, preferences)
    if preferences.winner == "random":
        together = _drawn(together, ballots.questions, seed)
        alone = _drawn(alone, np.repeat(ballots.questions, languages).tolist(), seed)
    if preferences.winner == "gold":
        if right is None:
            raise ValueError("winner: gold needs the gold answers")
        together = _only(together, right)
        alone = _only(alone, np.repeat(right, languages))
    return Election(together, alone)


def right_answers(ballots: Ballots, gold: Mapping[str, str]) -> Ints:
    """[Q], the right answers; NOBODY where `gold` (question_id -> letter) does not have one."""
    return np.array([letter_index(gold.get(question)) for question in ballots.questions], dtype=np.int64)


def _count(ballots: Ballots, group: Ints, groups: int, preferences: Preferences) -> Verdict:
    letters = int(ballots.answer.max(initial=0)) + 1
    readable = ballots.answer != NOBODY
    cells = group[readable] * letters + ballots.answer[readable]
    counts = np.bincount(cells, minlength=groups * letters).reshape(groups, letters)
    top = counts.max(axis=1, keepdims=True)
    leading = (counts == top) & (counts > 0)
    tied = leading.sum(axis=1) > 1
    winner = counts.argmax(axis=1)  # of tied answers the smallest
    if tied.any() and preferences.ties in TIE_RULES:
        rank = TIE_RULES[preferences.ties](ballots, group, counts, tied, preferences)
        winner = np.where(tied, np.where(leading, rank, np.inf).argmin(axis=1), winner)
    agreement = top[:, 0] / np.maximum(counts.sum(axis=1), 1)
    has_winner = leading.any(axis=1) & (agreement >= preferences.minimum_agreement)
    if preferences.ties == "drop":
        has_winner &= ~tied
    return Verdict(counts, np.where(has_winner, winner, NOBODY), tied)


def _first_ranks(
    ballots: Ballots, group: Ints, counts: Ints, tied: NDArray[np.bool_], preferences: Preferences
) -> NDArray[np.float64]:
    """[G, letters], where in `merge_order` an answer was first given; for tied groups."""
    order = merge_order(ballots, preferences.merge_order)
    order = order[(ballots.answer[order] != NOBODY) & tied[group[order]]]
    first = np.full(counts.shape, np.inf)
    np.minimum.at(first, (group[order], ballots.answer[order]), np.arange(len(order)))
    return first


def _entropy_ranks(
    ballots: Ballots, group: Ints, counts: Ints, tied: NDArray[np.bool_], preferences: Preferences
) -> NDArray[np.float64]:
    """[G, letters], in nats: how undecided the languages are that an answer's ballots come from, in the mean.

    A language's entropy is that of its own samples' answers to the question: 0 where they all say the same.
    """
    letters = counts.shape[1]
    readable = ballots.answer != NOBODY
    own, answer = ballots.own[readable], ballots.answer[readable]
    cells = len(ballots.questions) * len(ballots.languages)
    of_language = np.bincount(own * letters + answer, minlength=cells * letters).reshape(cells, letters)
    share = of_language / np.maximum(of_language.sum(axis=1, keepdims=True), 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1)
    total = np.zeros(counts.shape)
    np.add.at(total, (group[readable], answer), entropy[own])
    # Rounded, since sums of the same numbers in another order must tie.
    return np.round(total / np.maximum(counts, 1), 12)


TIE_RULES = {"first": _first_ranks, "lowest_entropy": _entropy_ranks}
"""By what the smallest of tied answers wins; where that ties as well, the alphabetically smallest."""


def _drawn(verdict: Verdict, questions: Sequence[str], seed: int) -> Verdict:
    winner = np.full(len(questions), NOBODY)
    for number, (question_id, counts) in enumerate(zip(questions, verdict.counts, strict=True)):
        if counts.any():
            winner[number] = rng_of(seed, "winner", question_id).choice(np.flatnonzero(counts).tolist())
    return Verdict(verdict.counts, winner, np.zeros(len(questions), dtype=np.bool_))


def _only(verdict: Verdict, right: Ints) -> Verdict:
    return Verdict(verdict.counts, np.where(verdict.winner == right, verdict.winner, NOBODY), verdict.tied)


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
