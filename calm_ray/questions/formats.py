"""The published layouts of multiple-choice questions: one function each, from a record to a `Question`.

A layout is recognised by the fields that its records have. Texts and choices are kept as they are published.
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
class At:
    """What a record does not say itself: its language, its place in its file (from 0), and where to note a repair."""

    language: str
    index: int
    note: Callable[[str], None]


@dataclass(frozen=True)
class Format:
    name: str
    fields: tuple[str, ...]
    """A file whose records have all of these is of this format."""
    parse: Callable[[Fields, At], Question]
    """Raises BadRow."""
    published: str
    """Where the layout is published."""
    language_field: str | None = None
    """The field that holds the language; None where the name of the file or of its folder says it."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Words of a path that stand for a language."""
    parallel: bool = True
    """The same question_id is the same question in every language."""


def text_of(fields: Fields, name: str) -> str:
    """A field that must hold a text."""
    value = fields.get(name)
    if value is None or value == "":
        raise BadRow(f"field {name!r} is missing or empty")
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is not a text", repr(value)[:80])
    return value


def id_of(fields: Fields, name: str) -> str:
    """A field that must hold a text or a whole number, as a text."""
    value = fields.get(name)
    return str(value) if isinstance(value, int) else text_of(fields, name)


def letter_of(value: Any, at: At) -> str | None:
    """A gold letter; None where there is none. A letter in lower case is repaired."""
    if value is None or value == "":
        return None
    letter = str(value).strip()
    if letter != letter.upper():
        at.note("the gold letter was lower case")
    return letter.upper()


def subject_of(fields: Fields, name: str) -> str | None:
    value = fields.get(name)
    return None if value is None or value == "" else str(value)


def _questions(fields: Fields, at: At) -> Question:
    choices = fields.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise BadRow("field 'choices' must be a list of texts")
    return Question(
        question_id=id_of(fields, "question_id"), language=at.language, text=text_of(fields, "text"),
        choices=choices, gold=letter_of(fields.get("gold"), at), subject=subject_of(fields, "subject"),
    )  # fmt: skip


def _xcsqa(fields: Fields, at: At) -> Question:
    asked = fields.get("question")
    choices = asked.get("choices") if isinstance(asked, dict) else None
    try:
        if isinstance(choices, dict):  # as Parquet and the hub hold it
            labels, texts = list(choices["label"]), list(choices["text"])
        else:
            labels, texts = [one["label"] for one in choices], [one["text"] for one in choices]  # type: ignore[union-attr]
    except (KeyError, TypeError):
        raise BadRow("field 'question' must hold a stem, and choices with label and text") from None
    if len(labels) != len(texts) or not all(isinstance(text, str) for text in texts):
        raise BadRow("field 'question' must hold as many labels as texts")
    key = fields.get("answerKey") or None
    if key is not None and key not in labels:
        raise BadRow("the gold answer is none of the choices", f"{key!r} of {', '.join(map(str, labels))}")
    gold = None if key is None else LETTERS[labels.index(key)] if len(labels) <= len(LETTERS) else None
    return Question(
        question_id=id_of(fields, "id"), language=at.language, text=text_of(asked or {}, "stem"),
        choices=texts, gold=gold, subject=None,
    )  # fmt: skip


def _calm(fields: Fields, at: At) -> Question:
    text, choices = read_input(text_of(fields, "input"), at.note)
    return Question(
        question_id=str(at.index), language=at.language, text=text, choices=choices,
        gold=read_gold(str(fields.get("output") or ""), choices, at.note), subject=None,
    )  # fmt: skip


def _medqa(fields: Fields, at: At) -> Question:
    options = fields.get("options")
    if not isinstance(options, dict) or not all(isinstance(label, str) for label in options):
        raise BadRow("field 'options' must hold a text for each letter")
    labels = sorted(label for label in options if options[label] is not None)
    key = fields.get("answer_idx") or None
    if key is not None and key not in labels:
        raise BadRow("the gold answer is none of the choices", f"{key!r} of {', '.join(labels)}")
    choices = [text_of(options, label) for label in labels]
    return Question(
        question_id=f"{at.language}-{at.index}", language=at.language, text=text_of(fields, "question"),
        choices=choices, gold=LETTERS[labels.index(key)] if key in labels[: len(LETTERS)] else None,
        subject=subject_of(fields, "meta_info"),
    )  # fmt: skip


