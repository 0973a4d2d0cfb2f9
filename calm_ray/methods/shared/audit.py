"""What a target is worth before training on it: each language alone, what several say together, and the target itself.

Everything is counted on the questions to train on, by chunks whose counts can be added. Gold answers, where there are
any, only report. L languages, Q questions, at most K answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from calm_ray.core.console import console, say
from calm_ray.evaluation.ranking import probabilities
from calm_ray.evaluation.tables import percent, plain_table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Pool = Callable[[Floats], Floats]
"""Turns the distributions of several languages [L, Q, K] into one [Q, K]."""

RAW, CALIBRATED = "raw", "calibrated"
TARGET, VOTE, PRODUCT = "target", "vote", "product"
WITHOUT = " without "
"""As in "product without fr"."""


class Worth(TypedDict):
    """How good the answers of a source are, as fractions from 0 to 1."""

    accuracy: float | None
    """None without gold answers."""
    agreement: float
    """How likely an answer drawn from the source is also drawn from a language, in the mean over the languages; a
    language alone is compared with the others. Unlike how often the most likely answers are the same, this counts the
    less, the less sure both are."""
    confidence: float
    """Mean probability of the answer. Far above the accuracy, the source is overconfident."""


Report = dict[str, dict[str, Worth]]
"""By `raw` or `calibrated`, then by source: a language, or a pool of all languages or of all but one."""


def vote(own: Floats) -> Floats:
    """Fraction of the languages [L, Q, K] that answer each candidate [Q, K]; their product decides ties."""
    candidates = np.arange(own.shape[2])
    votes = (own.argmax(axis=2)[:, :, None] == candidates).mean(axis=0)
    return np.asarray(votes + 1e-6 * product(own))


def product(own: Floats) -> Floats:
    """The normalized product of the languages' distributions [L, Q, K]."""
    with np.errstate(divide="ignore"):
        return probabilities(np.log(own).sum(axis=0))


def answers_of(distribution: Floats) -> Ints:
    """The most likely answer [...] of distributions [..., K]; -1 if there is none, or several."""
    highest = distribution.max(axis=-1, keepdims=True)
    leading = (distribution == highest) & (highest > 0)
    return np.where(leading.sum(axis=-1) == 1, distribution.argmax(axis=-1), -1)


def count_sources(
    own: Floats, right: Ints, languages: Sequence[str], kind: str, pools: Mapping[str, Pool]
) -> Counter[str]:
    """Counts a chunk for `audit_report`.

    `own` [L, Q, K] are the languages' distributions over answers, which need not add up to 1, `right` [Q] the gold
    answers, negative if unknown, and `kind` says whether the distributions are raw or calibrated.
    """
    counts: Counter[str] = Counter()
    for name, distribution in _sources(own, languages, pools):
        others = [i for i, code in enumerate(languages) if code != name]
        counts.update(count_answers(f"{kind}/{name}", distribution, own[others], right))
    return counts


def _sources(own: Floats, languages: Sequence[str], pools: Mapping[str, Pool]) -> Iterator[tuple[str, Floats]]:
    """Yields distributions [Q, K]: each language's own, then those of several languages together."""
    yield from zip(languages, own, strict=True)
    everyone = list(range(len(languages)))
    groups = {"": everyone}
    if len(languages) > 2:
        groups |= {f"{WITHOUT}{languages[i]}": [j for j in everyone if j != i] for i in everyone}
    for suffix, group in groups.items():
        for name, pool in pools.items():
            yield f"{name}{suffix}", pool(own[group])


def count_answers(key: str, source: Floats, others: Floats, right: Ints, answer: Ints | None = None) -> Counter[str]:
    """Counts a source's answers, with its distribution [Q, K], beside the distributions of some languages [l, Q, K].

    Distributions need not add up to 1; one of zeros is no answer. `answer` [Q] defaults to the most likely one.
    """
    answer, drawn = answers_of(source) if answer is None else answer, _normalized(source)
    return Counter(
        {
            f"{key}/questions": len(answer),
            f"{key}/known": int((right >= 0).sum()),
            f"{key}/right": int(((right >= 0) & (answer == right)).sum()),
            f"{key}/agreement": float((drawn * _normalized(others).mean(axis=0)).sum()) if len(others) else 0.0,
            f"{key}/confidence": float(drawn.max(axis=1).sum()),
        }
    )


