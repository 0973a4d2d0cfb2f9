"""Training rows as trees of tokens: a prompt, and branches behind it, each with a mask of the tokens that are scored.

A pair is two branches of one prompt that are compared; a supervised target is one branch; a dialogue is one branch with
several scored stretches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from calm_ray.core.errors import CalmRayError
from calm_ray.core.rows import Dialogue, Pair, rows_of
from calm_ray.run.stage import Stage

Key = tuple[str, str, int]
"""Question, language and number of a row."""


@dataclass(frozen=True)
class Branch:
    """One continuation of a prompt."""

    tokens: list[int]
    scored: list[bool] | None = None
    """Which of the tokens are scored; None for all of them."""

    @property
    def scored_tokens(self) -> int:
        return len(self.tokens) if self.scored is None else sum(self.scored)


@dataclass(frozen=True)
class Comparison:
    """Two branches of a tree, by index, of which an objective takes the difference."""

    chosen: int
    rejected: int
    target: float | None = None
    """What beta times the margin is fitted to, in nats (DCO)."""


@dataclass(frozen=True)
class Tree:
    """A row as the trainer sees it."""

    question_id: str
    language: str
    number: int
    """Numbers the rows of a question in a language."""
    prompt: list[int]
    branches: tuple[Branch, ...]
    comparisons: tuple[Comparison, ...] = ()

    @property
    def key(self) -> Key:
        return self.question_id, self.language, self.number

    @property
    def tokens(self) -> int:
        """Of all branches, each behind a prompt of its own."""
        return sum(len(self.prompt) + len(branch.tokens) for branch in self.branches)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest branch."""
        return len(self.prompt) + max(len(branch.tokens) for branch in self.branches)

    def first(self, branches: int) -> Tree:
        """With its first branches alone: of a pair, 1 is the chosen side. Raises CalmRayError where it has fewer."""
        if len(self.branches) < branches:
            raise CalmRayError(
                f"question {self.question_id} in {self.language}: the objective compares {branches} branches, and row "
                f"{self.number} has {len(self.branches)}"
            )
        kept = [comparison for comparison in self.comparisons if max(comparison.chosen, comparison.rejected) < branches]
        return replace(self, branches=self.branches[:branches], comparisons=tuple(kept))


def tree_of_pair(row: Pair) -> Tree:
    """A pair: both sides, compared."""
    branches = (Branch(row["chosen_token_ids"]), Branch(row["rejected_token_ids"]))
    comparison = Comparison(0, 1, row.get("target_margin"))
    return Tree(row["question_id"], row["language"], row["pair"], row["prompt_token_ids"], branches, (comparison,))


def tree_of_dialogue(row: Dialogue) -> Tree:
    """A dialogue: what comes before the first scored token is the prompt, the rest one branch.

    Raises CalmRayError where no token is scored.
    """
    tokens, scored = row["token_ids"], row["scored"]
    if not any(scored[1:]):
        raise CalmRayError(
            f"question {row['question_id']} in {row['language']}: no token of dialogue {row['number']} is scored, so "
            "that there is nothing to learn from it; leave it out"
        )
    start = max(1, scored.index(True))
    branch = Branch(tokens[start:], scored[start:])
    return Tree(row["question_id"], row["language"], row["number"], tokens[:start], (branch,))


KEYS = ["question_id", "language"]
PAIR_COLUMNS = [*KEYS, "pair", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids", "target_margin"]
DIALOGUE_COLUMNS = [*KEYS, "number", "token_ids", "scored"]


def read_trees(examples: Stage) -> list[Tree]:
    """The rows of a stage, pairs or dialogues, in their order."""
    chunks = sorted(examples.chunks())
    if not chunks:
        return []
    if "scored" not in examples.read_chunk(chunks[0]).column_names:
        pairs: list[Any] = rows_of(examples.read(PAIR_COLUMNS))
        return [tree_of_pair(row) for row in pairs]
    dialogues: list[Any] = rows_of(examples.read(DIALOGUE_COLUMNS))
    return [tree_of_dialogue(row) for row in dialogues]
