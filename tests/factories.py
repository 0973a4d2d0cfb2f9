"""Small rows, stages and models for tests."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Completion, Pair, Question, Scored, table
from calm_ray.packing.batch import Branch
from calm_ray.questions.reader import load_questions
from calm_ray.questions.records import read_records
from calm_ray.recipes.files import RECIPES
from calm_ray.recipes.tables import tables_of
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.testing import word_tokenizer, write_tiny_model
from calm_ray.training.trees import Comparison, Tree


def question(question_id: str = "q1", language: str = "en", choices: int = 4, gold: str | None = None) -> Question:
    return Question(
        question_id=question_id,
        language=language,
        text=f"Question {question_id}?",
        choices=[f"{language} choice {number}" for number in range(choices)],
        gold=gold,
        subject=None,
    )


def table_rows(paper: str) -> list[str]:
    """All rows of a paper's tables, as named on the command line."""
    tables = tables_of(RECIPES / paper / "tables.yaml").values()
    return [f"{paper}/tables:{row}" for table in tables for row in table.rows()]


def read_error(file: Path) -> str:
    """The one-line message, with the file in it, that reading a bad file of records raises."""
    with pytest.raises(InputError) as error:
        list(read_records(str(file)))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def send_line(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def read_questions(source: str, languages: Sequence[str], **options: Any) -> list[Question]:
    return load_questions(source, languages, **options).questions


def completion(
    answer: str | None,
    language: str = "en",
    sample: int = 0,
    *,
    question_id: str = "q1",
    text: str | None = None,
    finish_reason: str = "stop",
) -> Completion:
    return Completion(
        question_id=question_id,
        language=language,
        sample=sample,
        round=1,
        text=text or f"{language} says {answer} ({sample})",
        prompt_token_ids=[5, 6],
        token_ids=[10 + sample, 1] if finish_reason == "stop" else [10 + sample],
        logp=-1.0,
        answer=answer,
        policy="base",
        finish_reason=finish_reason,
    )


def completions(answers: dict[str, str], question_id: str = "q1") -> list[Completion]:
    """One completion per letter of each language's string, such as {"en": "AAB", "fr": "B-B"}; `-` is unparseable."""
    return [
        completion(None if letter == "-" else letter, language, sample, question_id=question_id)
        for language, letters in answers.items()
        for sample, letter in enumerate(letters)
    ]


def token_pair(number: int, rng: random.Random) -> Pair:
    """A pair of random tokens from 3 to 89; each side ends with token 1."""

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 90) for _ in range(rng.randint(low, high))]

    return Pair(
        round=1, question_id=f"q{number}", pair=0, language="en", prompt="", chosen="", rejected="",
        prompt_token_ids=tokens(2, 20), chosen_token_ids=[*tokens(1, 30), 1], rejected_token_ids=[*tokens(1, 30), 1],
        chosen_answer="A", rejected_answer="B", chosen_language="en", policy="base",
        target_margin=None,
    )  # fmt: skip


def tree(prompt: list[int], *branches: list[int], number: int = 0, question_id: str = "q") -> Tree:
    """A prompt and its branches; two branches form a comparison."""
    comparisons = (Comparison(0, 1),) if len(branches) == 2 else ()
    return Tree(question_id, "en", number, prompt, tuple(Branch(tokens) for tokens in branches), comparisons)


def pairs_stage(folder: Path, count: int = 48) -> Stage:
    """A stage with `count` pairs of random tokens."""
    stage = Stage(Storage(str(folder)))
    rng = random.Random(0)
    stage.write("00000", table(Pair, [token_pair(number, rng) for number in range(count)]))
    return stage


def tiny_model(folder: Path, **shape: Any) -> Path:
    """A model with random weights whose vocabulary covers the tokens of `token_pair`."""
    return write_tiny_model(folder, word_tokenizer([f"w{i}" for i in range(90)]), **shape)


def scored(
    logps: Sequence[float],
    question_id: str = "q0",
    language: str = "en",
    *,
    choices: Sequence[str] | None = None,
    prompt: str | None = None,
    right: int | None = None,
    prompt_logp: float | None = None,
    subject: str | None = None,
) -> Scored:
    """A question's scored candidates, letters by default; each byte is a token."""
    texts = list(choices or "ABCDEFGHIJ"[: len(logps)])
    if prompt is None:
        prompt = f"{language} {question_id}:"
    return Scored(
        question_id=question_id,
        language=language,
        subject=subject,
        prompt=prompt,
        prompt_token_ids=list(prompt.encode()),
        choices=texts,
        texts=texts,
        token_ids=[list(text.encode()) for text in texts],
        right=right,
        logps=list(logps),
        prompt_logp=prompt_logp,
        policy="base",
    )


def scored_tables(
    logps: Mapping[str, Sequence[Sequence[float]]], right: Sequence[int | None] | None = None
) -> dict[str, pa.Table]:
    """Scored candidates of questions q0, q1, ... in each language; `right` holds the indices of the correct ones."""
    return {
        code: table(
            Scored,
            [scored(row, f"q{i}", code, right=None if right is None else right[i]) for i, row in enumerate(rows)],
        )
        for code, rows in logps.items()
    }


def golden_metrics(data: Path) -> dict[str, list[Any]]:
    """Cases of golden_metrics.json, next to the folder of real data, by group name."""
    file = data.parent / "reference" / "golden_metrics.json"
    if not file.is_file():
        pytest.skip(f"golden values: {file} not found")
    return {group["name"]: group["cases"] for group in json.loads(file.read_text("utf-8"))["groups"]}
