"""Vectorized pairing of completions on disk with Arrow and NumPy. Needs neither engines nor a tokenizer."""

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
from calm_ray.prompts.extraction import EXTRACTORS, NO_ANSWER, Ints
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
"""Like `calm_ray.core.rows.Pair`, without the fields that only an engine can fill."""
_LETTERS = pa.array(list(LETTERS))


@dataclass(frozen=True)
class _Chunk:
    """A chunk, encoded as integers and Arrow columns."""

    ballots: Ballots
    asked: Ints
    """[n], the row of each ballot's question in `Recorded.asked`."""
    asked_language: Ints
    """[rows], the language of each row of `Recorded.asked`; index into `ballots.languages`."""
    prompts: pa.Array
    """[rows]"""
    choices: pa.Array
    """The options of all rows, flattened."""
    first_choice: Ints
    """[rows], index of each row's first option in `choices`."""
    texts: pa.Array
    """[n]"""
    right: Ints
    """[questions], the gold answers; NO_ANSWER if unknown."""


def make_pairs(recorded: Recorded, preferences: Preferences, seed: int) -> tuple[pa.Table, Counter[str]]:
    """Returns a chunk's pairs (the columns of `PAIRS`, repetitive ones dictionary-encoded) and its counts.

    A winner in the pair's language is used unchanged. Any other is rewritten with that language's form and option text;
    its explanation stays in `chosen_language`. With the preset `released`, all chosen sides and prompts take the
    published form.
    """
    released = preferences.preset == "released"
    chunk = _encode(recorded, preferences)
    ballots = chunk.ballots
    election = elect(ballots, preferences, seed, chunk.right)
    winners, losers = pair_up(ballots, election, chunk.texts, preferences, seed)
    numbers = columns_of_ballots(ballots, winners, losers)
    counts = count_samples(ballots, election, numbers, chunk.right, as_released=released)
    languages = pa.array(ballots.languages)
    columns = {
        "question_id": _encoded(pa.array(ballots.questions), ballots.question[losers]),
        "language": _encoded(languages, ballots.language[losers]),
        "prompt": _prompts(chunk, losers, released),
        "chosen": _chosen(chunk, winners, losers, released),
        "rejected": chunk.texts.take(pa.array(losers)),
        "chosen_answer": _encoded(_LETTERS, ballots.answer[winners]),
        "rejected_answer": _encoded(_LETTERS, ballots.answer[losers]),
        "chosen_language": _encoded(languages, ballots.language[winners]),
    }
    return pa.table(columns), counts


def _encode(recorded: Recorded, preferences: Preferences) -> _Chunk:
    asked, completions = (_combine_chunks(part) for part in (recorded.asked, recorded.completions))
    questions, languages = (pc.unique(asked[name]) for name in ("question_id", "language"))
    question, language = (
        _indices(completions[name], known) for name, known in (("question_id", questions), ("language", languages))
    )
    rows = np.full((len(questions), len(languages)), NO_ANSWER)
    asked_language, asked_question = _indices(asked["language"], languages), _indices(asked["question_id"], questions)
    rows[asked_question, asked_language] = np.arange(len(asked["choices"]))
    ballot_rows = rows[question, language]
    texts = pc.fill_null(completions["text"], "")
    answers = np.empty(len(texts), dtype=np.int64)
    read = EXTRACTORS[preferences.extraction]
    for index, code in enumerate(languages.to_pylist()):
        of_language = np.flatnonzero(language == index)
        choices = partial(_choices, asked["choices"], ballot_rows[of_language].tolist(), {})
        answers[of_language] = read(_take(texts, of_language), code, choices)
    options = pc.list_value_length(asked["choices"]).to_numpy()
    answers[answers >= options[ballot_rows]] = NO_ANSWER
    return _Chunk(
        ballots=Ballots(questions.to_pylist(), languages.to_pylist(), question, language, answers),
        asked=ballot_rows,
        asked_language=asked_language,
        prompts=asked["prompt"],
        choices=pc.list_flatten(asked["choices"]),
        first_choice=np.cumsum(options) - options,
        texts=texts,
        right=_gold(asked, asked_question, len(questions)),
    )


