"""The recipe section `preferences`: how completions vote and form pairs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from calm_ray.core.languages import LANGUAGES
from calm_ray.core.sections import Count, Section, unknown_name

OPTION_TEXT = "option_text"
"""Answers in the model's own words, which name a choice."""
PRESETS: dict[str, dict[str, Any]] = {
    "strict": {},
    # The rules behind the published files, inferred from the files; they reproduce every row.
    "released": {
        "extraction": "released",
        "ties": "first",
        "merge_order": ["ja", "fr", "zh", "it", "de", "en"],
        "judged_alone": ["en"],
        "positive": "last",
    },
}
"""Defaults set by `preferences.preset`."""


class Preferences(Section):
    """How completions vote and form pairs (CALM, section 2.2). All samples count equally, since weighting needs gold
    answers."""

    preset: Literal["strict", "released"] = "strict"
    """`strict` uses the defaults below. `released` reproduces the pairs published with the paper by changing the
    defaults of `extraction`, `ties`, `merge_order`, `judged_alone` and `positive`."""
    extraction: Literal["strict", "released", "option_text"] = "strict"
    """How answers are parsed: `strict` reads a single letter after the language's answer marker; `released` follows the
    paper's published code; `option_text` reads the only choice that the text names, for `sampling.prompt: question`."""
    scope: Literal["all", "own_language"] = "all"
    """Which completions vote together: those of `all` languages, or each language's own (`own_language`, a control)."""
    judged_alone: list[str] = []
    """Languages that take part in the joint vote, but whose completions are judged by the language's own vote."""
    winner: Literal["vote", "random", "gold"] = "vote"
    """Which answer wins: `vote`, the most frequent; `random`, one of the given answers (a control); `gold`, the most
    frequent, but only if it is correct (required by `method: dpo_gold` and `sft_gold`, invalid with any other)."""
    min_agreement: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Minimum fraction (0 to 1) of the parseable answers that the most frequent one needs to win."""
    ties: Literal["drop", "first", "smallest", "lowest_entropy"] = "drop"
    """How ties are resolved: `drop` makes no pairs from the question; `first` picks the tied answer that comes first in
    `merge_order`; `smallest`, the first letter; `lowest_entropy`, the one given by the most certain languages."""
    merge_order: list[str] = []
    """Language order for `ties: first` and `positive: last`; languages not listed come first."""
    positive: Literal["same_language", "last"] = "same_language"
    """Which winning completions a losing one is paired with: `same_language` draws at random and prefers winners in the
    loser's language; `last` takes the last winner in `merge_order` for every loser."""
    positives: Count = 1
    """Maximum number of winning completions paired with each losing one. Must be 1 with `positive: last`."""
    negatives: Count | None = None
    """Maximum number of losing completions used per question and language, drawn at random; null uses all."""
    translator: Literal["world", "model", "option_text"] = "model"
    """What translates a winning completion into the loser's language: `model` prompts the policy; `option_text` writes
    the losing completion again with the winning choice in place of its own (requires `extraction: option_text`);
    `world` uses the demo world's own translator (demo world only)."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("preset"), str):
            return {**PRESETS.get(raw["preset"], {}), **raw}
        return raw

    @model_validator(mode="after")
    def _check(self) -> Preferences:
        if self.positive == "last" and self.positives > 1:
            raise ValueError("positives: must be 1 with positive: last, which picks a single winning completion")
        if self.translator == OPTION_TEXT and self.extraction != OPTION_TEXT:
            raise ValueError(f"translator: {OPTION_TEXT} requires extraction: {OPTION_TEXT}")
        for field in ("judged_alone", "merge_order"):
            for code in getattr(self, field):
                if code not in LANGUAGES:
                    raise ValueError(f"{field}: {unknown_name(code, list(LANGUAGES))}")
        return self
