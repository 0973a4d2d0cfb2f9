"""The demo model's tokenizer: one token per word, or a model this small could not learn names in minutes."""

from __future__ import annotations

import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calm_ray.demo.generator import TOWNS, World, lexicon, world_languages
from calm_ray.prompts.questions import LETTERS

EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"


def _han_words(world: World) -> set[str]:
    """Chinese has no spaces, so its words are listed: names, values, and the text between them."""
    words = {world.name(town, "zh") for town in range(TOWNS)}
    for topic in lexicon()["topics"].values():
        words.update(topic["values"]["zh"])
        for form in ("question", "statement"):
            words.update(part for part in topic[form]["zh"].replace("{value}", "{name}").split("{name}") if part)
    return words


def _texts(world: World) -> Iterable[str]:
    for language in world_languages():
        for topic, words in lexicon()["topics"].items():
            options = list(range(len(words["values"][language])))
            for town in range(TOWNS):
                question = world.question(town, topic, options, language)
                yield "\n".join([question["text"], *(f"A. {choice}" for choice in question["choices"])])
                for letter in LETTERS[: len(options)]:
                    yield world.answer(town, topic, LETTERS.index(letter), options, language)
    yield from (f"\n{letter}." for letter in LETTERS)
    yield from (f"{letter}." for letter in LETTERS)
    yield from LETTERS
    yield from (f" {letter}" for letter in LETTERS)
    yield from string.printable


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that covers everything the world can say; decoding restores the text exactly."""
    han = "|".join(sorted(_han_words(world), key=lambda word: (-len(word), word)))
    # In order: a Chinese word, an option's letter with its newline, a word with its colon, a question mark, the rest.
    pattern = rf"{han}|\n?(?<!\p{{L}})[A-Z]\.| ?[\p{{L}}\d]+(?:[-'’]\p{{L}}+)*(?: ?[:：])?| ?\?|\n|."
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    words = sorted({word for text in _texts(world) for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