def _gold(asked: dict[str, pa.Array], question: Ints, questions: int) -> Ints:
    """[questions], the gold answer given in any language of the question."""
    right = np.full(questions, NO_ANSWER)
    known = pc.fill_null(pc.index_in(asked["gold"], _LETTERS), NO_ANSWER).to_numpy()
    np.maximum.at(right, question, known)
    return right


def _choices(column: pa.Array, rows: list[int], cache: dict[int, list[str]], ballot: int) -> list[str]:
    """The choices of a ballot's question, cached by row."""
    row = rows[ballot]
    if row not in cache:
        cache[row] = column[row].as_py()
    return cache[row]


def _combine_chunks(table: pa.Table) -> dict[str, pa.Array]:
    return {
        name: column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def _indices(values: pa.Array, known: pa.Array) -> Ints:
    return pc.index_in(values, known).to_numpy().astype(np.int64)


def _take(texts: pa.Array, rows: Ints) -> pa.Array:
    """The given (ascending) rows; contiguous ones are sliced, not copied."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return texts.slice(int(rows[0]), len(rows))
    return texts.take(pa.array(rows))


def _by_language(
    chunk: _Chunk, language: Ints, column: pa.Array, function: Callable[[pa.Array, str], pa.Array]
) -> pa.Array:
    """Applies `function` to the rows of each language; `language` [rows]."""
    result = pa.nulls(len(column), pa.string())
    for index, code in enumerate(chunk.ballots.languages):
        mask = pa.array(language == index)
        result = pc.replace_with_mask(result, mask, function(column.filter(mask), code))
    return result


def _prompts(chunk: _Chunk, losers: Ints, released: bool) -> pa.Array:
    """[pairs], the prompts of the losing sides."""
    rows, which = np.unique(chunk.asked[losers], return_inverse=True)
    prompts = chunk.prompts.take(pa.array(rows))
    if released:
        prompts = _by_language(chunk, chunk.asked_language[rows], prompts, training_prompts)
    return _encoded(prompts, which)


def _encoded(values: pa.Array, which: Ints) -> pa.Array:
    """`values[which]`, dictionary-encoded to hold each text in memory once."""
    return pa.DictionaryArray.from_arrays(pa.array(which, pa.int32()), values)


def _chosen(chunk: _Chunk, winners: Ints, losers: Ints, released: bool) -> pa.Array:
    """[pairs], the winning sides' texts for the losing sides' languages."""
    ballots = chunk.ballots
    key = winners * len(ballots.languages) + ballots.language[losers]
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    winners, losers = winners[first], losers[first]
    texts = _reformatted(chunk, winners, losers, released)
    if not released:
        is_own = pa.array(ballots.language[winners] == ballots.language[losers])
        texts = pc.if_else(is_own, chunk.texts.take(pa.array(winners)), texts)
    return _encoded(texts, which)


def _reformatted(chunk: _Chunk, winners: Ints, losers: Ints, released: bool) -> pa.Array:
    """[pairs], the winner's explanation and answer in the form of the losing side's language."""
    ballots = chunk.ballots
    distinct, which = np.unique(winners, return_inverse=True)
    explained = _by_language(chunk, ballots.language[distinct], chunk.texts.take(pa.array(distinct)), explanations)
    forms = [form(code) if released else own_form(code) for code in ballots.languages]
    head, tail = (
        pa.array(parts).take(pa.array(ballots.language[losers]))
        for parts in zip(*((f.explanation, f"\n{f.answer}") for f in forms), strict=True)
    )
    letters = _LETTERS.take(pa.array(ballots.answer[winners]))
    option = chunk.choices.take(pa.array(chunk.first_choice[chunk.asked[losers]] + ballots.answer[winners]))
    # Options are empty if only the question's id is known.
    answer = pc.if_else(pc.equal(option, ""), letters, pc.binary_join_element_wise(letters, option, ". "))
    return pc.binary_join_element_wise(head, explained.take(pa.array(which)), tail, answer, "")
