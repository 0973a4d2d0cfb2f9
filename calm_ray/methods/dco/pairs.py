"""From scored candidates to the pairs that DCO trains on: which two candidates, and what their margin is fitted to.

Pure functions over the columns of one chunk of questions in all languages, as arrays.
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
    """P pairs of candidates: question by number, its own pairs counted from 0, and the two candidates' indices."""

    question: Ints
    number: Ints
    chosen: Ints
    rejected: Ints
    in_languages: NDArray[np.bool_]
    """[P, L], the languages that a pair is trained in."""


def draw_pairs(scores: Scores, pairs: int, settings: Dco | None, *, seed: int) -> DrawnPairs:
    """So many pairs of each question's candidates, all different, each in random order.

    A question's draws depend on the seed and its id alone, not on the chunk it lies in. Without `settings`, for the
    gold baselines, the right candidate is the chosen one of every pair; questions without one, or with fewer than two
    candidates to draw from, give none.
    """
    counts, right = scores.counts[:, None], scores.right[:, None]
    candidates = scores.logps.shape[2]
    if settings is None:
        other = np.arange(candidates)
        words, allowed = _words(scores.questions, seed, candidates), (right >= 0) & (other < counts) & (other != right)
        question, number, option = _smallest(words, allowed, pairs)
        chosen, rejected = scores.right[question], other[option]
    else:
        later, earlier = np.tril_indices(candidates, -1)  # in this order a pair has the same place for any K
        words, allowed = _words(scores.questions, seed, len(later)), later < counts
        if settings.exclude_gold:
            allowed &= (earlier != right) & (later != right)
        question, number, option = _smallest(words, allowed, pairs)
        swapped = words[question, option] % 2 == 1
        chosen = np.where(swapped, later[option], earlier[option])
        rejected = np.where(swapped, earlier[option], later[option])
    together = np.ones((len(question), len(scores.languages)), dtype=np.bool_)
    if settings is not None and settings.languages == "bilingual":
        together = _two_of(len(scores.languages), _mixed(words[question, option]))
    return DrawnPairs(question, number, chosen, rejected, together)


def _smallest(words: Words, allowed: NDArray[np.bool_], most: int) -> tuple[Ints, Ints, Ints]:
    """Of each row, at most so many of the columns allowed, by the size of their words: row, place from 0, and column.

    The words' lowest bit does not count: it is left for what else is to be drawn.
    """
    order = np.argsort(np.where(allowed, words >> np.uint64(1), np.uint64(2**63)), axis=1, kind="stable")[:, :most]
    row, place = np.nonzero(np.arange(order.shape[1]) < allowed.sum(axis=1)[:, None])
    return row, place, order[row, place]


def _two_of(languages: int, words: Words) -> NDArray[np.bool_]:
    """[P, L], two of the languages for each word."""
    later, earlier = np.tril_indices(languages, -1)
    pair = (words % len(later)).astype(np.int64)
    numbers = np.arange(languages)
    return np.asarray((later[pair][:, None] == numbers) | (earlier[pair][:, None] == numbers))


def _words(questions: Sequence[str], seed: int, count: int) -> Words:
    """[Q, count] random numbers of 64 bits, a row from its question's id, by SplitMix64 (Steele et al. 2014)."""
    start = _mixed(np.array([derive_seed(seed, "pairs", question_id) for question_id in questions], dtype=np.uint64))
    return _mixed(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mixed(words: Words) -> Words:
    """The mixing step of SplitMix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words ^ (words >> np.uint64(31))


def reference_margins(scores: Scores, drawn: DrawnPairs) -> Floats:
    """[P, L], how much likelier each pair's first candidate is, in nats."""
    margins = scores.logps[:, drawn.question, drawn.chosen] - scores.logps[:, drawn.question, drawn.rejected]
    return np.asarray(margins.T)


def targets(scores: Scores, drawn: DrawnPairs, gamma: Floats) -> Floats:
    """[P, L], the target margins; of a pair that is trained in two languages, each language's from the other alone."""
    return target_margins(np.where(drawn.in_languages, reference_margins(scores, drawn), 0.0), gamma)


def pair_tables(
    scored: dict[str, pa.Table], drawn: DrawnPairs, target: Floats | None, scores: Scores, round_number: int
) -> pa.Table:
    """The pairs as rows of `Pair`, one for each pair and language; `scored` holds the languages' rows of `Scored`.

    Texts and tokens are taken by index from the columns of the scores, so that a chunk of any size costs no Python.
    """
    tables = []
    for i, language in enumerate(scores.languages):
        rows = np.flatnonzero(drawn.in_languages[:, i])
        own = scores.places[i, drawn.question[rows]]
        tables.append(_pairs_in(scored[language], own, drawn, rows, None if target is None else target[rows, i]))
    columns: dict[str, Any] = {}
    merged = pa.concat_tables(tables)
    for field in schema(Pair):
        columns[field.name] = (
            pa.repeat(pa.scalar(round_number, field.type), len(merged)) if field.name == "round" else merged[field.name]
        )
    return pa.Table.from_pydict(columns, schema=schema(Pair))


def _pairs_in(data: pa.Table, own: Ints, drawn: DrawnPairs, rows: Ints, target: Floats | None) -> pa.Table:
    """The pairs of one language: `own` are the rows of `data` that hold the pairs' questions."""
    taken = {name: data[name].combine_chunks().take(own) for name in ("question_id", "language", "prompt", "policy")}
    sides: dict[str, Any] = {}
    for side, candidate in (("chosen", drawn.chosen[rows]), ("rejected", drawn.rejected[rows])):
        sides[side] = _candidates(data["texts"], own, candidate)
        sides[f"{side}_token_ids"] = _candidates(data["token_ids"], own, candidate)
        names = pa.array([label(number) for number in range(int(candidate.max(initial=0)) + 1)], pa.string())
        sides[f"{side}_answer"] = names.take(pa.array(candidate))
    return pa.table(
        {
            **taken,
            **sides,
            "pair": pa.array(drawn.number[rows]),
            "prompt_token_ids": data["prompt_token_ids"].combine_chunks().take(own),
            "chosen_language": taken["language"],
            "target_margin": pa.nulls(len(rows), pa.float64()) if target is None else pa.array(target, pa.float64()),
        }
    )


def _candidates(lists: pa.ChunkedArray, own: Ints, candidate: Ints) -> pa.Array:
    """Of each row of `own`, the candidate of that index."""
    array = lists.combine_chunks()
    offsets = array.offsets.to_numpy()[:-1]
    return pc.take(array.values, pa.array(offsets[own] + candidate))
