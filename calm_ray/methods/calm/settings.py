"""The section `preferences` of a recipe: how completions vote, and which pairs they make."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from calm_ray.core.languages import LANGUAGES
from calm_ray.core.sections import Count, Section, unknown_name

PRESETS: dict[str, dict[str, Any]] = {
    "strict": {},
    # The rules that the published files were made by; found from the files, of which they give every row.
    "released": {
        "extraction": "released",
        "ties": "first",
        "merge_order": ["ja", "fr", "zh", "it", "de", "en"],
        "judged_alone": ["en"],
        "positive": "last",
    },
}
"""What `preferences.preset` fills in, where a recipe does not say otherwise."""


class Preferences(Section):
    """From completions to pairs (CALM, section 2.2). Every sample counts the same: weights would need gold answers."""

    preset: Literal["strict", "released"] = "strict"
    """`released` makes the pairs that were published with the paper; `strict` is every default below."""
    extraction: Literal["strict", "released"] = "strict"
    """How an answer is read: one letter after the language's marker, or by the published code's rules."""
    scope: Literal["all", "own_language"] = "all"
    """Who votes: all languages together, or each language for itself (a control)."""
    judged_alone: list[str] = []
    """Languages that vote with the others, but whose own completions are judged by their own vote alone."""
    winner: Literal["vote", "random", "gold"] = "vote"
    """What wins: the most frequent answer; one of those given, at random (a control); or, by the methods `dpo_gold` and
    `sft_gold` alone, the most frequent one where it is right."""
    minimum_agreement: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the readable answers that the most frequent one must have to win."""
    ties: Literal["drop", "first", "smallest", "lowest_entropy"] = "drop"
    """A tied question gives no pairs; or of the tied answers wins the first in `merge_order`, the alphabetically
    smallest, or the one whose languages are surest of their answers."""
    merge_order: list[str] = []
    """The order in which the languages' ballots are counted; others come before these. For `ties: first` and
    `positive: last`."""
    positive: Literal["same_language", "last"] = "same_language"
    """Which winning completions a losing one is paired with: one of its own language first, drawn by the seed; or the
    last in `merge_order`, the same for all."""
    positives: Count = 1
    """Winning completions that each losing completion is paired with."""
    negatives: Count | None = None
    """Losing completions used of one question in one language; null for all."""
    translator: Literal["world", "model"] = "model"
    """Who carries a winning completion into another language: the demo world itself, or the model, prompted."""

    @model_validator(mode="before")
    @classmethod
    def _fill_by_preset(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("preset"), str):
            return {**PRESETS.get(raw["preset"], {}), **raw}
        return raw

    @model_validator(mode="after")
    def _one_positive_is_last(self) -> Preferences:
        if self.positive == "last" and self.positives > 1:
            raise ValueError("positives: must be 1 with positive: last, which names one winning completion")
        for field in ("judged_alone", "merge_order"):
            for code in getattr(self, field):
                if code not in LANGUAGES:
                    raise ValueError(f"{field}: {unknown_name(code, list(LANGUAGES))}")
        return self
