"""Translating questions into missing languages: prompts, replies and the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question
from calm_ray.questions import translation
from calm_ray.questions.translation import (
    ModelQuestionTranslator,
    Request,
    TranslationCache,
    Wording,
    is_identical,
    lines_of,
    parse_reply,
    prompt_of,
    translate_missing,
    with_lines,
)
from calm_ray.run.storage import Storage

ENGLISH = ("which", "animal", "flies", "eagle", "bear", "fish")
WORDS = {
    "French": dict(zip(ENGLISH, ("quel", "animal", "vole", "aigle", "ours", "poisson"), strict=True)),
    "German": dict(zip(ENGLISH, ("welches", "Tier", "fliegt", "Adler", "Bär", "Fisch"), strict=True)),
    "English": {},
}
WORDING = Wording("which animal flies", ("eagle", "bear"))


class Dictionary:
    """Replies word by word from a dictionary and records its prompts."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __call__(self, messages: list[str]) -> list[str]:
        self.prompts += messages
        return [self._one(message) for message in messages]

    def _one(self, message: str) -> str:
        words = next(words for name, words in WORDS.items() if f"into {name}" in message)
        lines = message.split("\n\n", 1)[1].splitlines()
        return "\n".join(" ".join(words.get(word, word) for word in line.split(" ")) for line in lines)


def english_question(number: int, text: str = "which animal flies") -> Question:
    return Question(
        question_id=f"q{number}", language="en", text=f"{text} {number}",
        choices=["eagle", "bear"], gold="B", subject="animals",
    )  # fmt: skip


def translator_with(reply: Callable[[list[str]], Sequence[str | None]], batch: int = 64) -> ModelQuestionTranslator:
    return ModelQuestionTranslator(reply, "dictionary", batch)


def make_storage(folder: Path) -> Storage:
    return Storage(str(folder))


def test_prompt_has_the_lettered_question_and_language_names() -> None:
    prompt = prompt_of(Request(Wording("Which?\n\nFlies.", ("eagle", "bear", "fish")), "en", "zh"))
    assert "from English into Chinese" in prompt
    assert "(A, B, C)" in prompt
    assert prompt.endswith("\n\nWhich?\nFlies.\nA. eagle\nB. bear\nC. fish\n")


@pytest.mark.parametrize(
    "reply",
    [
        "quel animal vole\nA. aigle\nB. ours",
        "\nquel animal vole\n\n  A) aigle\n  B) ours\n\n",
        "quel animal vole\nＡ．aigle\nＢ：ours",
        "quel animal vole\nA.aigle\nB、ours",
    ],
)
def test_reply_is_parsed_into_text_and_options(reply: str) -> None:
    assert parse_reply(WORDING, reply) == Wording("quel animal vole", ("aigle", "ours"))


@pytest.mark.parametrize(
    ("problem", "reply"),
    [
        ("empty", ""),
        ("missing option", "quel animal vole\nA. aigle"),
        ("duplicate letter", "quel animal vole\nA. aigle\nA. ours"),
        ("extra option", "quel animal vole\nA. aigle\nB. ours\nC. poisson"),
        ("reordered", "quel animal vole\nB. ours\nA. aigle"),
        ("lowercase letters", "quel animal vole\na. aigle\nb. ours"),
        ("Cyrillic letters", "quel animal vole\nА. aigle\nВ. ours"),
        ("empty option", "quel animal vole\nA. aigle\nB. "),
        ("no letters", "quel animal vole\naigle\nours"),
        ("no text", "A. aigle\nB. ours"),
        ("leading remark", "Voici :\nquel animal vole\nA. aigle\nB. ours"),
        ("trailing answer", "quel animal vole\nA. aigle\nB. ours\nRéponse : A"),
    ],
)
def test_reply_without_the_same_letters_in_order_fails(problem: str, reply: str) -> None:
    assert parse_reply(WORDING, reply) is None


def test_letters_inside_text_and_options_are_kept() -> None:
    wording = Wording("E. coli?\nA. M. says:\n\nwhich", ("Vitamin B. complex", "C. difficile", "one\ntwo", "x", "y"))
    reply = "E. coli ?\nA. M. dit :\nlequel\nA. vitamine B. complexe\nB. C. difficile\nC. un\ndeux\nD. x\nE. y"
    assert parse_reply(wording, reply) == Wording(
        "E. coli ?\nA. M. dit :\n\nlequel", ("vitamine B. complexe", "C. difficile", "un\ndeux", "x", "y")
    )


def test_lines_are_extracted_and_restored_in_place() -> None:
    text = "\n one\n\n\n two \nthree\n"
    assert lines_of(text) == ["one", "two", "three"]
    assert with_lines(text, ["1", "2", "3"]) == "1\n\n\n2\n3"


