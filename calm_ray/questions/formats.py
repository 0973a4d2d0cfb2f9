"""Published layouts of multiple-choice questions: one function each, from a record to a `Question`.

A layout is recognized by its records' fields. Texts and choices are kept as published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from calm_ray.core.errors import BadRow, InputError
from calm_ray.core.rows import Question
from calm_ray.prompts.questions import LETTERS
from calm_ray.questions.calm_layout import read_gold, read_input
from calm_ray.questions.xcopa_phrases import XCOPA_PHRASES

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RecordContext:
    """What a record does not contain: its language, its index in the file (from 0) and a callback to note repairs."""

    language: str
    index: int
    note: Callable[[str], None]


@dataclass(frozen=True)
class Format:
    name: str
    fields: tuple[str, ...]
    """A file is of this format if its records have all of these."""
    parse: Callable[[Fields, RecordContext], Question]
    """Raises BadRow."""
    published: str
    """Where the layout is published."""
    language_field: str | None = None
    """The field that holds the language; None if the file or folder name gives it."""
    path_languages: Mapping[str, str] = field(default_factory=dict)
    """Path component -> language, in lowercase."""
    parallel: bool = True
    """Whether the same question_id is the same question in every language."""


def text_of(fields: Fields, name: str) -> str:
    """A field that must be a non-empty string."""
    value = fields.get(name)
    if value is None or value == "":
        raise BadRow(f"field {name!r} is missing or empty")
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is not a string", repr(value)[:80])
    return value


def id_of(fields: Fields, name: str) -> str:
    """A field that must be a string or an integer, as a string."""
    value = fields.get(name)
    return str(value) if isinstance(value, int) else text_of(fields, name)


def letter_of(value: Any, context: RecordContext) -> str | None:
    """The gold letter, if any. Repairs a lowercase letter."""
    if value is None or value == "":
        return None
    letter = str(value).strip()
    if letter != letter.upper():
        context.note("the gold letter was lowercase")
    return letter.upper()


def subject_of(fields: Fields, name: str) -> str | None:
    value = fields.get(name)
    return None if value is None or value == "" else str(value)


def _questions(fields: Fields, context: RecordContext) -> Question:
    choices = fields.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise BadRow("field 'choices' must be a list of strings")
    return Question(
        question_id=id_of(fields, "question_id"), language=context.language, text=text_of(fields, "text"),
        choices=choices, gold=letter_of(fields.get("gold"), context), subject=subject_of(fields, "subject"),
    )  # fmt: skip


def _xcsqa(fields: Fields, context: RecordContext) -> Question:
    question = fields.get("question")
    choices = question.get("choices") if isinstance(question, dict) else None
    try:
        if isinstance(choices, dict):  # as in Parquet files and on the Hub
            labels, texts = list(choices["label"]), list(choices["text"])
        else:
            labels, texts = [choice["label"] for choice in choices], [choice["text"] for choice in choices]  # type: ignore[union-attr]
    except (KeyError, TypeError):
        raise BadRow("field 'question' must hold a stem, and choices with label and text") from None
    if len(labels) != len(texts) or not all(isinstance(text, str) for text in texts):
        raise BadRow("field 'question' must hold one text for each label")
    key = fields.get("answerKey") or None
    if key is not None and key not in labels:
        raise BadRow("the gold answer is not one of the choices", f"{key!r}; choices are {', '.join(map(str, labels))}")
    gold = None if key is None else LETTERS[labels.index(key)] if len(labels) <= len(LETTERS) else None
    return Question(
        question_id=id_of(fields, "id"), language=context.language, text=text_of(question or {}, "stem"),
        choices=texts, gold=gold, subject=None,
    )  # fmt: skip


def _calm(fields: Fields, context: RecordContext) -> Question:
    text, choices = read_input(text_of(fields, "input"), context.note)
    return Question(
        question_id=str(context.index), language=context.language, text=text, choices=choices,
        gold=read_gold(str(fields.get("output") or ""), choices, context.note), subject=None,
    )  # fmt: skip


def _medqa(fields: Fields, context: RecordContext) -> Question:
    options = fields.get("options")
    if not isinstance(options, dict) or not all(isinstance(label, str) for label in options):
        raise BadRow("field 'options' must map letters to texts")
    labels = sorted(label for label in options if options[label] is not None)
    key = fields.get("answer_idx") or None
    if key is not None and key not in labels:
        raise BadRow("the gold answer is not one of the choices", f"{key!r}; choices are {', '.join(labels)}")
    choices = [text_of(options, label) for label in labels]
    return Question(
        question_id=f"{context.language}-{context.index}", language=context.language, text=text_of(fields, "question"),
        choices=choices, gold=LETTERS[labels.index(key)] if key in labels[: len(LETTERS)] else None,
        subject=subject_of(fields, "meta_info"),
    )  # fmt: skip


def _mmmlu(fields: Fields, context: RecordContext) -> Question:
    index = next((fields[name] for name in ("", "Unnamed: 0") if fields.get(name) is not None), context.index)
    return Question(
        question_id=str(index), language=context.language, text=text_of(fields, "Question"),
        choices=[text_of(fields, letter) for letter in "ABCD"], gold=letter_of(fields.get("Answer"), context),
        subject=subject_of(fields, "Subject"),
    )  # fmt: skip


def _global_mmlu(fields: Fields, context: RecordContext) -> Question:
    return Question(
        question_id=id_of(fields, "sample_id"), language=context.language, text=text_of(fields, "question"),
        choices=[text_of(fields, f"option_{letter}") for letter in "abcd"],
        gold=letter_of(fields.get("answer"), context), subject=subject_of(fields, "subject"),
    )  # fmt: skip


def _bmlama(fields: Fields, context: RecordContext) -> Question:
    choices, answer = text_of(fields, "Candidate Ans").split(", "), text_of(fields, "Ans")
    gold = None
    if answer not in choices:
        context.note("the gold answer is not among the candidates; kept without a gold answer")
    elif len(choices) <= len(LETTERS):
        gold = LETTERS[choices.index(answer)]
    return Question(
        question_id=str(context.index), language=context.language, text=text_of(fields, "Prompt"),
        choices=choices, gold=gold, subject=subject_of(fields, "Subject"),
    )  # fmt: skip


def _xcopa(fields: Fields, context: RecordContext) -> Question:
    phrases = XCOPA_PHRASES.get(context.language)
    if phrases is None:
        raise BadRow("not a language of XCOPA", f"{context.language!r}; XCOPA has {', '.join(XCOPA_PHRASES)}")
    relation = text_of(fields, "question")
    if relation not in phrases:
        raise BadRow("field 'question' must be cause or effect", repr(relation))
    label = fields.get("label")
    if label not in (None, -1, 0, 1):
        raise BadRow("field 'label' must be 0, 1, or -1 if unknown", repr(label))
    return Question(
        question_id=id_of(fields, "idx"), language=context.language,
        text=f"{text_of(fields, 'premise')}\n{phrases[relation]}",
        choices=[text_of(fields, "choice1"), text_of(fields, "choice2")],
        gold=None if label in (None, -1) else "AB"[int(label)], subject=None,
    )  # fmt: skip


FORMATS: dict[str, Format] = {
    layout.name: layout
    for layout in (
        Format(
            "questions", ("question_id", "language", "text", "choices"), _questions,
            "calm_ray.core.rows.Question; gold and subject are optional", language_field="language",
        ),
        Format(
            "xcsqa", ("id", "lang", "question"), _xcsqa,
            "https://huggingface.co/datasets/INK-USC/xcsr", language_field="lang",
        ),
        Format("calm", ("instruction", "input", "output"), _calm, "https://github.com/wangym2/CALM, data/"),
        Format(
            "medqa", ("question", "options", "answer_idx"), _medqa,
            "https://github.com/jind11/MedQA, four options",
            path_languages={"us": "en", "mainland": "zh"}, parallel=False,
        ),
        Format(
            "mmmlu", ("Question", "A", "B", "C", "D", "Answer"), _mmmlu, "https://huggingface.co/datasets/openai/MMMLU"
        ),
        Format(
            "global_mmlu", ("sample_id", "question", "option_a", "option_b", "option_c", "option_d", "answer"),
            _global_mmlu, "https://huggingface.co/datasets/CohereForAI/Global-MMLU",
        ),
        Format(
            "bmlama", ("Prompt", "Ans", "Candidate Ans"), _bmlama,
            "https://github.com/Betswish/Cross-Lingual-Consistency, 1_easyrun/",
        ),
        Format(
            "xcopa", ("premise", "choice1", "choice2", "question"), _xcopa, "https://github.com/cambridgeltl/xcopa"
        ),
    )
}  # fmt: skip


def format_named(name: str) -> Format:
    if name not in FORMATS:
        raise InputError(f"format: unknown format {name!r}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def recognize(part: str, fields: Iterable[str]) -> Format:
    """The format of a file whose records have these fields. Raises InputError with what the closest format needs."""
    present = set(fields)
    missing = {one.name: [name for name in one.fields if name not in present] for one in FORMATS.values()}
    closest = min(FORMATS.values(), key=lambda one: len(missing[one.name]) / len(one.fields))
    if not missing[closest.name]:
        return closest
    hint = "" if len(missing[closest.name]) == len(closest.fields) else (
        f"; closest is {closest.name}, which also needs {', '.join(missing[closest.name])}"
    )  # fmt: skip
    raise InputError(
        f"{part}: its fields ({', '.join(map(str, fields))}) match no known format ({', '.join(FORMATS)}){hint}"
    )
