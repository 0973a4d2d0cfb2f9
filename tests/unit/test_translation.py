"""Questions in missing languages: what is asked, what is kept, what is never asked twice."""

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
    """Writes replies word by word from a dictionary, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, messages: list[str]) -> list[str]:
        self.asked += messages
        return [self._one(message) for message in messages]

    def _one(self, message: str) -> str:
        words = next(words for name, words in WORDS.items() if f"into {name}" in message)
        lines = message.split("\n\n", 1)[1].splitlines()
        return "\n".join(" ".join(words.get(word, word) for word in line.split(" ")) for line in lines)


def english(number: int, text: str = "which animal flies") -> Question:
    return Question(
        question_id=f"q{number}", language="en", text=f"{text} {number}",
        choices=["eagle", "bear"], gold="B", subject="animals",
    )  # fmt: skip


def by_dictionary(write: Callable[[list[str]], Sequence[str | None]], batch: int = 64) -> ModelQuestionTranslator:
    return ModelQuestionTranslator(write, "dictionary", batch)


def storage(folder: Path) -> Storage:
    return Storage(str(folder))


def test_the_prompt_holds_the_question_with_its_letters_and_names_the_languages() -> None:
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
def test_a_reply_is_read_back_into_text_and_options(reply: str) -> None:
    assert parse_reply(WORDING, reply) == Wording("quel animal vole", ("aigle", "ours"))


@pytest.mark.parametrize(
    ("what", "reply"),
    [
        ("nothing", ""),
        ("lost", "quel animal vole\nA. aigle"),
        ("doubled", "quel animal vole\nA. aigle\nA. ours"),
        ("one too many", "quel animal vole\nA. aigle\nB. ours\nC. poisson"),
        ("reordered", "quel animal vole\nB. ours\nA. aigle"),
        ("renamed", "quel animal vole\na. aigle\nb. ours"),
        ("Cyrillic letters", "quel animal vole\nА. aigle\nВ. ours"),
        ("empty option", "quel animal vole\nA. aigle\nB. "),
        ("no letters", "quel animal vole\naigle\nours"),
        ("no text", "A. aigle\nB. ours"),
        ("a remark before", "Voici :\nquel animal vole\nA. aigle\nB. ours"),
        ("an answer after", "quel animal vole\nA. aigle\nB. ours\nRéponse : A"),
    ],
)
def test_a_reply_without_the_same_letters_in_order_fails(what: str, reply: str) -> None:
    assert parse_reply(WORDING, reply) is None


def test_letters_inside_texts_and_options_are_words() -> None:
    wording = Wording("E. coli?\nA. M. says:\n\nwhich", ("Vitamin B. complex", "C. difficile", "one\ntwo", "x", "y"))
    reply = "E. coli ?\nA. M. dit :\nlequel\nA. vitamine B. complexe\nB. C. difficile\nC. un\ndeux\nD. x\nE. y"
    assert parse_reply(wording, reply) == Wording(
        "E. coli ?\nA. M. dit :\n\nlequel", ("vitamine B. complexe", "C. difficile", "un\ndeux", "x", "y")
    )


def test_lines_are_taken_and_put_back_where_they_were() -> None:
    text = "\n one\n\n\n two \nthree\n"
    assert lines_of(text) == ["one", "two", "three"]
    assert with_lines(text, ["1", "2", "3"]) == "1\n\n\n2\n3"


def test_the_missing_rows_are_added_question_by_question(tmp_path: Path) -> None:
    given = Question(
        question_id="q1", language="fr", text="Lequel ?", choices=["l'aigle", "l'ours"], gold="B", subject=None
    )
    rows, report = translate_missing(
        [english(1), english(2), given], ["de", "en", "fr"], by_dictionary(Dictionary()), storage(tmp_path)
    )
    assert [(row["question_id"], row["language"]) for row in rows] == [
        (question, language) for question in ("q1", "q2") for language in ("de", "en", "fr")
    ]
    assert rows[0] == Question(
        question_id="q1", language="de", text="welches Tier fliegt 1", choices=["Adler", "Bär"], gold="B",
        subject="animals",
    )  # fmt: skip
    assert rows[1] == english(1)
    assert rows[2] == given
    assert rows[5]["choices"] == ["aigle", "ours"]
    nothing = {"cached": 0, "failed": 0, "identical": 0}
    assert report == {"de": {"asked": 2, "translated": 2, **nothing}, "fr": {"asked": 1, "translated": 1, **nothing}}


def test_rows_in_languages_that_were_not_asked_for_are_kept(tmp_path: Path) -> None:
    rows, _ = translate_missing([english(1)], ["fr"], by_dictionary(Dictionary()), storage(tmp_path))
    assert [row["language"] for row in rows] == ["fr", "en"]


def test_failed_and_identical_questions_get_no_row_and_are_counted(tmp_path: Path) -> None:
    write = Dictionary()

    def sometimes(messages: list[str]) -> list[str]:
        replies = write(messages)
        return [reply.replace("B. ", "C. ") if " 2\n" in reply else reply for reply in replies]

    copied = english(3, "DNA")  # of which the dictionary knows no word
    rows, report = translate_missing(
        [english(1), english(2), copied], ["en", "fr"], by_dictionary(sometimes), storage(tmp_path)
    )
    assert [row["question_id"] for row in rows if row["language"] == "fr"] == ["q1"]
    assert report == {"fr": {"asked": 3, "cached": 0, "translated": 1, "failed": 1, "identical": 1}}
    # A second run knows all of this, the failure too, and asks nothing.
    asked = len(write.asked)
    again, report = translate_missing(
        [english(1), english(2), copied], ["en", "fr"], by_dictionary(sometimes), storage(tmp_path)
    )
    assert again == rows
    assert len(write.asked) == asked
    assert report == {"fr": {"asked": 3, "cached": 3, "translated": 1, "failed": 1, "identical": 1}}


def test_a_question_without_a_reply_is_no_failure_of_the_translator_and_is_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None is no reply: the engines died. An empty reply is one, and fails."""
    write = Dictionary()

    def dies(messages: list[str]) -> list[str | None]:
        replies = write(messages)
        return [None if " 2\n" in reply else "" if " 3\n" in reply else reply for reply in replies]

    asked = [english(number) for number in (1, 2, 3)]
    rows, report = translate_missing(asked, ["en", "fr"], by_dictionary(dies), storage(tmp_path))
    assert [row["question_id"] for row in rows if row["language"] == "fr"] == ["q1"]
    assert report == {"fr": {"asked": 3, "cached": 0, "translated": 1, "failed": 2, "identical": 0}}
    assert "1 questions got no reply" in capsys.readouterr().out
    rows, report = translate_missing(asked, ["en", "fr"], by_dictionary(write), storage(tmp_path))
    assert len(write.asked) == 4
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
def test_a_copy_is_recognised_whatever_its_case_width_and_space(text: str, translated: str, same: bool) -> None:
    assert is_identical(text, translated) is same