def _normalized(distributions: Floats) -> Floats:
    return np.asarray(distributions / np.maximum(distributions.sum(axis=-1, keepdims=True), 1e-9))


def audit_report(counts: Mapping[str, float]) -> Report:
    """Returns what `count_sources` counted over all chunks."""
    report: Report = {}
    for key in counts:
        kind, _, rest = key.partition("/")
        name, _, metric = rest.rpartition("/")
        if metric == "questions" and kind in (RAW, CALIBRATED):
            report.setdefault(kind, {})[name] = worth_of(counts, f"{kind}/{name}")
    return report


def worth_of(counts: Mapping[str, float], key: str) -> Worth:
    """Returns what `count_answers` counted over all chunks."""
    questions, known = max(1, counts[f"{key}/questions"]), counts[f"{key}/known"]
    return Worth(
        accuracy=counts[f"{key}/right"] / known if known else None,
        agreement=counts[f"{key}/agreement"] / questions,
        confidence=counts[f"{key}/confidence"] / questions,
    )


def better_sources(report: Report, target: Worth, languages: Sequence[str]) -> list[tuple[str, str, float]]:
    """Returns the sources that are right more often than the target, if a single language is: (kind, name, accuracy).

    Empty without gold answers. The best come first.
    """
    if target["accuracy"] is None:
        return []
    found = [
        (kind, name, worth["accuracy"])
        for kind, sources in report.items()
        for name, worth in sources.items()
        if worth["accuracy"] is not None and worth["accuracy"] > target["accuracy"]
    ]
    if not any(name in languages for _, name, _ in found):
        return []
    return sorted(found, key=lambda one: -one[2])


def print_audit(
    report: Report, target: Worth | None, languages: Sequence[str], advice: Callable[[str, str], str]
) -> None:
    """Prints the target and its sources, raw and calibrated, and warns about a poor target.

    `advice` returns what to set so that the target comes close to a source, by kind and name.
    """
    console.print(_table(report, target, languages))
    if target is not None and (better := better_sources(report, target, languages)):
        kind, name, accuracy = better[0]
        known = f"the target is right in {percent(target['accuracy'])} percent of the questions"
        say(f"  warning: {known}, but {name} ({kind}) in {percent(accuracy)}. {advice(kind, name)}")


def _table(report: Report, target: Worth | None, languages: Sequence[str]) -> Table:
    kinds = list(report.values())
    pools = [name for name in kinds[0] if name not in languages and WITHOUT not in name]
    table = plain_table(f"what the target is worth on the questions to train on, percent ({' / '.join(report)})")
    table.add_column("")
    for column in ("accuracy", "agreement", "confidence", *(f"{pool}\nwithout it" for pool in pools)):
        table.add_column(column, justify="right", no_wrap=True)
    for name in (*languages, *pools):
        others = [_accuracies([kind.get(f"{pool}{WITHOUT}{name}") for kind in kinds]) for pool in pools]
        own = [kind[name] for kind in kinds]
        table.add_row(name, *_cells(own), *others)
    if target is not None:
        table.add_row(TARGET, *_cells([target]), style="bold")
    return table


def _cells(worths: Sequence[Worth]) -> list[str]:
    agreement, confidence = (
        " / ".join(percent(value) for value in values)
        for values in zip(*((worth["agreement"], worth["confidence"]) for worth in worths), strict=True)
    )
    return [_accuracies(worths), agreement, confidence]


def _accuracies(worths: Sequence[Worth | None]) -> str:
    return " / ".join(percent(worth["accuracy"]) for worth in worths if worth is not None)
