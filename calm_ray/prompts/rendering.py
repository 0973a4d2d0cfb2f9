"""Renders messages for a model, in its chat template if it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calm_ray.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """Returns the token ids of a user message, in the model's chat template if it has one."""
    if not tokenizer.chat_template:
        return list(tokenizer.encode(message))
    return list(tokenizer.encode(_in_chat_template(tokenizer, message), add_special_tokens=False))


def plain_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """Returns the text that `tokenizer.encode` turns into the ids of `encode_prompt`, for users of the pairs' text."""
    if not tokenizer.chat_template:
        return message
    text = _in_chat_template(tokenizer, message)
    # Drop the template's beginning-of-sequence token if the tokenizer adds one to any text.
    bos = tokenizer.bos_token
    adds_bos = bool(bos) and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds_bos else text


def _in_chat_template(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    chat = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> tuple[list[int], list[bool]]:
    """Returns a dialogue's token ids in the model's chat template, and a mask of the assistant's tokens.

    `messages` have a `role` and a `content`. Raises InputError if the template does not mark the assistant's turns
    (`{% generation %}`).
    """
    if "{% generation %}" not in (tokenizer.chat_template or "").replace("{%-", "{%").replace("-%}", "%}"):
        raise InputError("model: its chat template does not mark the assistant's turns with {% generation %}")
    found: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(found["input_ids"]), [bool(mask) for mask in found["assistant_masks"]]
