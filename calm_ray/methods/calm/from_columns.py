"""Completions that lie on disk become pairs, in columns: no engine, no tokens, and as fast as Arrow goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calm_ray.methods.calm.pairing import pair_up
from calm_ray.methods.calm.recorded import Recorded
from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.vote_report import columns_of_ballots, count_samples
from calm_ray.methods.calm.voting import Ballots, elect
from calm_ray.prompts.extraction import EXTRACTORS, NOBODY, Ints
from calm_ray.prompts.questions import LETTERS
from calm_ray.prompts.released import explanations, form, own_form, training_prompts

PAIRS = pa.schema(
    [
        (name, pa.string())
        for name in (
            "question_id", "language", "prompt", "chosen", "rejected", "chosen_answer", "rejected_answer",
            "chosen_language",
        )
    ]
)  # fmt: skip
"""Like `calm_ray.core.rows.Pair`, without what only an engine knows."""
_LETTERS = pa.array(list(LETTERS))


@dataclass(frozen=True)
class _Chunk:
    """A chunk by number."""

    ballots: Ballots
    asked: Ints
    """[n], for each ballot the row of `Recorded.asked`."""
    asked_language: Ints
    """[rows], the language of each row of `Recorded.asked`."""
    prompts: pa.Array
    """[rows]"""
    choices: pa.Array
    """All options of all asked rows, one after the other."""
    first_choice: Ints
    """[rows], where those of a row begin."""
    texts: pa.Array
    """[n]"""
    right: Ints
    """[questions], the gold answers; NOBODY where unknown."""


def make_pairs(recorded: Recorded, preferences: Preferences, seed: int) -> tuple[pa.Table, Counter[str]]:
    """The pairs of a chunk (columns of `PAIRS`, those that repeat themselves as dictionaries), and its counts.

    The chosen side is the winning completion where it was written in the pair's language. Otherwise it is put into that
    language's form, the option in that language's words; its explanation stays in `chosen_language`. Under the preset
    `released` all of them, and the prompts, are in the published form.
    """
    released = preferences.preset == "released"
    chunk = _number(recorded, preferences)
    ballots = chunk.ballots
    election = elect(ballots, preferences, seed, chunk.right)
    winners, losers = pair_up(ballots, election, chunk.texts, preferences, seed)
    numbers = columns_of_ballots(ballots, winners, losers)
    counts = count_samples(ballots, election, numbers, chunk.right, as_released=released)
    languages = pa.array(ballots.languages)
    columns = {
        "question_id": _repeated(pa.array(ballots.questions), ballots.question[losers]),
        "language": _repeated(languages, ballots.language[losers]),
        "prompt": _prompts(chunk, losers, released),
        "chosen": _chosen(chunk, winners, losers, released),
        "rejected": chunk.texts.take(pa.array(losers)),
        "chosen_answer": _repeated(_LETTERS, ballots.answer[winners]),
        "rejected_answer": _repeated(_LETTERS, ballots.answer[losers]),
        "chosen_language": _repeated(languages, ballots.language[winners]),
    }
    return pa.table(columns), counts


def _number(recorded: Recorded, preferences: Preferences) -> _Chunk:
    asked, completions = (_one_chunk(part) for part in (recorded.asked, recorded.completions))
    questions, languages = (pc.unique(asked[name]) for name in ("question_id", "language"))
    question, language = (
        _indices(completions[name], known) for name, known in (("question_id", questions), ("language", languages))
    )
    rows = np.full((len(questions), len(languages)), NOBODY)
    asked_language, asked_question = _indices(asked["language"], languages), _indices(asked["question_id"], questions)
    rows[asked_question, asked_language] = np.arange(len(asked["choices"]))
    asked_row = rows[question, language]
    texts = pc.fill_null(completions["text"], "")
    answers = np.empty(len(texts), dtype=np.int64)
    read = EXTRACTORS[preferences.extraction]
    for index, code in enumerate(languages.to_pylist()):
        of_language = np.flatnonzero(language == index)
        choices = partial(_choices, asked["choices"], asked_row[of_language].tolist(), {})
        answers[of_language] = read(_take(texts, of_language), code, choices)
    options = pc.list_value_length(asked["choices"]).to_numpy()
    answers[answers >= options[asked_row]] = NOBODY
    return _Chunk(
        ballots=Ballots(questions.to_pylist(), languages.to_pylist(), question, language, answers),
        asked=asked_row,
        asked_language=asked_language,
        prompts=asked["prompt"],
        choices=pc.list_flatten(asked["choices"]),
        first_choice=np.cumsum(options) - options,
        texts=texts,
        right=_gold(asked, asked_question, len(questions)),
    )


def _gold(asked: dict[str, pa.Array], question: Ints, questions: int) -> Ints:
    """[questions], from any of a question's languages."""
    right = np.full(questions, NOBODY)
    known = pc.fill_null(pc.index_in(asked["gold"], _LETTERS), NOBODY).to_numpy()
    np.maximum.at(right, question, known)
    return right


