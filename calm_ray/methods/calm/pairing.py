"""Which completion is paired with which: winning and losing ballots, by number. Gold answers play no part here."""

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
from calm_ray.prompts.extraction import NOBODY, Ints

Texts = Sequence[str]
"""Or an Arrow array of texts."""


@dataclass(frozen=True)
class Judgement:
    """Which ballots win and lose, each in the vote that judges it.

    Votes are numbered: that of question q is q, that of a language alone is Q + its number among the Q * L.
    """

    losers: Ints
    """The losing ballots, question by question."""
    losers_vote: Ints
    """The vote that judges each of them."""
    winners: Ints
    """The ballots with a vote's winning answer, in the order of the ballots; a ballot may win in two votes."""
    winners_vote: Ints


def judge(ballots: Ballots, election: Election, preferences: Preferences, seed: int) -> Judgement:
    """Every ballot beside the vote that judges it.

    All languages vote in every question's vote. Those of `preferences.judged_alone`, or all of them with `scope:
    own_language`, are judged by their own vote instead, and learn from their own winners. A losing ballot is a readable
    one with another answer than its vote's.
    """
    alone = _judged_alone(ballots.languages, preferences)[ballots.language]
    own = len(ballots.questions) + ballots.own
    winner = np.concatenate([election.together.winner, election.alone.winner])
    vote = np.where(alone, own, ballots.question)
    is_loser = (ballots.answer != NOBODY) & (winner[vote] != NOBODY) & (ballots.answer != winner[vote])
    losers = np.flatnonzero(is_loser)
    losers = losers[np.argsort(ballots.question[losers], kind="stable")]
    if preferences.negatives is not None:
        losers = _some_of_each(losers, ballots, preferences.negatives, seed)
    readable = ballots.answer != NOBODY
    together, apart = (np.flatnonzero(readable & (ballots.answer == winner[of])) for of in (ballots.question, own))
    return Judgement(
        losers,
        vote[losers],
        np.concatenate([together, apart]),
        np.concatenate([ballots.question[together], own[apart]]),
    )


def _judged_alone(languages: Sequence[str], preferences: Preferences) -> NDArray[np.bool_]:
    every = preferences.scope == "own_language"
    return np.array([every or language_code(code) in preferences.judged_alone for code in languages], dtype=np.bool_)


def _some_of_each(losers: Ints, ballots: Ballots, most: int, seed: int) -> Ints:
    """At most so many losers of one question in one language, drawn by `seed`; their order stays."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, own in enumerate(ballots.own[losers].tolist()):
        groups[own].append(place)
    kept: list[int] = []
    for own, places in groups.items():
        question, language = divmod(own, len(ballots.languages))
        rng = rng_of(seed, "negatives", ballots.questions[question], ballots.languages[language])
        kept += places if len(places) <= most else rng.sample(places, most)
    return losers[sorted(kept)]


def same_language_first(
    ballots: Ballots, judgement: Judgement, texts: Texts, preferences: Preferences, seed: int
) -> tuple[Ints, Ints]:
    """(winning, losing) ballots: each loser with `positives` winners, those in its own language before the others.

    Within each, the order is drawn by `seed`. Texts that are the same count once, so that a loser's positives differ.
    """
    winners: dict[int, list[int]] = defaultdict(list)
    for vote, winner in zip(judgement.winners_vote.tolist(), judgement.winners.tolist(), strict=True):
        winners[vote].append(winner)
    language, question = ballots.language.tolist(), ballots.question.tolist()
    text = pa.array(texts).dictionary_encode().indices.to_pylist()  # a number that is the same for the same text
    rngs = {
        vote: rng_of(seed, "pairs", ballots.questions[question[winners[vote][0]]])
        for vote in dict.fromkeys(judgement.losers_vote.tolist())
    }
    pairs: list[tuple[int, int]] = []
    for vote, loser in zip(judgement.losers_vote.tolist(), judgement.losers.tolist(), strict=True):
        order = rngs[vote].sample(winners[vote], len(winners[vote]))
        order.sort(key=lambda winner: language[winner] != language[loser])
        distinct = {(language[winner], text[winner]): winner for winner in reversed(order)}
        positives = [winner for winner in order if distinct[language[winner], text[winner]] == winner]
        pairs += [(winner, loser) for winner in positives[: preferences.positives]]
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def last_in_merge_order(
    ballots: Ballots, judgement: Judgement, texts: Texts, preferences: Preferences, seed: int
) -> tuple[Ints, Ints]:
    """(winning, losing) ballots: every loser of a vote with the same one, its last winner in `merge_order`.

    As in the published files, where that is an English answer whenever an English one wins.
    """
    order = merge_order(ballots, preferences.merge_order)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    last = np.full(len(ballots.questions) * (1 + len(ballots.languages)), NOBODY)
    np.maximum.at(last, judgement.winners_vote, place[judgement.winners])
    return order[last[judgement.losers_vote]], judgement.losers


PAIRINGS: dict[str, Callable[[Ballots, Judgement, Texts, Preferences, int], tuple[Ints, Ints]]] = {
    "same_language": same_language_first,
    "last": last_in_merge_order,
}
"""What `preferences.positive` may say."""


def pair_up(
    ballots: Ballots, election: Election, texts: Texts, preferences: Preferences, seed: int
) -> tuple[Ints, Ints]:
    """(winning, losing) ballots of all pairs, question by question. `texts` [n] are the completions'."""
    judgement = judge(ballots, election, preferences, seed)
    return PAIRINGS[preferences.positive](ballots, judgement, texts, preferences, seed)
