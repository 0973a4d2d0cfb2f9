"""The rows passed between the stages of a run: flat, typed records, one Arrow schema each.

Rows are plain dictionaries with the keys below, because Ray Data and Parquet move Arrow tables.
`schema(Row)` is the Arrow schema of a row type; `table(Row, rows)` and `rows_of(table)` convert.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints

import pyarrow as pa

BASE_POLICY = "base"
"""Name of the policy before any training. Later ones are named `r0001-<sha8>` (round, hash of weights)."""


class Question(TypedDict):
    """One multiple-choice question in one language.

    Produced by `questions`, consumed by the engines, `methods` and `evaluation`.
    The same `question_id` exists in every language, with `choices` parallel by index.

    Example:
        {"question_id": "q17", "language": "fr", "text": "Quel animal ... ?",
         "choices": ["aigle", "ours"], "gold": "B", "subject": "animal"}
    """

    question_id: str
    language: str
    text: str
    choices: list[str]
    gold: str | None
    """Letter of the correct choice. Only for *reporting*, never for training."""
    subject: str | None


class Completion(TypedDict):
    """One sampled answer. Produced by the engines, consumed by `methods`.

    Example:
        {"question_id": "q17", "language": "fr", "sample": 2, "round": 1,
         "text": "Explication : ...\\nRéponse : B", "prompt_token_ids": [5, 9], "token_ids": [7, 1],
         "logp": -1.5, "answer": "B", "policy": "base", "finish_reason": "stop"}
    """

    question_id: str
    language: str
    sample: int
    round: int
    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    """As sampled by the engine, including the end-of-sequence token; never re-tokenized."""
    logp: float
    """Summed log-probability of `token_ids` under `policy` in nats, from the engine, before temperature and top-p."""
    answer: str | None
    policy: str
    """The policy that wrote this row."""
    finish_reason: str
    """`stop` (ended by the model) or `length` (truncated at `max_new_tokens`)."""


class Vote(TypedDict):
    """The vote of all completions of one question. Produced and consumed by `methods.calm`.

    Example:
        {"question_id": "q17", "counts": {"A": 3, "B": 9}, "winner": "B", "agreement": 0.75,
         "tied": False, "by_language": {"en": "B", "fr": "A"}}
    """

    question_id: str
    counts: dict[str, int]
    winner: str | None
    """None if no answer could be parsed, or if ties are dropped."""
    agreement: float
    """Fraction of the parseable answers that give the most frequent one, 0 to 1."""
    tied: bool
    by_language: dict[str, str | None]
    """The winner within each language, by the same tie rule."""


class Pair(TypedDict):
    """One preference pair. Produced by `methods`, consumed by `training`.

    The columns `prompt`, `chosen`, `rejected` follow TRL's preference format, so any TRL script can read them.

    Example:
        {"round": 1, "question_id": "q17", "pair": 0, "language": "fr", "prompt": "Quel ...",
         "chosen": "... Réponse : B", "rejected": "... Réponse : A", "prompt_token_ids": [5, 9],
         "chosen_token_ids": [8, 1], "rejected_token_ids": [7, 1], "chosen_answer": "B",
         "rejected_answer": "A", "chosen_language": "en", "policy": "base", "target_margin": None}
    """

    round: int
    question_id: str
    pair: int
    """Index within the question. With DCO, the same index means the same two candidates in every language."""
    language: str
    prompt: str
    chosen: str
    rejected: str
    prompt_token_ids: list[int]
    chosen_token_ids: list[int]
    rejected_token_ids: list[int]
    chosen_answer: str
    rejected_answer: str
    chosen_language: str
    """The language of the chosen side before it was translated into `language`."""
    policy: str
    target_margin: float | None
    """With DCO, the target for beta times the margin: the other languages' margins under the reference, weighted by
    gamma (DCO, Eq. 11), in nats. `chosen` and `rejected` are then two candidates in random order."""


class CandidateSet(TypedDict):
    """The candidate answers to one question in one language, parallel by index across languages.

    Produced by `methods.candidates`, or by `methods.dco` from samples; consumed by `methods.dco` and by the engines,
    which score them.

    Example:
        {"question_id": "q17", "language": "fr", "prompt": "Quel ... ?\nA. aigle\nB. ours\nRéponse :",
         "prompt_token_ids": [5, 9], "choices": ["A", "B"], "texts": [" A", " B"], "token_ids": [[7], [8]], "right": 1,
         "subject": "animal"}
    """

    question_id: str
    language: str
    subject: str | None
    prompt: str
    prompt_token_ids: list[int]
    choices: list[str]
    """The candidates alone. Normalized scores are divided by their length in characters or bytes."""
    texts: list[str]
    """The candidates as they follow the prompt."""
    token_ids: list[list[int]]
    right: int | None
    """Index of the correct candidate. Only for reporting, except in the methods named after gold answers."""


class Scored(CandidateSet):
    """A policy's log-probability of each candidate. Produced by the engines, consumed by `methods` and `evaluation`.

    Log-probabilities are sums over tokens, in nats.

    Example:
        {..., "logps": [-2.5, -0.25], "prompt_logp": None, "policy": "base"}
    """

    logps: list[float]
    """Of each candidate's tokens, given the prompt."""
    prompt_logp: float | None
    """Of the prompt's tokens except the first; None unless `candidates.score` is mean_full."""
    policy: str