def _choices(column: pa.Array, asked: list[int], known: dict[int, list[str]], ballot: int) -> list[str]:
    """The choices of a ballot's question, each taken out of the column once."""
    row = asked[ballot]
    if row not in known:
        known[row] = column[row].as_py()
    return known[row]


def _one_chunk(table: pa.Table) -> dict[str, pa.Array]:
    return {
        name: column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def _indices(values: pa.Array, known: pa.Array) -> Ints:
    return pc.index_in(values, known).to_numpy().astype(np.int64)


def _take(texts: pa.Array, rows: Ints) -> pa.Array:
    """These rows, without a copy where they stand together."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return texts.slice(int(rows[0]), len(rows))
    return texts.take(pa.array(rows))


def _by_language(
    chunk: _Chunk, language: Ints, column: pa.Array, change: Callable[[pa.Array, str], pa.Array]
) -> pa.Array:
    """A column with each row changed after its language's manner; `language` [rows]."""
    changed = pa.nulls(len(column), pa.string())
    for index, code in enumerate(chunk.ballots.languages):
        mask = pa.array(language == index)
        changed = pc.replace_with_mask(changed, mask, change(column.filter(mask), code))
    return changed


def _prompts(chunk: _Chunk, losers: Ints, released: bool) -> pa.Array:
    """[pairs], of the losing sides."""
    rows, which = np.unique(chunk.asked[losers], return_inverse=True)
    prompts = chunk.prompts.take(pa.array(rows))
    if released:
        prompts = _by_language(chunk, chunk.asked_language[rows], prompts, training_prompts)
    return _repeated(prompts, which)


def _repeated(values: pa.Array, which: Ints) -> pa.Array:
    """Each value as often as it is named: a text stands in memory once."""
    return pa.DictionaryArray.from_arrays(pa.array(which, pa.int32()), values)


def _chosen(chunk: _Chunk, winners: Ints, losers: Ints, released: bool) -> pa.Array:
    """[pairs], the winning sides' texts in the losing sides' languages."""
    ballots = chunk.ballots
    key = winners * len(ballots.languages) + ballots.language[losers]
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    winners, losers = winners[first], losers[first]
    texts = _framed(chunk, winners, losers, released)
    if not released:
        is_own = pa.array(ballots.language[winners] == ballots.language[losers])
        texts = pc.if_else(is_own, chunk.texts.take(pa.array(winners)), texts)
    return _repeated(texts, which)


def _framed(chunk: _Chunk, winners: Ints, losers: Ints, released: bool) -> pa.Array:
    """[pairs], explanation and answer in the form of the losing side's language."""
    ballots = chunk.ballots
    distinct, which = np.unique(winners, return_inverse=True)
    said = _by_language(chunk, ballots.language[distinct], chunk.texts.take(pa.array(distinct)), explanations)
    forms = [form(code) if released else own_form(code) for code in ballots.languages]
    head, tail = (
        pa.array(parts).take(pa.array(ballots.language[losers]))
        for parts in zip(*((f.explanation, f"\n{f.answer}") for f in forms), strict=True)
    )
    letters = _LETTERS.take(pa.array(ballots.answer[winners]))
    option = chunk.choices.take(pa.array(chunk.first_choice[chunk.asked[losers]] + ballots.answer[winners]))
    # Where only a question's id is known, its letters have no options.
    answer = pc.if_else(pc.equal(option, ""), letters, pc.binary_join_element_wise(letters, option, ". "))
    return pc.binary_join_element_wise(head, said.take(pa.array(which)), tail, answer, "")
