"""SAMPLE: completions for every question in every language, from the policy the round starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calm_ray.core.console import console
from calm_ray.core.rows import Completion, rows_of
from calm_ray.core.settings import RunSettings
from calm_ray.methods.base import EngineStep
from calm_ray.methods.round import QuestionView
from calm_ray.methods.work import BYTES_PER_TOKEN, Sizes, Work
from calm_ray.run.stage import Stage

if TYPE_CHECKING:
    from calm_ray.engines import requests


@dataclass(frozen=True)
class Sample(EngineStep):
    """`sampling.completions` completions of each question in each language (CALM, section 2.1)."""

    settings: RunSettings
    extraction: str = "strict"
    """How answers are parsed."""
    extraction_key: str | None = None
    """Configuration key that sets `extraction`, if any."""

    name = "sample"
    reads = ("questions",)
    writes = True

    @property
    def keys(self) -> tuple[str, ...]:
        extraction = (self.extraction_key,) if self.extraction_key else ()
        sampling = ("completions", "temperature", "top_p", "max_new_tokens", "prompt")
        return (*self.engine_keys, *(f"sampling.{name}" for name in sampling), *extraction)

    @property
    def languages(self) -> list[str]:
        return self.settings.languages

    def request(self, round_number: int) -> requests.Sample:
        from calm_ray.engines import requests
        from calm_ray.engines.generator import Decoding

        sampling = self.settings.sampling
        decoding = Decoding(sampling.completions, sampling.temperature, sampling.top_p, sampling.max_new_tokens)
        return requests.Sample(decoding, self.settings.seed, round_number, sampling.prompt, self.extraction)

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        prompts = sizes.questions * sizes.languages
        rows = prompts * self.settings.sampling.completions
        return Work(
            rows=rows,
            unit="completions",
            read=prompts * sizes.prompt,  # the prefill is shared by all samples
            written=rows * sizes.reply,
            disk=rows * (sizes.prompt + sizes.reply) * BYTES_PER_TOKEN,
        )

    def show(self, view: QuestionView) -> None:
        from rich.table import Table

        table = Table(title=f"completions, round {view.number}", title_justify="left")
        for name in ("language", "sample", "answer", "completion", "policy"):
            table.add_column(name)
        for language in view.languages:
            completions: list[Completion] = view.rows_in(self.name, language)
            for row in completions:
                text = row["text"].replace("\n", " / ")
                table.add_row(language, str(row["sample"]), row["answer"] or "-", text, row["policy"])
        console.print(table)


def completions_of(sampled: Stage, chunk: str, languages: Sequence[str]) -> list[Completion]:
    """The completions of a chunk of questions, grouped by language."""
    return [row for language in languages for row in rows_of(sampled.read_chunk(f"{chunk}-{language}"))]