def test_identical_options_are_no_failure(tmp_path: Path) -> None:
    question = Question(
        question_id="q1", language="en", text="which flies", choices=["DNA", "RNA"], gold=None, subject=None
    )
    rows, _ = translate_missing([question], ["fr"], by_dictionary(Dictionary()), storage(tmp_path))
    assert (rows[0]["text"], rows[0]["choices"]) == ("quel vole", ["DNA", "RNA"])


def test_what_changed_is_asked_again_and_nothing_else(tmp_path: Path) -> None:
    write = Dictionary()
    rows = [english(number) for number in range(3)]
    translate_missing(rows, ["fr"], by_dictionary(write), storage(tmp_path))
    assert len(write.asked) == 3
    rows[1]["choices"] = ["eagle", "fish"]
    added, report = translate_missing(rows, ["fr"], by_dictionary(write), storage(tmp_path))
    assert len(write.asked) == 4
    assert added[2]["choices"] == ["aigle", "poisson"]
    assert report["fr"]["cached"] == 2
    # Another translator or language finds nothing of this.
    translate_missing(rows, ["de"], by_dictionary(write), storage(tmp_path))
    translate_missing(rows, ["fr"], ModelQuestionTranslator(write, "another"), storage(tmp_path))
    assert len(write.asked) == 10


