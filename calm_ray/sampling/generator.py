"""The one seam to the model: whatever writes completions does it through `Generator`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn. `temperature` 0 is greedy."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class Generated:
    """One completion as the engine wrote it. `token_ids` include the end-of-sequence token if the model ended it."""

    text: str
    token_ids: list[int]
    finish_reason: str


class Generator(Protocol):
    """Writes completions with one policy at a time."""

    @property
    def policy(self) -> str:
        """Name of the policy that writes now."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def generate(self, prompts: Sequence[list[int]], decoding: Decoding, seeds: Sequence[int]) -> list[list[Generated]]:
        """`decoding.samples` completions of each prompt (token ids); one seed for each prompt."""
        ...