def _mmmlu(fields: Fields, at: At) -> Question:
    index = next((fields[name] for name in ("", "Unnamed: 0") if fields.get(name) is not None), at.index)
    return Question(
        question_id=str(index), language=at.language, text=text_of(fields, "Question"),
        choices=[text_of(fields, letter) for letter in "ABCD"], gold=letter_of(fields.get("Answer"), at),
        subject=subject_of(fields, "Subject"),
    )  # fmt: skip


def _global_mmlu(fields: Fields, at: At) -> Question:
    return Question(
        question_id=id_of(fields, "sample_id"), language=at.language, text=text_of(fields, "question"),
        choices=[text_of(fields, f"option_{letter}") for letter in "abcd"], gold=letter_of(fields.get("answer"), at),
        subject=subject_of(fields, "subject"),
    )  # fmt: skip


def _bmlama(fields: Fields, at: At) -> Question:
    choices, answer = text_of(fields, "Candidate Ans").split(", "), text_of(fields, "Ans")
    gold = None
    if answer not in choices:
        at.note("the gold answer is not among the candidates; kept without one")
    elif len(choices) <= len(LETTERS):
        gold = LETTERS[choices.index(answer)]
    return Question(
        question_id=str(at.index), language=at.language, text=text_of(fields, "Prompt"),
        choices=choices, gold=gold, subject=subject_of(fields, "Subject"),
    )  # fmt: skip


def _xcopa(fields: Fields, at: At) -> Question:
    phrases = XCOPA_PHRASES.get(at.language)
    if phrases is None:
        raise BadRow("XCOPA has no such language", f"{at.language!r}; it has {', '.join(XCOPA_PHRASES)}")
    asked = text_of(fields, "question")
    if asked not in phrases:
        raise BadRow("field 'question' must be cause or effect", repr(asked))
    label = fields.get("label")
    if label not in (None, -1, 0, 1):
        raise BadRow("field 'label' must be 0 or 1, or -1 where it is unknown", repr(label))
    return Question(
        question_id=id_of(fields, "idx"), language=at.language,
        text=f"{text_of(fields, 'premise')}\n{phrases[asked]}",
        choices=[text_of(fields, "choice1"), text_of(fields, "choice2")],
        gold=None if label in (None, -1) else "AB"[int(label)], subject=None,
    )  # fmt: skip


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format(
            "questions", ("question_id", "language", "text", "choices"), _questions,
            "calm_ray.core.rows.Question; gold and subject may be left out", language_field="language",
        ),
        Format(
            "xcsqa", ("id", "lang", "question"), _xcsqa,
            "https://huggingface.co/datasets/INK-USC/xcsr", language_field="lang",
        ),
        Format("calm", ("instruction", "input", "output"), _calm, "https://github.com/wangym2/CALM, data/"),
        Format(
            "medqa", ("question", "options", "answer_idx"), _medqa,
            "https://github.com/jind11/MedQA, four options", places={"us": "en", "mainland": "zh"}, parallel=False,
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
        raise InputError(f"format: {name!r} is not known; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def recognise(part: str, fields: Iterable[str]) -> Format:
    """The format of a file whose records have these fields; InputError says what the nearest format lacks."""
    there = set(fields)
    lacking = {one.name: [name for name in one.fields if name not in there] for one in FORMATS.values()}
    nearest = min(FORMATS.values(), key=lambda one: len(lacking[one.name]) / len(one.fields))
    if not lacking[nearest.name]:
        return nearest
    near = "" if len(lacking[nearest.name]) == len(nearest.fields) else (
        f"; nearest is {nearest.name}, which also has {', '.join(lacking[nearest.name])}"
    )  # fmt: skip
    raise InputError(
        f"{part}: its fields ({', '.join(map(str, fields))}) are those of no known format ({', '.join(FORMATS)}){near}"
    )
