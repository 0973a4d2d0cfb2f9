"""Pairs winning with losing ballots, by index. Does not use gold answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from calm_ray.core.languages import language_code
from calm_ray.core.seeds import rng_of
from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.voting import Ballots, Election, merge_order
from calm_ray.prompts.extraction import NO_ANSWER, Ints

Texts = Sequence[str]
"""A sequence or an Arrow array."""


@dataclass(frozen=True)
class Judgment:
    """Which ballots win and lose, and in which vote.

    Votes are numbered: q for the joint vote on question q, Q + `Ballots.own` for the vote of one language.
    """

    losers: Ints
    """The losing ballots, grouped by question."""
    losers_vote: Ints
    """The vote that each of them lost."""
    winners: Ints
    """The ballots with a vote's winning answer: those of joint votes in ballot order, then those of single languages. A
    ballot may win in both."""
    winners_vote: Ints


def judge(ballots: Ballots, election: Election, preferences: Preferences, seed: int) -> Judgment:
    """Determines the winning and losing ballots.

    All languages take part in the joint vote on a question. Those in `preferences.judged_alone`, or all of them with
    `scope: own_language`, are judged by their own vote instead and paired with its winners. A parseable ballot loses if
    its answer differs from the winner of its vote.
    """
    alone = _judged_alone(ballots.languages, preferences)[ballots.language]
    own = len(ballots.questions) + ballots.own
    winner = np.concatenate([election.together.winner, election.alone.winner])
    vote = np.where(alone, own, ballots.question)
    is_loser = (ballots.answer != NO_ANSWER) & (winner[vote] != NO_ANSWER) & (ballots.answer != winner[vote])
    losers = np.flatnonzero(is_loser)
    losers = losers[np.argsort(ballots.question[losers], kind="stable")]
    if preferences.negatives is not None:
        losers = _subsample(losers, ballots, preferences.negatives, seed)
    parseable = ballots.answer != NO_ANSWER
    together, apart = (np.flatnonzero(parseable & (ballots.answer == winner[of])) for of in (ballots.question, own))
    return Judgment(
        losers,
        vote[losers],
        np.concatenate([together, apart]),
        np.concatenate([ballots.question[together], own[apart]]),
    )


def _judged_alone(languages: Sequence[str], preferences: Preferences) -> NDArray[np.bool_]:
    every = preferences.scope == "own_language"
    return np.array([every or language_code(code) in preferences.judged_alone for code in languages], dtype=np.bool_)


def _subsample(losers: Ints, ballots: Ballots, limit: int, seed: int) -> Ints:
    """Draws at most `limit` losers per question and language; keeps their order."""
    groups: dict[int, list[int]] = defaultdict(list)
    for position, own in enumerate(ballots.own[losers].tolist()):
        groups[own].append(position)
    kept: list[int] = []
    for own, positions in groups.items():
        question, language = divmod(own, len(ballots.languages))
        rng = rng_of(seed, "negatives", ballots.questions[question], ballots.languages[language])
        kept += positions if len(positions) <= limit else rng.sample(positions, limit)
    return losers[sorted(kept)]


def same_language_first(
    ballots: Ballots, judgment: Judgment, texts: Texts, preferences: Preferences, seed: int
) -> tuple[Ints, Ints]:
    """(winning, losing) ballots: pairs each loser with `positives` winners, preferring those in its own language.

    The order is otherwise random. Identical texts count once, so that a loser's positives differ.
    """
    winners: dict[int, list[int]] = defaultdict(list)
    for vote, winner in zip(judgment.winners_vote.tolist(), judgment.winners.tolist(), strict=True):
        winners[vote].append(winner)
    language, question = ballots.language.tolist(), ballots.question.tolist()
    text = pa.array(texts).dictionary_encode().indices.to_pylist()  # identical texts share a number
    rngs = {
        vote: rng_of(seed, "pairs", ballots.questions[question[winners[vote][0]]])
        for vote in dict.fromkeys(judgment.losers_vote.tolist())
    }
    pairs: list[tuple[int, int]] = []
    for vote, loser in zip(judgment.losers_vote.tolist(), judgment.losers.tolist(), strict=True):
        order = rngs[vote].sample(winners[vote], len(winners[vote]))
        order.sort(key=lambda winner: language[winner] != language[loser])
        distinct = {(language[winner], text[winner]): winner for winner in reversed(order)}
        positives = [winner for winner in order if distinct[language[winner], text[winner]] == winner]
        pairs += [(winner, loser) for winner in positives[: preferences.positives]]
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def last_in_merge_order(
    ballots: Ballots, judgment: Judgment, texts: Texts, preferences: Preferences, seed: int
) -> tuple[Ints, Ints]:
    """(winning, losing) ballots: pairs all losers of a vote with its last winner in `merge_order`.

    Reproduces the published files, where this is an English answer whenever one wins.
    """
    order = merge_order(ballots, preferences.merge_order)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    last = np.full(len(ballots.questions) * (1 + len(ballots.languages)), NO_ANSWER)
    np.maximum.at(last, judgment.winners_vote, rank[judgment.winners])
    return order[last[judgment.losers_vote]], judgment.losers


PAIRINGS: dict[str, Callable[[Ballots, Judgment, Texts, Preferences, int], tuple[Ints, Ints]]] = {
    "same_language": same_language_first,
    "last": last_in_merge_order,
}
"""Values of `preferences.positive`."""


def pair_up(
    ballots: Ballots, election: Election, texts: Texts, preferences: Preferences, seed: int
) -> tuple[Ints, Ints]:
    """(winning, losing) ballots of all pairs, grouped by question. `texts` [n] are the completions."""
    judgment = judge(ballots, election, preferences, seed)
    return PAIRINGS[preferences.positive](ballots, judgment, texts, preferences, seed)
