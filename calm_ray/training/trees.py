"""Training rows as trees of tokens: a prompt and its branches, each with a mask of scored tokens.

A pair is two compared branches of one prompt; options are any number of branches with a distribution over them; a
supervised target is one branch; a dialogue is one branch with several scored spans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from calm_ray.core.errors import CalmRayError
from calm_ray.core.rows import Dialogue, OptionTargets, Pair, rows_of
from calm_ray.packing.batch import Branch
from calm_ray.run.stage import Stage

Key = tuple[str, str, int]
"""Question, language and number of a row."""


@dataclass(frozen=True)
class Comparison:
    """Two branches of a tree, by index, whose margin an objective uses."""

    chosen: int
    rejected: int
    target: float | None = None
    """Target of beta times the margin, in nats (DCO)."""


@dataclass(frozen=True)
class Tree:
    """A row as the trainer sees it."""

    question_id: str
    language: str
    number: int
    """Index among the rows of the same question and language."""
    prompt: list[int]
    branches: tuple[Branch, ...]
    comparisons: tuple[Comparison, ...] = ()
    probabilities: tuple[float, ...] | None = None
    """Distribution over the branches to fit (DCO with `fit: options`)."""

    @property
    def key(self) -> Key:
        return self.question_id, self.language, self.number

    @property
    def longest(self) -> int:
        """Tokens of the prompt plus the longest branch."""
        return len(self.prompt) + max(len(branch.tokens) for branch in self.branches)

    def first(self, branches: int | None) -> Tree:
        """Keeps only the first `branches`, all if None; 1 keeps a pair's chosen side.

        Raises CalmRayError if there are fewer.
        """
        if branches is None:
            return self
        if len(self.branches) < branches:
            raise CalmRayError(
                f"question {self.question_id} in {self.language}: the objective needs {branches} branches, but row "
                f"{self.number} has {len(self.branches)}"
            )
        kept = [comparison for comparison in self.comparisons if max(comparison.chosen, comparison.rejected) < branches]
        return replace(self, branches=self.branches[:branches], comparisons=tuple(kept))


def tree_of_pair(row: Pair) -> Tree:
    """Both sides as branches, compared."""
    branches = (Branch(row["chosen_token_ids"]), Branch(row["rejected_token_ids"]))
    comparison = Comparison(0, 1, row.get("target_margin"))
    return Tree(row["question_id"], row["language"], row["pair"], row["prompt_token_ids"], branches, (comparison,))


def tree_of_options(row: OptionTargets) -> Tree:
    """Every candidate as a branch, with the probabilities to fit."""
    branches = tuple(map(Branch, row["token_ids"]))
    probabilities = tuple(row["probabilities"])
    return Tree(
        row["question_id"], row["language"], row["number"], row["prompt_token_ids"], branches,
        probabilities=probabilities,
    )  # fmt: skip


def tree_of_dialogue(row: Dialogue) -> Tree:
    """Everything before the first scored token becomes the prompt, the rest one branch.

    Raises CalmRayError if no token is scored.
    """
    tokens, scored = row["token_ids"], row["scored"]
    if not any(scored[1:]):
        raise CalmRayError(
            f"question {row['question_id']} in {row['language']}: no token of dialogue {row['number']} is scored, so "
            "there is nothing to learn from it; remove it"
        )
    start = max(1, scored.index(True))
    branch = Branch(tokens[start:], scored[start:])
    return Tree(row["question_id"], row["language"], row["number"], tokens[:start], (branch,))


KEYS = ["question_id", "language"]
PAIR_COLUMNS = [*KEYS, "pair", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids", "target_margin"]
DIALOGUE_COLUMNS = [*KEYS, "number", "token_ids", "scored"]
OPTION_COLUMNS = [*KEYS, "number", "prompt_token_ids", "token_ids", "probabilities"]
KINDS: tuple[tuple[list[str], Callable[[Any], Tree]], ...] = (
    (PAIR_COLUMNS, tree_of_pair), (DIALOGUE_COLUMNS, tree_of_dialogue), (OPTION_COLUMNS, tree_of_options),
)  # fmt: skip
"""The columns of each kind of row, and how to read it."""


def read_trees(examples: Stage) -> list[Tree]:
    """Reads the rows of a stage, all of one kind, in order."""
    chunks = sorted(examples.chunks())
    if not chunks:
        return []
    present = set(examples.read_chunk(chunks[0]).column_names)
    columns, tree_of = next((columns, tree_of) for columns, tree_of in KINDS if present.issuperset(columns))
    return [tree_of(row) for row in rows_of(examples.read(columns))]