def test_missing_rows_are_added_question_by_question(tmp_path: Path) -> None:
    french = Question(
        question_id="q1", language="fr", text="Lequel ?", choices=["l'aigle", "l'ours"], gold="B", subject=None
    )
    rows, report = translate_missing(
        [english_question(1), english_question(2), french],
        ["de", "en", "fr"],
        translator_with(Dictionary()),
        make_storage(tmp_path),
    )
    assert [(row["question_id"], row["language"]) for row in rows] == [
        (question, language) for question in ("q1", "q2") for language in ("de", "en", "fr")
    ]
    assert rows[0] == Question(
        question_id="q1", language="de", text="welches Tier fliegt 1", choices=["Adler", "Bär"], gold="B",
        subject="animals",
    )  # fmt: skip
    assert rows[1] == english_question(1)
    assert rows[2] == french
    assert rows[5]["choices"] == ["aigle", "ours"]
    nothing = {"cached": 0, "failed": 0, "identical": 0}
    assert report == {"de": {"asked": 2, "translated": 2, **nothing}, "fr": {"asked": 1, "translated": 1, **nothing}}


def test_rows_in_other_languages_are_kept(tmp_path: Path) -> None:
    rows, _ = translate_missing([english_question(1)], ["fr"], translator_with(Dictionary()), make_storage(tmp_path))
    assert [row["language"] for row in rows] == ["fr", "en"]


def test_failed_and_identical_translations_are_only_counted(tmp_path: Path) -> None:
    dictionary = Dictionary()

    def garble(messages: list[str]) -> list[str]:
        replies = dictionary(messages)
        return [reply.replace("B. ", "C. ") if " 2\n" in reply else reply for reply in replies]

    untranslatable = english_question(3, "DNA")  # not in the dictionary
    rows, report = translate_missing(
        [english_question(1), english_question(2), untranslatable],
        ["en", "fr"],
        translator_with(garble),
        make_storage(tmp_path),
    )
    assert [row["question_id"] for row in rows if row["language"] == "fr"] == ["q1"]
    assert report == {"fr": {"asked": 3, "cached": 0, "translated": 1, "failed": 1, "identical": 1}}
    # A second run finds everything in the cache, including the failure.
    count = len(dictionary.prompts)
    again, report = translate_missing(
        [english_question(1), english_question(2), untranslatable],
        ["en", "fr"],
        translator_with(garble),
        make_storage(tmp_path),
    )
    assert again == rows
    assert len(dictionary.prompts) == count
    assert report == {"fr": {"asked": 3, "cached": 3, "translated": 1, "failed": 1, "identical": 1}}


