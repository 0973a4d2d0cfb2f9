"""Training pairs and how they are displayed."""

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
    """Makes the training pairs. Its job counts them as `pairs`."""

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
    """Pairs two completions of one question, in the rejected one's language; `number` is the pair's index there.

    Both keep their sampled tokens. If `chosen` is in another language, pass its translation.
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
    """Prints both sides of a pair, with differences in color."""
    translated = "" if pair["language"] == pair["chosen_language"] else f", translated from {pair['chosen_language']}"
    sides = f"chosen {pair['chosen_answer']}{translated}, rejected {pair['rejected_answer']}"
    if (target := pair.get("target_margin")) is not None:
        sides = f"{pair['chosen_answer']} vs. {pair['rejected_answer']}, target margin {target:+.2f} nats"
    console.print(f"sample pair in {pair['language']}: {sides}")
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
