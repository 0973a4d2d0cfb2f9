"""The rows that travel between the stages of a run: flat, typed records, one Arrow schema each.

Rows are plain dictionaries with the keys below, because Ray Data and Parquet move Arrow tables.
`schema(Row)` is the Arrow schema of a row type; `table(Row, rows)` and `rows_of(table)` convert.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints

import pyarrow as pa

BASE_POLICY = "base"
"""Name of the policy before any training; later ones are `r0001-<sha8>` (round, hash of weights)."""


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
    """Letter of the right choice; only ever used to *report*, never to train."""
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
    """As the engine sampled them, the end-of-sequence token included; never re-tokenised."""
    logp: float
    """Summed log-probability of `token_ids` under `policy`, as the engine sampled them, before temperature and top-p;
    in nats."""
    answer: str | None
    policy: str
    """The policy that wrote this row."""
    finish_reason: str
    """`stop` (the model ended it) or `length` (cut at `max_new_tokens`)."""


class Vote(TypedDict):
    """What the completions of one question say together. Produced and consumed by `methods.calm`.

    Example:
        {"question_id": "q17", "counts": {"A": 3, "B": 9}, "winner": "B", "agreement": 0.75,
         "tied": False, "by_language": {"en": "B", "fr": "A"}}
    """

    question_id: str
    counts: dict[str, int]
    winner: str | None
    """None where nobody could be read, or where a tie is dropped."""
    agreement: float
    """Share of the readable answers that the most frequent answer has, 0 to 1."""
    tied: bool
    by_language: dict[str, str | None]
    """The winner inside each language alone, by the same tie rule."""


class Pair(TypedDict):
    """One preference. Produced by `methods`, consumed by `training`.

    The columns `prompt`, `chosen`, `rejected` are TRL's preference format: any TRL script reads it.

    Example:
        {"round": 1, "question_id": "q17", "pair": 0, "language": "fr", "prompt": "Quel ...",
         "chosen": "... Réponse : B", "rejected": "... Réponse : A", "prompt_token_ids": [5, 9],
         "chosen_token_ids": [8, 1], "rejected_token_ids": [7, 1], "chosen_answer": "B",
         "rejected_answer": "A", "chosen_language": "en", "policy": "base", "target_margin": None}
    """

    round: int
    question_id: str
    pair: int
    """Numbers the pairs of a question; with DCO a number stands for the same two candidates in every language."""
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
    """The language the chosen side was written in before it was carried over into `language`."""
    policy: str
    target_margin: float | None
    """With DCO, what beta times the margin is fitted to: the other languages' margins under the reference, weighed by
    gamma (DCO, Eq. 11), in nats. `chosen` and `rejected` are then two candidates in random order."""


class CandidateSet(TypedDict):
    """The candidate answers to one question in one language, parallel by index over the languages.

    Produced by `methods.candidates`, or by `methods.dco` from samples; consumed by the engines, which score them, and
    by `methods.dco`.

    Example:
        {"question_id": "q17", "language": "fr", "prompt": "Quel ... ?\nA. aigle\nB. ours\nRéponse :",
         "prompt_token_ids": [5, 9], "choices": ["A", "B"], "texts": [" A", " B"], "token_ids": [[7], [8]], "right": 1}
    """

    question_id: str
    language: str
    prompt: str
    prompt_token_ids: list[int]
    choices: list[str]
    """Each candidate by itself, whose characters and bytes are what a score may be divided by."""
    texts: list[str]
    """Each candidate as it follows the prompt."""
    token_ids: list[list[int]]
    right: int | None
    """Index of the right candidate; only ever used to report, but for the methods named after gold answers."""


class Scored(CandidateSet):
    """How likely a policy finds each candidate. Produced by the engines, consumed by `methods` and `evaluation`.

    Log-probabilities are sums over tokens, in nats.

    Example:
        {..., "logps": [-2.5, -0.25], "prompt_logp": None, "policy": "base"}
    """

    logps: list[float]
    """Of each candidate's tokens, after the prompt."""
    prompt_logp: float | None
    """Of the prompt's tokens but the first; only where `candidates.score` is mean_full."""
    policy: str


class Dialogue(TypedDict):
    """A dialogue to train on, of which some stretches are scored. Produced by methods, consumed by `training`.

    Example:
        {"question_id": "q17", "language": "fr", "number": 0, "token_ids": [5, 9, 7, 1, 5, 8, 1],
         "scored": [False, False, True, True, False, True, True]}
    """

    question_id: str
    language: str
    number: int
    """Numbers the dialogues of a question in a language."""
    token_ids: list[int]
    scored: list[bool]
    """Which tokens are trained on: the assistant's, as a rule."""


class ReferenceLogps(TypedDict):
    """What the reference policy says of a training row, before training. Produced and consumed by `training`.

    Example:
        {"question_id": "q17", "language": "fr", "number": 0, "reference": "base", "logps": [-21.5, -3.25]}
    """

    question_id: str
    language: str
    number: int
    """Of the pair or dialogue."""
    reference: str
    logps: list[float]
    """Summed log-probability of each branch's scored tokens, in nats: of a pair its chosen and its rejected side."""


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
    """A prompt that ends every engine it is given to. Produced by `engines`, for a person and for what comes after.

    Example:
        {"question_id": "q17", "language": "fr", "questions": "questions/align", "stage": "rounds/1/sample",
         "chunk": "00000", "error": "The actor died unexpectedly before finishing this task."}
    """

    question_id: str
    language: str
    questions: str
    """The folder of the run that the question is from."""
    stage: str
    """The folder that was being filled."""
    chunk: str
    error: str
    """How the last engine ended."""


_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _arrow_type(hint: Any) -> tuple[pa.DataType, bool]:
    """The Arrow type of an annotation, and whether it may be null."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return _arrow_type(next(a for a in args if a is not type(None)))[0], True
    if origin is list:
        return pa.list_(_arrow_type(args[0])[0]), False
    if origin is dict:
        return pa.map_(_arrow_type(args[0])[0], _arrow_type(args[1])[0]), False
    return _ARROW[hint], False


def schema(row_type: type) -> pa.Schema:
    """The Arrow schema of one of the row types above, columns in the order they are declared."""
    fields = []
    for name, hint in get_type_hints(row_type).items():
        arrow, nullable = _arrow_type(hint)
        fields.append(pa.field(name, arrow, nullable=nullable))
    return pa.schema(fields)


def table(row_type: type, rows: Iterable[Any]) -> pa.Table:
    """Rows as an Arrow table of the type's schema; `pa.ArrowInvalid` where a value does not fit."""
    return pa.Table.from_pylist(list(rows), schema=schema(row_type))


def rows_of(data: pa.Table) -> list[Any]:
    """The rows of a table, maps as dictionaries."""
    return data.to_pylist(maps_as_pydicts="strict")


def gold_of(questions: Iterable[Question]) -> dict[str, str]:
    """question_id -> right letter, where it is known."""
    return {row["question_id"]: row["gold"] for row in questions if row["gold"] is not None}
