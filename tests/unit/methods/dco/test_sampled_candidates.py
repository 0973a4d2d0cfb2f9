"""Candidates from a policy's own samples: which are drawn, and how they are translated into every language."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from factories import completion, completions, question

from calm_ray.core.rows import CandidateSet, Completion, Question
from calm_ray.engines.requests import Score
from calm_ray.methods.dco.sampled_candidates import Translated, candidate_sets, draw, translate_candidates
from calm_ray.prompts.passages import Passage
from calm_ray.testing import ScriptedGenerator, word_tokenizer

TOKENIZER = word_tokenizer(["Question", "q1?", "red", "blue", "green", "rouge", "bleu", "vert"])
EOS = TOKENIZER.eos_token_id
FRENCH = {"red": "rouge", "blue": "bleu", "green": "vert"}


class Dictionary:
    """Translates known words in both directions and fails on others; records its passages in `requested`."""

    def __init__(self, **known: str) -> None:
        self._known = {**known, **{foreign: word for word, foreign in known.items()}}
        self.requested: list[Passage] = []

    def translate(self, passages: Sequence[Passage]) -> list[str | None]:
        self.requested += passages
        return [self._known.get(passage.text) for passage in passages]


def sampled(text: str, language: str = "en", number: int = 0, finish_reason: str = "stop") -> Completion:
    """An open answer without a letter."""
    return completion(None, language, number, text=text, finish_reason=finish_reason)


def open_questions(*languages: str) -> dict[str, Question]:
    return {code: question("q1", code, choices=0) for code in languages}


def translate_all(own: list[Completion], translator: Dictionary) -> list[Translated]:
    return translate_candidates({"q1": own}, {"q1": open_questions("en", "fr")}, translator)["q1"]


def sets_of(
    translated: list[Translated], questions: dict[str, Question], context_tokens: int | None = None
) -> list[CandidateSet]:
    return candidate_sets(questions, translated, TOKENIZER, form="choices", context_tokens=context_tokens)


def test_each_answer_is_drawn_once_in_any_language_or_wording() -> None:
    rows = completions({"en": "AABA", "fr": "BCAA"})
    assert sorted(str(one["answer"]) for one in draw(rows, 9, 0, 1)) == ["A", "B", "C"]


def test_open_answers_are_deduplicated_by_text() -> None:
    rows = [sampled(text) for text in ("red", " red\n", "blue", "  ")] + [sampled("red", "fr")]
    assert sorted(one["text"].strip() for one in draw(rows, 9, 0, 1)) == ["blue", "red"]


def test_unparseable_answer_is_distinct_from_a_letter() -> None:
    rows = [completion("A", text="Answer: A"), completion(None, text="A"), completion(None, text="who knows")]
    assert len(draw(rows, 9, 0, 1)) == 3


def test_draws_are_limited_and_favor_frequent_answers() -> None:
    rows = completions({"en": "A" * 30 + "B" * 6 + "CDE"})
    firsts = [draw(rows, 2, seed, 1) for seed in range(100)]
    assert {len(one) for one in firsts} == {2}
    assert sum("A" in [one["answer"] for one in drawn] for drawn in firsts) > 90
    assert len({one["sample"] for drawn in firsts for one in drawn if one["answer"] == "A"}) > 10


def test_no_samples_give_no_candidates() -> None:
    assert draw([], 4, 0, 1) == []
    assert draw([sampled(" ")], 4, 0, 1) == []


def test_draws_depend_only_on_seed_round_and_question() -> None:
    def drawn(seed: int, number: int, question_id: str = "q1") -> list[str | None]:
        rows = completions({"en": "ABCDEFGH"}, question_id)
        return [one["answer"] for one in draw(rows, 4, seed, number)]

    assert drawn(0, 1) == drawn(0, 1)
    assert len({tuple(drawn(*how)) for how in ((0, 1), (1, 1), (0, 2), (0, 1, "q2"))}) == 4


def test_each_language_is_translated_into_the_other() -> None:
    own = [sampled("red"), sampled("bleu", "fr")]
    translator = Dictionary(**FRENCH)
    kept = translate_all(own, translator)
    assert [one.texts for one in kept] == [{"en": "red", "fr": "rouge"}, {"en": "blue", "fr": "bleu"}]
    assert [(one.source, one.target, one.text) for one in translator.requested] == [
        ("en", "fr", "red"), ("fr", "en", "bleu"),
    ]  # fmt: skip
    assert {(one.answer, one.letters) for one in translator.requested} == {(None, "")}


def test_letters_must_survive_if_the_question_has_choices() -> None:
    translator = Dictionary(red="rouge")
    questions = {code: question("q1", code, choices=3) for code in ("en", "fr")}
    translate_candidates({"q1": [completion("B", text="red")]}, {"q1": questions}, translator)
    assert translator.requested == [Passage("red", "en", "fr", "B", "ABC")]


def test_failed_translation_drops_the_candidate_in_all_languages() -> None:
    own = [sampled("red"), sampled("blue"), sampled("vert", "fr")]
    assert [one.texts["en"] for one in translate_all(own, Dictionary(red="rouge", green="vert"))] == ["red", "green"]


def test_duplicate_translation_drops_the_candidate_in_all_languages() -> None:
    own = [sampled("red"), sampled("rouge ", "fr"), sampled("blue"), sampled("green")]
    translator = Dictionary(**{"red": "rouge", "rouge ": "ruby", "blue": "bleu", "green": " bleu\n"})
    # "ruby" is new in English but "rouge" is not in French, and "green" translates like "blue"; the earlier ones stay.
    assert [one.texts["en"] for one in translate_all(own, translator)] == ["red", "blue"]


def test_translation_does_not_depend_on_other_questions() -> None:
    drawn = {key: [sampled("red"), sampled("bleu", "fr")] for key in ("q1", "q2")}
    drawn["q2"] = [sampled("green"), *drawn["q2"]]
    questions = {key: open_questions("en", "fr") for key in drawn}
    alone = translate_candidates({"q1": drawn["q1"]}, questions, Dictionary(**FRENCH))
    assert translate_candidates(drawn, questions, Dictionary(**FRENCH))["q1"] == alone["q1"]


def test_candidate_sets_are_parallel_by_index() -> None:
    kept = translate_all([sampled("red"), sampled("bleu", "fr"), sampled("green")], Dictionary(**FRENCH))
    english, french = sets_of(kept, open_questions("en", "fr"))
    assert (english["language"], french["language"]) == ("en", "fr")
    assert english["texts"] == english["choices"] == ["red", "blue", "green"]
    assert french["texts"] == french["choices"] == ["rouge", "bleu", "vert"]
    for one in (english, french):
        assert one["prompt"] == "Question q1?\n"
        assert one["prompt_token_ids"] == TOKENIZER.encode("Question q1?")
        assert one["right"] is None


def test_fewer_than_two_candidates_give_no_set() -> None:
    (one,) = translate_all([sampled("red")], Dictionary(**FRENCH))
    assert sets_of([one], open_questions("en", "fr")) == []
    assert sets_of([], open_questions("en", "fr")) == []


@pytest.mark.parametrize(("finish_reason", "ending"), [("stop", [EOS]), ("length", [])])
def test_samples_keep_their_tokens_and_translations_end_alike(finish_reason: str, ending: list[int]) -> None:
    own = [sampled("red", "en", 3, finish_reason), sampled("bleu", "fr", 5, finish_reason)]
    english, french = sets_of(translate_all(own, Dictionary(**FRENCH)), open_questions("en", "fr"))
    rouge, blue = TOKENIZER.encode("rouge"), TOKENIZER.encode("blue")
    # The factory gives samples 3 and 5 the tokens 13 and 15.
    assert english["token_ids"] == [[13, *ending], [*blue, *ending]]
    assert french["token_ids"] == [[*rouge, *ending], [15, *ending]]


def test_too_long_translation_drops_the_candidate_in_all_languages() -> None:
    long = "rouge " * 20
    own = [sampled("red"), sampled("blue"), sampled("green")]
    kept = translate_all(own, Dictionary(red=long, blue="bleu", green="vert"))
    prompt = len(TOKENIZER.encode("Question q1?"))
    fitting = sets_of(kept, open_questions("en", "fr"), context_tokens=prompt + 21)
    assert [one["texts"] for one in fitting] == [["blue", "green"], ["bleu", "vert"]]
    assert len(sets_of(kept, open_questions("en", "fr"), context_tokens=prompt + 22)[0]["texts"]) == 3
    assert sets_of(kept[:2], open_questions("en", "fr"), context_tokens=prompt + 21) == []


def test_right_candidate_is_found_by_its_letter() -> None:
    kept = [Translated({"en": text}, completion(answer, text=text)) for answer, text in (("C", "red"), ("A", "blue"))]
    for gold, right in (("A", 1), ("C", 0), ("B", None), (None, None)):
        (found,) = sets_of(kept, {"en": question("q1", "en", gold=gold)})
        assert found["right"] == right


def test_candidate_sets_are_scored_unchanged() -> None:
    kept = translate_all([sampled("red"), sampled("bleu", "fr")], Dictionary(**FRENCH))
    sets = sets_of(kept, open_questions("en", "fr"))
    generator = ScriptedGenerator(TOKENIZER, lambda *_: "", lambda prompt, side: -float(len(prompt + side)))
    generator.policy = "r0002-abcd"
    english, _ = Score(None, with_prompt=True).serve(generator, sets).rows
    assert english["policy"] == "r0002-abcd"
    assert {key: value for key, value in english.items() if key in sets[0]} == sets[0]
    sides = [str(TOKENIZER.decode(side)) for side in english["token_ids"]]
    assert english["logps"] == [-len("Question q1?" + side) for side in sides]
    assert english["prompt_logp"] == -len("Question" + "q1?")
    (first, *_) = Score(None).serve(ScriptedGenerator(TOKENIZER, lambda *_: ""), sets).rows
    assert first["prompt_logp"] is None
