"""Candidates for scoring: the text of each form, and the tokens where prompt and candidate meet."""

from collections.abc import Sequence

import pytest
from factories import question
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from calm_ray.core.errors import BadRow
from calm_ray.core.rows import CandidateSet, Question
from calm_ray.core.sections import Candidates
from calm_ray.demo.generator import build_world, world_languages, world_questions
from calm_ray.demo.tokenizer import build_tokenizer
from calm_ray.methods.candidates import candidate_form
from calm_ray.prompts.answers import extract_answer
from calm_ray.prompts.candidates import FORMS, CandidateForm, label
from calm_ray.prompts.questions import letters
from calm_ray.prompts.rendering import encode_prompt
from calm_ray.testing import word_tokenizer

TEMPLATE = "{{ bos_token }} [USER] {{ messages[0]['content'] }} [MODEL]"
CITIES = {
    "en": ("The capital of France is <mask>.", ["Paris", "Rome"]),
    "zh": ("法国的首都是<mask>。", ["巴黎", "罗马"]),
}


def question_with(text: str, choices: Sequence[str], language: str = "en", gold: str | None = None) -> Question:
    return {**question(language=language, gold=gold), "text": text, "choices": list(choices)}


def byte_tokenizer(texts: Sequence[str] = (), *, across_words: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts; `across_words` lets merges cross word boundaries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>", "<bos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def with_bos(tokenizer: PreTrainedTokenizerFast, *, adds: bool) -> PreTrainedTokenizerFast:
    tokenizer.bos_token = "<bos>"
    if adds:
        bos = ("<bos>", tokenizer.bos_token_id)
        template = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
        tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def candidates(
    row: Question, form: str, tokenizer: PreTrainedTokenizerFast | None = None, *, chat: bool = False
) -> CandidateSet:
    """Uses `byte_tokenizer()` by default."""
    return CandidateForm(FORMS[form], chat).of(row, tokenizer or byte_tokenizer())


def test_letters_follow_the_answer_marker() -> None:
    found = candidates(question(choices=3, gold="B"), "letters")
    assert found["prompt"] == "Question q1?\nA. en choice 0\nB. en choice 1\nC. en choice 2\nAnswer:"
    assert (found["choices"], found["texts"], found["right"]) == (["A", "B", "C"], [" A", " B", " C"], 1)
    assert (found["question_id"], found["language"]) == ("q1", "en")


def test_letters_have_no_space_in_languages_without_spaces() -> None:
    found = candidates(question(language="zh", choices=2), "letters")
    assert found["prompt"] == "Question q1?\nA. zh choice 0\nB. zh choice 1\n答案："
    assert (found["choices"], found["texts"], found["right"]) == (["A", "B"], ["A", "B"], None)


def test_choices_follow_the_question() -> None:
    found = candidates(question_with("Which city? ", ["Paris", "Rome"]), "choices")
    assert (found["prompt"], found["texts"]) == ("Which city?", [" Paris", " Rome"])
    assert found["choices"] == ["Paris", "Rome"]
    found = candidates(question_with("哪个城市？", ["巴黎", "罗马"], "zh"), "choices")
    assert (found["prompt"], found["texts"]) == ("哪个城市？", ["巴黎", "罗马"])


def test_answers_follow_the_answer_marker() -> None:
    found = candidates(question_with("Which city?", ["Paris", "Rome"]), "answers")
    assert (found["prompt"], found["texts"]) == ("Which city?\nAnswer:", [" Paris", " Rome"])
    found = candidates(question_with("哪个城市？", ["巴黎", "罗马"], "zh"), "answers")
    assert (found["prompt"], found["texts"]) == ("哪个城市？\n答案：", ["巴黎", "罗马"])


@pytest.mark.parametrize(
    ("text", "prompt", "texts"),
    [
        ("<mask> is the capital of France.", "", ["Paris is the capital of France.", "Rome is the capital of France."]),
        ("In <mask> one eats well.", "In", [" Paris one eats well.", " Rome one eats well."]),
        ("The capital of France is <mask>", "The capital of France is", [" Paris", " Rome"]),
        ("The capital:\n<mask>.", "The capital:", ["\nParis.", "\nRome."]),
        ("L'<mask>", "L'", ["Paris", "Rome"]),
    ],
)
def test_choice_replaces_the_mask_and_its_leading_space(text: str, prompt: str, texts: list[str]) -> None:
    found = candidates(question_with(text, ["Paris", "Rome"], gold="A"), "choices")
    assert (found["prompt"], found["texts"]) == (prompt, texts)
    assert (found["choices"], found["right"]) == (["Paris", "Rome"], 0)


@pytest.mark.parametrize("language", CITIES)
@pytest.mark.parametrize("form", ["letters", "choices", "answers"])
@pytest.mark.parametrize("across_words", [False, True])
def test_tokens_match_those_of_prompt_plus_candidate(language: str, form: str, across_words: bool) -> None:
    row = question_with(*CITIES[language], language)
    plain = candidates(row, form)
    corpus = [plain["prompt"] + text for text in plain["texts"]]
    tokenizer = byte_tokenizer(corpus * 4, across_words=across_words)
    found = candidates(row, form, tokenizer)
    assert found["prompt_token_ids"] == tokenizer.encode(found["prompt"])
    for text, side in zip(found["texts"], found["token_ids"], strict=True):
        joint = tokenizer.encode(found["prompt"] + text)
        assert tokenizer.decode([*found["prompt_token_ids"], *side]) == found["prompt"] + text
        if joint[: len(found["prompt_token_ids"])] == found["prompt_token_ids"]:
            assert side == joint[len(found["prompt_token_ids"]) :]


def test_candidate_that_merges_with_the_prompt_is_tokenized_alone() -> None:
    text, choices = CITIES["en"]
    whole = text.replace("<mask>", "Paris")
    tokenizer = byte_tokenizer([whole] * 4, across_words=True)
    assert len(tokenizer.encode(whole)) == 1
    found = candidates(question_with(text, choices), "choices", tokenizer)
    assert found["token_ids"] == [tokenizer.encode(" Paris."), tokenizer.encode(" Rome.")]


def test_candidate_gets_no_start_of_text_marker() -> None:
    """The tokenizer marks the start of a text with a space token; a candidate continues the prompt."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    row = question_with("法国的首都是<mask>。", ["巴黎", "罗马"], "zh")
    space = tokenizer.convert_tokens_to_ids("Ġ")
    assert tokenizer.encode("巴黎。")[0] == space
    assert [space in side for side in candidates(row, "choices", tokenizer)["token_ids"]] == [False, False]


@pytest.mark.parametrize(("adds", "expected"), [(False, []), (True, ["<bos>"])])
def test_only_the_prompt_starts_with_bos(adds: bool, expected: list[str]) -> None:
    tokenizer = with_bos(byte_tokenizer(), adds=adds)
    bare = byte_tokenizer()
    found = candidates(question(choices=2), "letters", tokenizer)
    bos = [tokenizer.convert_tokens_to_ids(token) for token in expected]
    assert found["prompt_token_ids"] == [*bos, *bare.encode(found["prompt"])]
    assert found["token_ids"] == [bare.encode(" A"), bare.encode(" B")]


@pytest.mark.parametrize(("bos", "adds"), [(False, False), (True, False), (True, True)])
def test_empty_prompt_becomes_bos_or_eos(bos: bool, adds: bool) -> None:
    bare = byte_tokenizer()
    tokenizer = with_bos(byte_tokenizer(), adds=adds) if bos else bare
    found = candidates(question_with("<mask> is a city.", ["Paris", "Rome"]), "choices", tokenizer)
    assert found["prompt"] == ""
    assert found["prompt_token_ids"] == [tokenizer.bos_token_id if bos else tokenizer.eos_token_id]
    assert found["token_ids"] == [bare.encode("Paris is a city."), bare.encode("Rome is a city.")]


def test_chat_template_wraps_the_prompt() -> None:
    words = ["[USER]", "[MODEL]", "<bos>", "Question", "q1?", "A.", "B.", "en", "choice", "0", "1", "Answer:", "A", "B"]
    tokenizer = with_bos(word_tokenizer(words, TEMPLATE), adds=False)
    plain, chat = (candidates(question(choices=2), "letters", tokenizer, chat=chat) for chat in (False, True))
    assert chat["prompt_token_ids"] == encode_prompt(tokenizer, plain["prompt"])
    assert chat["prompt"] == f"<bos> [USER] {plain['prompt']} [MODEL]"
    assert tokenizer.encode(chat["prompt"]) == chat["prompt_token_ids"]
    assert chat["texts"] == ["A", "B"]
    assert chat["token_ids"] == plain["token_ids"] == [[tokenizer.convert_tokens_to_ids(x)] for x in "AB"]
    assert plain["prompt_token_ids"] == tokenizer.encode(plain["prompt"])


def test_world_candidates_are_full_answers() -> None:
    world = build_world(0)
    tokenizer = build_tokenizer(world)
    held_out = world_questions(world)[1]
    rows = [row for row in held_out if row["question_id"] == held_out[0]["question_id"]]
    assert {row["language"] for row in rows} == set(world_languages())
    form = candidate_form(Candidates(form="world"), world_seed=0)
    assert form is not None
    for row in rows:
        found = form.of(row, tokenizer)
        assert found["texts"] == found["choices"] == world.answers(row)
        for text, choice, letter in zip(found["texts"], row["choices"], letters(row), strict=True):
            assert choice in text
            assert extract_answer(text, row["language"], letters(row)) == letter
        assert row["gold"] == label(found["right"] or 0)
        for text, side in zip(found["texts"], found["token_ids"], strict=True):
            assert tokenizer.decode([*found["prompt_token_ids"], *side]) == found["prompt"] + text


def test_identical_candidates_are_refused() -> None:
    with pytest.raises(BadRow, match=r"two candidates are identical: A and C, 'Paris'"):
        candidates(question_with("A city? <mask>", ["Paris", "Rome", " Paris "]), "choices")
    candidates(question_with("A city?", ["Paris", "Paris"]), "letters")  # the letters differ


def test_candidate_without_tokens_is_refused() -> None:
    tokenizer = word_tokenizer(["city?", "Paris"])  # spaces have no token
    with pytest.raises(BadRow, match=r"a candidate has no tokens in the model's tokenizer: B, ' '"):
        candidates(question_with("city? <mask>", ["Paris", " "]), "choices", tokenizer)


def test_labels_are_letters_then_numbers() -> None:
    assert [label(number) for number in (0, 25, 26, 30)] == ["A", "Z", "27", "31"]
