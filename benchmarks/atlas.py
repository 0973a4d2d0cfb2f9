"""Does alignment help a public model on facts about countries? Runs the atlas for several seeds, with controls.

    python benchmarks/atlas.py --seeds 0 1 2 3 4 --arms auto random own raw english gold

A seed draws the held-out countries and the questions' wrong choices. Every run is a separate job (`calm-ray align` with
overrides), kept under `storage`; finished runs are not repeated. All arms have the same budget:

    auto     the recipe: calibrated scores of all languages, weighted by how far their agreement exceeds one half
    random   its targets, given to random choices
    own      every language's own calibrated scores
    raw      all languages' scores as they are, weighted in the same way
    english  English's calibrated scores alone
    gold     the right choice

Prints, for each arm, accuracy before and after on held-out countries, on the topics of training and on the held-out
topic, with 95 % intervals of the changes by a paired bootstrap over countries.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from demo_worlds import summary_of
from rich.console import Console
from rich.table import Table

from calm_ray.demo.atlas.questions import HELD_OUT_TOPIC
from calm_ray.recipes.load import load_config
from calm_ray.run.directory import RunDirectory

ENGLISH = "en"
OTHERS = ["fr", "es", "de", "it", "pt"]
NEGLIGIBLE = 1e-6
RESAMPLES = 10_000
ARMS = {
    "auto": [],
    "random": ["dco.target=random"],
    "own": ["dco.weights=null", f"dco.gamma={NEGLIGIBLE}"],
    "raw": ["candidates.calibrate=false"],
    "english": [f"dco.weights={{en: 1, {', '.join(f'{code}: {NEGLIGIBLE}' for code in OTHERS)}}}"],
    "gold": ["method=dco_gold"],
}


@dataclass(frozen=True)
class Row:
    """A held-out question in all languages, before and after training."""

    country: str
    topic: str
    before: dict[str, str | None]
    after: dict[str, str | None]
    gold: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="atlas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--storage", default=str(Path("~/calm_ray/atlas").expanduser()))
    parser.add_argument("--set", nargs="*", default=[], help="more overrides, for all arms")
    options = parser.parse_args()
    Path(options.storage).mkdir(parents=True, exist_ok=True)
    for arm in options.arms:
        rows: list[Row] = []
        for seed in options.seeds:
            name = f"{options.recipe.replace('/', '-')}-{arm}-{seed}"
            rows += run(options.recipe, name, options.storage, [f"world.seed={seed}", *ARMS[arm], *options.set])
        Console(width=120).print(table(f"{arm}, seeds {' '.join(map(str, options.seeds))}", rows))


def run(recipe: str, name: str, storage: str, overrides: list[str]) -> list[Row]:
    """Runs or resumes one alignment and returns its held-out questions."""
    summary_of("calm.py", name, storage, [recipe, *overrides])
    config = load_config(recipe, [f"name={name}", f"storage={storage}", *overrides])
    answering: Any = config.evaluation[0]
    directory = RunDirectory(storage, name)
    answering = config.evaluation[0]
    before, after = (answering.answers(directory.stage(n, answering.name)) for n in (0, config.rounds))
    rows = directory.questions("held_out").read(["question_id", "subject", "gold"]).to_pylist()
    gold = {row["question_id"]: row["gold"] for row in rows}
    topics = {row["question_id"]: row["subject"] for row in rows}
    languages = config.evaluation_languages
    return [
        Row(
            question_id.rpartition("-")[2],
            topics[question_id],
            {code: before[code, question_id] for code in languages},
            {code: after[code, question_id] for code in languages},
            right,
        )
        for question_id, right in gold.items()
    ]


def table(title: str, rows: list[Row]) -> Table:
    """Before, after and change, by part and figure."""
    found = Table(title=f"{title}, percent", title_justify="left")
    for column in ("held-out countries", "figure", "questions", "before", "after", "change", "95 % interval"):
        found.add_column(column, justify="left" if column in ("held-out countries", "figure") else "right")
    trained = [row for row in rows if row.topic != HELD_OUT_TOPIC]
    parts = {"topics of training": trained, "held-out topic": [row for row in rows if row.topic == HELD_OUT_TOPIC]}
    parts |= {topic: [row for row in trained if row.topic == topic] for topic in sorted({row.topic for row in trained})}
    for part, own in parts.items():
        for number, (figure, measure) in enumerate(FIGURES.items()):
            before, after, interval = compared(own, measure)
            cells = [str(len(own)), *(f"{100 * value:.1f}" for value in (before, after))]
            low, high = interval
            cells += [f"{100 * (after - before):+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"]
            found.add_row("" if number else part, figure, *cells)
    return found


def accuracy(languages: Sequence[str]) -> Callable[[dict[str, str | None], str], float]:
    return lambda answers, gold: float(np.mean([answers[code] == gold for code in languages]))


def agreement(answers: dict[str, str | None], gold: str) -> float:
    """Fraction of pairs of languages with the same answer."""
    pairs = list(combinations(answers.values(), 2))
    return sum(first == second and first is not None for first, second in pairs) / len(pairs)


FIGURES = {
    "en": accuracy([ENGLISH]),
    **{code: accuracy([code]) for code in OTHERS},
    "five others": accuracy(OTHERS),
    "agreement": agreement,
}


def compared(
    rows: list[Row], measure: Callable[[dict[str, str | None], str], float]
) -> tuple[float, float, tuple[float, float]]:
    """Means before and after, and the 95 % interval of their difference: a paired percentile bootstrap over countries,
    whose questions, in all seeds, are drawn together."""
    countries: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    before, after = (np.array([measure(getattr(row, when), row.gold) for row in rows]) for when in ("before", "after"))
    for row, change in zip(rows, after - before, strict=True):
        countries[row.country][0] += change
        countries[row.country][1] += 1
    changes, counts = np.array(list(countries.values())).T
    drawn = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    low, high = np.quantile(changes[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (0.025, 0.975))
    return float(before.mean()), float(after.mean()), (float(low), float(high))


if __name__ == "__main__":
    main()