def test_questions_of_the_same_words_are_asked_once(tmp_path: Path) -> None:
    write = Dictionary()
    twin = Question(**{**english(1), "question_id": "twin"})
    rows, report = translate_missing([english(1), twin], ["fr"], by_dictionary(write), storage(tmp_path))
    assert len(write.asked) == 1
    assert rows[0]["text"] == rows[2]["text"]
    assert report["fr"]["translated"] == 2


def test_nothing_missing_asks_nothing(tmp_path: Path) -> None:
    def never(messages: list[str]) -> list[str]:
        raise AssertionError

    rows, report = translate_missing([english(1)], ["en"], by_dictionary(never), storage(tmp_path))
    assert (rows, report) == ([english(1)], {})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_goes_on_after_its_last_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "BATCH", 4)
    write, rows = Dictionary(), [english(number) for number in range(10)]

    def dies(messages: list[str]) -> list[str]:
        if len(write.asked) >= 8:
            raise KeyboardInterrupt
        return write(messages)

    with pytest.raises(KeyboardInterrupt):
        translate_missing(rows, ["fr"], by_dictionary(dies, 4), storage(tmp_path))
    added, report = translate_missing(rows, ["fr"], by_dictionary(write, 4), storage(tmp_path))
    assert len(write.asked) == 10
    assert report["fr"] == {"asked": 10, "cached": 8, "translated": 10, "failed": 0, "identical": 0}
    assert len(added) == 20


def test_runs_side_by_side_do_not_write_over_each_other(tmp_path: Path) -> None:
    one, other = (TranslationCache(storage(tmp_path), "dictionary") for _ in range(2))
    requests = [Request(Wording(f"which {number}", ("eagle", "bear")), "en", "fr") for number in range(3)]
    done = [Wording(f"quel {number}", ("aigle", "ours")) for number in range(3)]
    one.write(list(zip(requests[:2], done[:2], strict=True)))
    other.write(list(zip(requests[1:], done[1:], strict=True)))
    one.write(list(zip(reversed(requests[:2]), reversed(done[:2]), strict=True)))  # the same batch: the same file
    assert one.read(requests) == other.read(requests) == dict(zip(requests, done, strict=True))
    assert len(list(tmp_path.glob("dictionary-*/en-fr/*.parquet"))) == 2


def test_a_torn_file_is_not_read(tmp_path: Path) -> None:
    cache, request = TranslationCache(storage(tmp_path), "owner/name base"), Request(WORDING, "en", "fr")
    cache.write([(request, None)])
    (file,) = tmp_path.glob("owner_name_base-*/en-fr/*.parquet")
    file.with_name(f"{'0' * 64}.parquet.tmp-1234").write_bytes(b"PAR1")
    assert cache.read([request]) == {request: None}


def test_a_question_is_translated_from_the_first_language_that_it_has(tmp_path: Path) -> None:
    french = Question(
        question_id="q7", language="fr", text="quel animal vole 7", choices=["aigle", "ours"], gold="A", subject=None
    )
    write = Dictionary()
    translate_missing([english(1), french], ["fr", "en", "de"], by_dictionary(write), storage(tmp_path))
    asked = ["from English into French", "from French into English", "from English into German", "from French into"]
    for direction in asked:
        assert any(direction in message for message in write.asked)
    assert not any("from German" in message for message in write.asked)


def test_an_unknown_language_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    write = Dictionary()
    with pytest.raises(InputError, match="'tlh' is none of those"):
        translate_missing([english(1)], ["fr", "tlh"], by_dictionary(write), storage(tmp_path))
    assert write.asked == []
