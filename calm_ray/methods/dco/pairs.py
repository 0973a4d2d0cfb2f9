"""Draws the pairs DCO trains on from scored candidates, and computes their target margins.

Pure functions over arrays: the columns of one chunk of questions in all languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from calm_ray.core.rows import Pair, schema
from calm_ray.core.seeds import derive_seed
from calm_ray.evaluation.scores import Scores
from calm_ray.methods.dco.gamma import Floats, target_margins
from calm_ray.methods.dco.settings import Dco
from calm_ray.prompts.candidates import label

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]


@dataclass(frozen=True)
class DrawnPairs:
    """P pairs of candidates: question index, pair number within the question (from 0), and the candidates' indices."""

    question: Ints
    number: Ints
    chosen: Ints
    rejected: Ints
    in_languages: NDArray[np.bool_]
    """[P, L], whether a pair is trained in a language."""


def draw_pairs(scores: Scores, pairs: int, settings: Dco | None, *, seed: int) -> DrawnPairs:
    """Draws up to `pairs` distinct pairs of each question's candidates, each pair in random order.

    A question's draws depend only on the seed and its id, not on its chunk. Without `settings` (the gold baselines),
    the right candidate is the chosen one of every pair. Questions without a right candidate, or with fewer than two
    candidates to draw from, yield no pairs.
    """
    counts, right = scores.counts[:, None], scores.right[:, None]
    candidates = scores.logps.shape[2]
    if settings is None:
        other = np.arange(candidates)
        words = _random_words(scores.questions, seed, candidates)
        allowed = (right >= 0) & (other < counts) & (other != right)
        question, number, option = _smallest(words, allowed, pairs)
        chosen, rejected = scores.right[question], other[option]
    else:
        later, earlier = np.tril_indices(candidates, -1)  # in this order a pair's index is the same for any K
        words, allowed = _random_words(scores.questions, seed, len(later)), later < counts
        if settings.exclude_gold:
            allowed &= (earlier != right) & (later != right)
        question, number, option = _smallest(words, allowed, pairs)
        swapped = words[question, option] % 2 == 1
        chosen = np.where(swapped, later[option], earlier[option])
        rejected = np.where(swapped, earlier[option], later[option])
    in_languages = np.ones((len(question), len(scores.languages)), dtype=np.bool_)
    if settings is not None and settings.languages == "bilingual":
        in_languages = _language_pairs(len(scores.languages), _mix(words[question, option]))
    return DrawnPairs(question, number, chosen, rejected, in_languages)


def _smallest(words: Words, allowed: NDArray[np.bool_], most: int) -> tuple[Ints, Ints, Ints]:
    """Picks the allowed columns with the smallest words, up to `most` per row: row, rank from 0, and column.

    Ignores the lowest bit of the words, which decides the order within a pair.
    """
    order = np.argsort(np.where(allowed, words >> np.uint64(1), np.uint64(2**63)), axis=1, kind="stable")[:, :most]
    row, rank = np.nonzero(np.arange(order.shape[1]) < allowed.sum(axis=1)[:, None])
    return row, rank, order[row, rank]


def _language_pairs(languages: int, words: Words) -> NDArray[np.bool_]:
    """Picks two languages per word: [P, L]."""
    later, earlier = np.tril_indices(languages, -1)
    pair = (words % len(later)).astype(np.int64)
    numbers = np.arange(languages)
    return np.asarray((later[pair][:, None] == numbers) | (earlier[pair][:, None] == numbers))


def _random_words(questions: Sequence[str], seed: int, count: int) -> Words:
    """[Q, count] random 64-bit numbers from SplitMix64 (Steele et al. 2014), each row seeded by its question's id."""
    start = _mix(np.array([derive_seed(seed, "pairs", question_id) for question_id in questions], dtype=np.uint64))
    return _mix(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(words: Words) -> Words:
    """The mixing step of SplitMix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words ^ (words >> np.uint64(31))


def reference_margins(scores: Scores, drawn: DrawnPairs) -> Floats:
    """Returns how much more likely each pair's first candidate is: [P, L], in nats."""
    margins = scores.logps[:, drawn.question, drawn.chosen] - scores.logps[:, drawn.question, drawn.rejected]
    return np.asarray(margins.T)


def targets(scores: Scores, drawn: DrawnPairs, gamma: Floats) -> Floats:
    """Returns target margins [P, L]. In a pair of two languages, each language's target depends on the other alone."""
    return target_margins(np.where(drawn.in_languages, reference_margins(scores, drawn), 0.0), gamma)


def pair_tables(
    scored: dict[str, pa.Table], drawn: DrawnPairs, target: Floats | None, scores: Scores, round_number: int
) -> pa.Table:
    """Returns rows of `Pair`, one per pair and language; `scored` holds the rows of `Scored` by language.

    Takes texts and tokens by index from Arrow columns: no Python loop over rows.
    """
    tables = []
    for i, language in enumerate(scores.languages):
        rows = np.flatnonzero(drawn.in_languages[:, i])
        places = scores.places[i, drawn.question[rows]]
        tables.append(_pairs_in(scored[language], places, drawn, rows, None if target is None else target[rows, i]))
    columns: dict[str, Any] = {}
    merged = pa.concat_tables(tables)
    for field in schema(Pair):
        columns[field.name] = (
            pa.repeat(pa.scalar(round_number, field.type), len(merged)) if field.name == "round" else merged[field.name]
        )
    return pa.Table.from_pydict(columns, schema=schema(Pair))


def _pairs_in(data: pa.Table, places: Ints, drawn: DrawnPairs, rows: Ints, target: Floats | None) -> pa.Table:
    """Returns the pairs of one language; `places` are the rows of `data` with the pairs' questions."""
    taken = {name: data[name].combine_chunks().take(places) for name in ("question_id", "language", "prompt", "policy")}
    sides: dict[str, Any] = {}
    for side, candidate in (("chosen", drawn.chosen[rows]), ("rejected", drawn.rejected[rows])):
        sides[side] = _candidates(data["texts"], places, candidate)
        sides[f"{side}_token_ids"] = _candidates(data["token_ids"], places, candidate)
        names = pa.array([label(number) for number in range(int(candidate.max(initial=0)) + 1)], pa.string())
        sides[f"{side}_answer"] = names.take(pa.array(candidate))
    return pa.table(
        {
            **taken,
            **sides,
            "pair": pa.array(drawn.number[rows]),
            "prompt_token_ids": data["prompt_token_ids"].combine_chunks().take(places),
            "chosen_language": taken["language"],
            "target_margin": pa.nulls(len(rows), pa.float64()) if target is None else pa.array(target, pa.float64()),
        }
    )


def _candidates(lists: pa.ChunkedArray, places: Ints, candidate: Ints) -> pa.Array:
    """Returns the candidate at index `candidate` of each row in `places`."""
    array = lists.combine_chunks()
    offsets = array.offsets.to_numpy()[:-1]
    return pc.take(array.values, pa.array(offsets[places] + candidate))
