"""The only interface to the model: all sampling and scoring goes through `Generator`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Decoding:
    """Sampling parameters. `temperature` 0 is greedy."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class Generated:
    """One completion. `token_ids` include the end-of-sequence token if the model generated it."""

    text: str
    token_ids: list[int]
    finish_reason: str
    logp: float
    """Summed log-probability of `token_ids` under the policy, before temperature and top-p, in nats."""


@dataclass(frozen=True)
class Likelihoods:
    """Summed log-probabilities of one prompt's candidates, and of the prompt's own tokens except the first, in nats."""

    logps: list[float]
    prompt_logp: float | None = None


class Generator(Protocol):
    """Samples completions and scores given ones, with one policy at a time."""

    @property
    def policy(self) -> str:
        """Name of the loaded policy."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def context_tokens(self) -> int:
        """Maximum number of tokens of a prompt and its answer together."""
        ...

    def generate(self, prompts: Sequence[list[int]], decoding: Decoding, seeds: Sequence[int]) -> list[list[Generated]]:
        """Samples `decoding.samples` completions of each prompt (token ids), with one seed per prompt."""
        ...

    def score(
        self, prompts: Sequence[list[int]], candidates: Sequence[list[list[int]]], *, with_prompt: bool
    ) -> list[Likelihoods]:
        """Scores each prompt's candidates (one or more token ids each), and the prompt itself if `with_prompt`."""
        ...