def test_question_without_a_reply_is_retried_by_the_next_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None means that the engines crashed. An empty reply is a failed translation and is cached."""
    dictionary = Dictionary()

    def crash(messages: list[str]) -> list[str | None]:
        replies = dictionary(messages)
        return [None if " 2\n" in reply else "" if " 3\n" in reply else reply for reply in replies]

    questions = [english_question(number) for number in (1, 2, 3)]
    rows, report = translate_missing(questions, ["en", "fr"], translator_with(crash), make_storage(tmp_path))
    assert [row["question_id"] for row in rows if row["language"] == "fr"] == ["q1"]
    assert report == {"fr": {"asked": 3, "cached": 0, "translated": 1, "failed": 2, "identical": 0}}
    assert "1 questions crashed their engines and got no reply" in capsys.readouterr().out
    rows, report = translate_missing(questions, ["en", "fr"], translator_with(dictionary), make_storage(tmp_path))
    assert len(dictionary.prompts) == 4
    assert [row["question_id"] for row in rows if row["language"] == "fr"] == ["q1", "q2"]
    assert report == {"fr": {"asked": 3, "cached": 2, "translated": 2, "failed": 1, "identical": 0}}


@pytest.mark.parametrize(
    ("text", "translated", "same"),
    [
        ("What is DNA?", "what  is ＤＮＡ?\n", True),
        ("What is DNA?", "Was ist DNA?", False),
        ("Straße", "STRASSE", True),
    ],
)
def test_copies_are_detected_ignoring_case_width_and_space(text: str, translated: str, same: bool) -> None:
    assert is_identical(text, translated) is same


def test_identical_options_are_accepted(tmp_path: Path) -> None:
    question = Question(
        question_id="q1", language="en", text="which flies", choices=["DNA", "RNA"], gold=None, subject=None
    )
    rows, _ = translate_missing([question], ["fr"], translator_with(Dictionary()), make_storage(tmp_path))
    assert (rows[0]["text"], rows[0]["choices"]) == ("quel vole", ["DNA", "RNA"])


def test_only_changed_questions_are_translated_again(tmp_path: Path) -> None:
    dictionary = Dictionary()
    rows = [english_question(number) for number in range(3)]
    translate_missing(rows, ["fr"], translator_with(dictionary), make_storage(tmp_path))
    assert len(dictionary.prompts) == 3
    rows[1]["choices"] = ["eagle", "fish"]
    added, report = translate_missing(rows, ["fr"], translator_with(dictionary), make_storage(tmp_path))
    assert len(dictionary.prompts) == 4
    assert added[2]["choices"] == ["aigle", "poisson"]
    assert report["fr"]["cached"] == 2
    # Other translators and languages do not share these entries.
    translate_missing(rows, ["de"], translator_with(dictionary), make_storage(tmp_path))
    translate_missing(rows, ["fr"], ModelQuestionTranslator(dictionary, "another"), make_storage(tmp_path))
    assert len(dictionary.prompts) == 10


def test_identical_questions_are_translated_once(tmp_path: Path) -> None:
    dictionary = Dictionary()
    twin = Question(**{**english_question(1), "question_id": "twin"})
    rows, report = translate_missing(
        [english_question(1), twin], ["fr"], translator_with(dictionary), make_storage(tmp_path)
    )
    assert len(dictionary.prompts) == 1
    assert rows[0]["text"] == rows[2]["text"]
    assert report["fr"]["translated"] == 2


def test_complete_questions_are_not_translated(tmp_path: Path) -> None:
    def never(messages: list[str]) -> list[str]:
        raise AssertionError

    rows, report = translate_missing([english_question(1)], ["en"], translator_with(never), make_storage(tmp_path))
    assert (rows, report) == ([english_question(1)], {})
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_resumes_after_its_last_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "BATCH", 4)
    dictionary, rows = Dictionary(), [english_question(number) for number in range(10)]

    def crash(messages: list[str]) -> list[str]:
        if len(dictionary.prompts) >= 8:
            raise KeyboardInterrupt
        return dictionary(messages)

    with pytest.raises(KeyboardInterrupt):
        translate_missing(rows, ["fr"], translator_with(crash, 4), make_storage(tmp_path))
    added, report = translate_missing(rows, ["fr"], translator_with(dictionary, 4), make_storage(tmp_path))
    assert len(dictionary.prompts) == 10
    assert report["fr"] == {"asked": 10, "cached": 8, "translated": 10, "failed": 0, "identical": 0}
    assert len(added) == 20


def test_concurrent_runs_do_not_overwrite_each_other(tmp_path: Path) -> None:
    first, second = (TranslationCache(make_storage(tmp_path), "dictionary") for _ in range(2))
    requests = [Request(Wording(f"which {number}", ("eagle", "bear")), "en", "fr") for number in range(3)]
    done = [Wording(f"quel {number}", ("aigle", "ours")) for number in range(3)]
    first.write(list(zip(requests[:2], done[:2], strict=True)))
    second.write(list(zip(requests[1:], done[1:], strict=True)))
    first.write(list(zip(reversed(requests[:2]), reversed(done[:2]), strict=True)))  # same batch, same file
    assert first.read(requests) == second.read(requests) == dict(zip(requests, done, strict=True))
    assert len(list(tmp_path.glob("dictionary-*/en-fr/*.parquet"))) == 2


def test_partially_written_cache_file_is_ignored(tmp_path: Path) -> None:
    cache, request = TranslationCache(make_storage(tmp_path), "owner/name base"), Request(WORDING, "en", "fr")
    cache.write([(request, None)])
    (file,) = tmp_path.glob("owner_name_base-*/en-fr/*.parquet")
    file.with_name(f"{'0' * 64}.parquet.tmp-1234").write_bytes(b"PAR1")
    assert cache.read([request]) == {request: None}


def test_question_is_translated_from_its_first_available_language(tmp_path: Path) -> None:
    french = Question(
        question_id="q7", language="fr", text="quel animal vole 7", choices=["aigle", "ours"], gold="A", subject=None
    )
    dictionary = Dictionary()
    translate_missing(
        [english_question(1), french], ["fr", "en", "de"], translator_with(dictionary), make_storage(tmp_path)
    )
    directions = [
        "from English into French",
        "from French into English",
        "from English into German",
        "from French into",
    ]
    for direction in directions:
        assert any(direction in message for message in dictionary.prompts)
    assert not any("from German" in message for message in dictionary.prompts)


def test_unknown_language_is_refused_before_translating(tmp_path: Path) -> None:
    dictionary = Dictionary()
    with pytest.raises(InputError, match="unknown language 'tlh'"):
        translate_missing([english_question(1)], ["fr", "tlh"], translator_with(dictionary), make_storage(tmp_path))
    assert dictionary.prompts == []
