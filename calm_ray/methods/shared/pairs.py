"""Pairs to train on, and how reports show them."""

from __future__ import annotations

from collections import Counter
from difflib import SequenceMatcher
from typing import ClassVar

from rich.table import Table
from rich.text import Text

from calm_ray.core.console import console
from calm_ray.core.rows import Completion, Pair
from calm_ray.methods.base import Column, DataStep, Entry
from calm_ray.methods.round import QuestionView

PAIRS_COLUMN = Column("pairs", lambda entry: str(entry.get("pairs", 0)))


class PairStep(DataStep):
    """Makes the pairs that are trained on. Its job counts them as `pairs`."""

    name = "pairs"
    columns: ClassVar[tuple[Column, ...]] = (PAIRS_COLUMN,)

    def note(self, made: Counter[str]) -> str:
        return f"{made['pairs']} pairs"

    def record(self, counts: Counter[str]) -> Entry:
        return {"pairs": counts["pairs"]}

    def summary(self, record: Entry) -> Entry:
        return {"pairs": record["pairs"]}

    def show(self, view: QuestionView) -> None:
        for pair in view.rows(self.name)[:1]:
            show_pair(pair)


def pair_of(chosen: Completion, rejected: Completion, prompt: str, number: int) -> Pair:
    """Two completions of one question as a pair, in the rejected one's language; `number` counts those of a question.

    Both keep the tokens that were sampled. A chosen side of another language has to be replaced by its translation.
    """
    return Pair(
        round=rejected["round"],
        question_id=rejected["question_id"],
        pair=number,
        language=rejected["language"],
        prompt=prompt,
        chosen=chosen["text"],
        rejected=rejected["text"],
        prompt_token_ids=rejected["prompt_token_ids"],
        chosen_token_ids=chosen["token_ids"],
        rejected_token_ids=rejected["token_ids"],
        chosen_answer=str(chosen["answer"]),
        rejected_answer=str(rejected["answer"]),
        chosen_language=chosen["language"],
        policy=rejected["policy"],
        target_margin=None,
    )


def show_pair(pair: Pair) -> None:
    """Prints both sides of a pair, with what differs in colour."""
    carried = "" if pair["language"] == pair["chosen_language"] else f", carried over from {pair['chosen_language']}"
    sides = f"chosen {pair['chosen_answer']}{carried}, rejected {pair['rejected_answer']}"
    if (target := pair.get("target_margin")) is not None:
        sides = f"{pair['chosen_answer']} beside {pair['rejected_answer']}, target margin {target:+.2f} nats"
    console.print(f"a pair in {pair['language']}: {sides}")
    chosen, rejected = pair["chosen"], pair["rejected"]
    left, right = Text(), Text()
    for kind, a, b, c, d in SequenceMatcher(None, chosen, rejected, autojunk=False).get_opcodes():
        left.append(chosen[a:b], style="" if kind == "equal" else "bold green")
        right.append(rejected[c:d], style="" if kind == "equal" else "bold red")
    table = Table(show_header=True)
    table.add_column("chosen", style="green")
    table.add_column("rejected", style="red")
    table.add_row(left, right)
    console.print(table)
