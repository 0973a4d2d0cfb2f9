"""A message as the model's tokens, in its chat template where it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calm_ray.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """A user's message as token ids, in the model's chat template where it has one."""
    if not tokenizer.chat_template:
        return list(tokenizer.encode(message))
    return list(tokenizer.encode(_in_chat_template(tokenizer, message), add_special_tokens=False))


def plain_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """The text of which `tokenizer.encode` makes the same ids as `encode_prompt`, for users of the pairs' text."""
    if not tokenizer.chat_template:
        return message
    text = _in_chat_template(tokenizer, message)
    # The template writes a beginning-of-sequence token; many tokenizers put one in front of any text themselves.
    bos = tokenizer.bos_token
    adds_bos = bool(bos) and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds_bos else text


def _in_chat_template(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    chat = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> tuple[list[int], list[bool]]:
    """A dialogue's token ids in the model's chat template, and which of them the assistant wrote.

    `messages` have a `role` and a `content`, as chat templates take them. Raises InputError where the template does not
    mark what the assistant writes (`{% generation %}`).
    """
    if "{% generation %}" not in (tokenizer.chat_template or "").replace("{%-", "{%").replace("-%}", "%}"):
        raise InputError("model: its chat template does not mark the assistant's turns with {% generation %}")
    found: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(found["input_ids"]), [bool(mask) for mask in found["assistant_masks"]]
