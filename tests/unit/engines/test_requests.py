from factories import question

from calm_ray.engines.generator import Decoding
from calm_ray.engines.requests import Answer, Sample
from calm_ray.prompts.rendering import encode_prompt, plain_prompt
from calm_ray.testing import ScriptedGenerator, word_tokenizer

TEMPLATE = "{{ bos_token }} [USER] {{ messages[0]['content'] }} [MODEL] "
WORDS = ["[USER]", "[MODEL]", "<bos>", "Answer:", "A", "B", "Question", "q1?", "A.", "B.", "en", "choice", "0", "1"]
DECODING = Decoding(samples=3, temperature=1.0, top_p=0.9, max_new_tokens=8)


def test_completions_record_their_policy() -> None:
    generator = ScriptedGenerator(word_tokenizer(WORDS), lambda prompt, number: f"Answer: {'AB-'[number]}")
    generator.policy = "r0001-abcd"
    served = Sample(DECODING, seed=0, round_number=2, prompt="choices").serve(generator, [question(choices=2)])
    rows = served.rows
    assert served.counts == {"tokens": sum(len(row["token_ids"]) for row in rows), "unparseable": 1}
    assert [row["answer"] for row in rows] == ["A", "B", None]
    assert [row["sample"] for row in rows] == [0, 1, 2]
    assert {row["policy"] for row in rows} == {"r0001-abcd"}
    assert {row["round"] for row in rows} == {2}
    assert rows[0]["token_ids"][-1] == generator.tokenizer.eos_token_id


def test_letters_beyond_the_choices_are_not_answers() -> None:
    generator = ScriptedGenerator(word_tokenizer(WORDS), lambda prompt, number: "Answer: C")
    request = Answer(max_new_tokens=8, prompt="choices")
    assert request.serve(generator, [question(choices=2)]).rows[0]["answer"] is None
    assert request.serve(generator, [question(choices=3)]).rows[0]["answer"] == "C"


def test_seeds_depend_on_the_question_not_its_position() -> None:
    seen: list[dict[tuple[int, ...], int]] = []

    class Recorder(ScriptedGenerator):
        def generate(self, prompts, decoding, seeds):  # type: ignore[no-untyped-def]
            seen.append(dict(zip((tuple(prompt) for prompt in prompts), seeds, strict=True)))
            return super().generate(prompts, decoding, seeds)

    tokenizer = word_tokenizer([*WORDS, "fr", "q2?"])
    generator = Recorder(tokenizer, lambda prompt, number: "Answer: A")
    questions = [question("q1", "en"), question("q2", "en"), question("q1", "fr")]
    Sample(DECODING, seed=0, round_number=1, prompt="choices").serve(generator, questions)
    Sample(DECODING, seed=0, round_number=1, prompt="choices").serve(generator, questions[::-1])
    Sample(DECODING, seed=0, round_number=2, prompt="choices").serve(generator, questions)
    assert seen[0] == seen[1]
    assert len(set(seen[0].values())) == 3
    assert not set(seen[0].values()) & set(seen[2].values())


def test_chat_template_is_used_if_present() -> None:
    plain, chat = word_tokenizer(WORDS), word_tokenizer(WORDS, TEMPLATE)
    chat.bos_token = "<bos>"
    assert plain.decode(encode_prompt(plain, "Question q1?")) == "Question q1?"
    assert chat.decode(encode_prompt(chat, "Question q1?")) == "<bos> [USER] Question q1? [MODEL]"


def test_prompt_text_encodes_to_the_prompt_tokens() -> None:
    """Even if the template writes the BOS token that the tokenizer would add too."""
    from tokenizers import processors

    for adds_bos in (False, True):
        tokenizer = word_tokenizer(WORDS, TEMPLATE)
        tokenizer.bos_token = "<bos>"
        if adds_bos:
            bos = ("<bos>", tokenizer.bos_token_id)
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[bos]
            )
        ids = encode_prompt(tokenizer, "Question q1?")
        assert ids[:2] == tokenizer.convert_tokens_to_ids(["<bos>", "[USER]"])
        assert tokenizer.encode(plain_prompt(tokenizer, "Question q1?")) == ids
