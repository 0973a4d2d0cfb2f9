"""Translates completions (CALM, section 2.2) with the model itself or the demo world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from calm_ray.core.languages import LANGUAGES
from calm_ray.core.sections import WORLD
from calm_ray.core.settings import RunSettings
from calm_ray.prompts.answers import extract_answer
from calm_ray.prompts.passages import Passage, Translator
from calm_ray.run.policies import RunModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from calm_ray.engines.text_service import TextService


def make_translator(name: str, settings: RunSettings, text_service: TextService) -> Translator:
    """The demo world's translator for `world`, else the model."""
    if name == WORLD:
        return _world_translator(settings.world.seed)
    return ModelTranslator(lambda messages: text_service(messages, settings.sampling.max_new_tokens))


@lru_cache(maxsize=1)
def _world_translator(seed: int) -> Translator:
    from calm_ray.demo.generator import build_world
    from calm_ray.demo.translator import WorldTranslator

    return WorldTranslator(build_world(seed))


@lru_cache(maxsize=1)
def load_tokenizer(model: RunModel) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.local_folder(weights=False), trust_remote_code=False)


class ModelTranslator:
    """Prompts the model itself, through the engines.

    `write` maps a batch of messages to the model's replies, None for a failed one. A reply is accepted only if the same
    answer letter can be parsed from it in the target language.
    """

    def __init__(self, write: Callable[[list[str]], Sequence[str | None]]) -> None:
        self._write = write

    def translate(self, passages: Sequence[Passage]) -> list[str | None]:
        # Many losing completions share a winner, so translate each text once.
        distinct = list(dict.fromkeys(passages))
        replies = dict(zip(distinct, self._write([_request(passage) for passage in distinct]), strict=True))
        return [_checked(passage, replies[passage]) for passage in passages]


def _request(passage: Passage) -> str:
    source, target = LANGUAGES[passage.source], LANGUAGES[passage.target]
    if passage.answer is None:
        return (
            f"Translate the following text from {source.name} into {target.name}. "
            f"Write only the translation.\n\n{passage.text.strip()}\n"
        )
    return (
        f"Translate the following text from {source.name} into {target.name}. "
        f'Begin with "{target.explanation}" and end with the line "{target.answer}{target.space}{passage.answer}". '
        f"Write only the translation.\n\n{passage.text.strip()}\n"
    )


def _checked(passage: Passage, reply: str | None) -> str | None:
    text = (reply or "").strip()
    if passage.answer is None:
        return text or None
    return text if extract_answer(text, passage.target, passage.letters) == passage.answer else None
