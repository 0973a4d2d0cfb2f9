"""What the steps of a run take at most, in numbers, for `calm-ray plan`."""

from __future__ import annotations

from dataclasses import dataclass

BYTES_PER_TOKEN = 12
"""Of a token in storage: 8 as an id (`calm_ray.core.rows` has 64-bit integers) and about 4 as text in UTF-8. Parquet
packs ids smaller, which is not counted on."""
CHOICE_TOKENS = 16
"""Assumed of a candidate that is not a letter."""


@dataclass(frozen=True)
class Sizes:
    """What a run is about."""

    questions: int
    """Questions to align on, each in every language; 1 where they could not be counted."""
    held_out: int
    """Held-out questions, each in every evaluation language."""
    languages: int
    evaluation_languages: int
    prompt: int
    """Tokens of a prompt."""
    reply: int
    """Tokens of a completion at most."""
    choices: int
    """Of a question."""


@dataclass(frozen=True)
class Work:
    """What a step takes in one round, at most."""

    rows: int = 0
    unit: str = ""
    """What the rows are: completions, pairs."""
    read: int = 0
    """Tokens that engines read."""
    written: int = 0
    """Tokens that engines write."""
    side: int = 0
    """Of rows that are trained on: tokens of each branch behind its prompt."""
    trained: int = 0
    """Tokens that an epoch of training reads."""
    reference: int = 0
    """Tokens that a forward pass of the reference reads before training."""
    disk: int = 0
    """Bytes in the run's storage."""