class OptionTargets(TypedDict):
    """A question's candidates in one language, with the distribution over them to fit (`dco.fit: options`).

    Produced by `methods.dco`, consumed by `training`.

    Example:
        {"question_id": "q17", "language": "fr", "number": 0, "prompt": "Quel ... ?", "texts": [" aigle", " ours"],
         "prompt_token_ids": [5, 9], "token_ids": [[7], [8]], "probabilities": [0.25, 0.75], "policy": "base"}
    """

    question_id: str
    language: str
    number: int
    """Always 0: there is one row per question and language."""
    prompt: str
    texts: list[str]
    prompt_token_ids: list[int]
    token_ids: list[list[int]]
    probabilities: list[float]
    """Of each candidate under the optimal policy, given that one of them is the answer."""
    policy: str
    """The reference policy, whose scores they were computed from."""


class Dialogue(TypedDict):
    """A dialogue to train on, with a mask of scored tokens. Produced by methods, consumed by `training`.

    Example:
        {"question_id": "q17", "language": "fr", "number": 0, "token_ids": [5, 9, 7, 1, 5, 8, 1],
         "scored": [False, False, True, True, False, True, True]}
    """

    question_id: str
    language: str
    number: int
    """Index among the dialogues of a question in a language."""
    token_ids: list[int]
    scored: list[bool]
    """Whether to train on each token: usually true for the assistant's."""


class ReferenceLogps(TypedDict):
    """Log-probabilities of a training row under the reference policy. Produced and consumed by `training`.

    Example:
        {"question_id": "q17", "language": "fr", "number": 0, "reference": "base", "logps": [-21.5, -3.25]}
    """

    question_id: str
    language: str
    number: int
    """Index of the pair or dialogue."""
    reference: str
    logps: list[float]
    """Summed log-probability of each branch's scored tokens, in nats. The branches of a pair are chosen, rejected."""


class Prediction(TypedDict):
    """A policy's greedy answer to a held-out question. Produced and consumed by `evaluation`.

    Example:
        {"question_id": "q90", "language": "ru", "answer": None, "text": "...", "policy": "base"}
    """

    question_id: str
    language: str
    answer: str | None
    text: str
    policy: str


class BadPrompt(TypedDict):
    """A prompt that crashes every engine. Produced by `engines`, for the user and so that later stages skip it.

    Example:
        {"question_id": "q17", "language": "fr", "questions": "questions/align", "stage": "rounds/1/sample",
         "chunk": "00000", "error": "The actor died unexpectedly before finishing this task."}
    """

    question_id: str
    language: str
    questions: str
    """The run's folder that the question comes from."""
    stage: str
    """The run's folder that was being filled."""
    chunk: str
    error: str
    """How the last engine crashed."""


_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _arrow_type(hint: Any) -> tuple[pa.DataType, bool]:
    """Returns the Arrow type of an annotation and whether it is nullable."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return _arrow_type(next(a for a in args if a is not type(None)))[0], True
    if origin is list:
        return pa.list_(_arrow_type(args[0])[0]), False
    if origin is dict:
        return pa.map_(_arrow_type(args[0])[0], _arrow_type(args[1])[0]), False
    return _ARROW[hint], False


def schema(row_type: type) -> pa.Schema:
    """The Arrow schema of one of the row types above, columns in order of declaration."""
    fields = []
    for name, hint in get_type_hints(row_type).items():
        arrow, nullable = _arrow_type(hint)
        fields.append(pa.field(name, arrow, nullable=nullable))
    return pa.schema(fields)


def table(row_type: type, rows: Iterable[Any]) -> pa.Table:
    """Converts rows to an Arrow table with the type's schema. Raises `pa.ArrowInvalid` if a value does not fit."""
    return pa.Table.from_pylist(list(rows), schema=schema(row_type))


def rows_of(data: pa.Table) -> list[Any]:
    """Converts a table to rows, with maps as dictionaries."""
    return data.to_pylist(maps_as_pydicts="strict")


def gold_of(questions: Iterable[Question]) -> dict[str, str]:
    """Maps question_id to the gold letter, where known."""
    return {row["question_id"]: row["gold"] for row in questions if row["gold"] is not None}
