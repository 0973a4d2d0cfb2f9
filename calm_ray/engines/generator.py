"""The one seam to the model: whatever writes completions does it through `Generator`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
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
    logp: float
    """Summed log-probability of `token_ids` under the policy, before temperature and top-p, in nats."""


@dataclass(frozen=True)
class Likelihoods:
    """Summed log-probabilities of one prompt's candidates, and of the prompt's own tokens but the first, in nats."""

    logps: list[float]
    prompt_logp: float | None = None


class Generator(Protocol):
    """Writes completions, and says how likely given ones are, with one policy at a time."""

    @property
    def policy(self) -> str:
        """Name of the policy that writes now."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def context_tokens(self) -> int:
        """The most tokens of a prompt and its answer together."""
        ...

    def generate(self, prompts: Sequence[list[int]], decoding: Decoding, seeds: Sequence[int]) -> list[list[Generated]]:
        """`decoding.samples` completions of each prompt (token ids); one seed for each prompt."""
        ...

    def score(
        self, prompts: Sequence[list[int]], candidates: Sequence[list[list[int]]], *, with_prompt: bool
    ) -> list[Likelihoods]:
        """How likely each prompt's candidates (token ids, one or more each) are after it; of the prompt if asked."""
        ...
