"""EVALUATE: what a policy answers to held-out questions, in writing or by the likeliest of given candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from calm_ray.core.rows import gold_of, rows_of
from calm_ray.core.settings import RunSettings
from calm_ray.methods.base import EngineStep, Entry, Evaluation, Step
from calm_ray.methods.round import Asks, Round
from calm_ray.methods.shared.scores import ReferenceScores, Scores, ScoringStep
from calm_ray.methods.work import Sizes, Work
from calm_ray.run.stage import Stage

if TYPE_CHECKING:
    from calm_ray.engines.requests import Answer

EVALUATE = "evaluate"
"""The folder of a policy's answers to held-out questions, however it gives them."""
Answers = dict[tuple[str, str], str | None]
"""(language, question_id) -> what a policy answered."""


class Answering(Protocol):
    """The first step of an evaluation: what a policy answers to the held-out questions."""

    name: ClassVar[str]

    def answers(self, stage: Stage) -> Answers:
        """What the policy of a stage answered."""
        ...


@dataclass(frozen=True)
class WrittenAnswers(EngineStep):
    """Answers that the policy writes, greedily."""

    settings: RunSettings
    extraction: str = "strict"
    """How answers are read."""
    extraction_key: str | None = None
    """The configuration key that says so, if there is one."""

    name = EVALUATE
    reads = ("held_out",)
    writes = True

    @property
    def asks(self) -> Asks:
        return "trained"

    @property
    def keys(self) -> tuple[str, ...]:
        read = (self.extraction_key,) if self.extraction_key else ()
        return (*self.keys_of_engines, "sampling.max_new_tokens", "sampling.instruction", *read)

    @property
    def languages(self) -> list[str]:
        return self.settings.asked_languages

    def request(self, round_number: int) -> Answer:
        from calm_ray.engines.requests import Answer

        sampling = self.settings.sampling
        return Answer(sampling.max_new_tokens, sampling.instruction, self.extraction)

    def report(self, output: Stage, questions: Stage) -> Entry:
        from calm_ray.evaluation.report import evaluation_report

        if not output.chunks():
            return {"report": {}}
        return {"report": evaluation_report(rows_of(output.read()), gold_of(rows_of(questions.read())))}

    def answers(self, stage: Stage) -> Answers:
        if not stage.chunks():
            return {}
        data = stage.read(["language", "question_id", "answer"]).to_pydict()
        return dict(zip(zip(data["language"], data["question_id"], strict=True), data["answer"], strict=True))

    def summary(self, record: Entry) -> Entry:
        return dict(record["report"])

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        rows = sizes.held_out * sizes.evaluation_languages
        return Work(rows=rows, unit="answers", read=rows * sizes.prompt, written=rows * sizes.reply)


@dataclass(frozen=True)
class LikeliestAnswers(ScoringStep):
    """Answers by the candidate that the policy finds likeliest."""

    settings: RunSettings

    name = EVALUATE
    part = "held_out"

    @property
    def asks(self) -> Asks:
        return "trained"

    def answers(self, stage: Stage) -> Answers:
        from calm_ray.evaluation.from_scores import likeliest_answers

        return likeliest_answers(stage, self.candidates.score)

    def summary(self, record: Entry) -> Entry:
        return dict(record["report"])


@dataclass(frozen=True)
class ReferenceOnHeldOut(ReferenceScores):
    """The reference's scores of the held-out questions."""

    name = "reference_evaluate"
    part = "held_out"
    made_by = EVALUATE


@dataclass(frozen=True)
class Changed(Step):
    """How many held-out answers of each language are not those of each earlier policy (DCO, section 6.4)."""

    evaluation: Answering

    name = "changed"
    keys = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.evaluation.name,)

    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        from calm_ray.evaluation.from_scores import changed_answers

        number, name = round.number, self.evaluation.name
        now, *earlier = (self.evaluation.answers(round.run.stage(n, name)) for n in (number, *range(number)))
        output.finish({str(n): changed_answers(now, before) for n, before in enumerate(earlier)})

    def summary(self, record: Entry) -> Entry:
        return {"changed": record}


def evaluation_steps(
    settings: RunSettings, extraction: str = "strict", extraction_key: str | None = None
) -> Evaluation:
    """By the likeliest candidate where candidates are given, and in writing otherwise."""
    if settings.candidates is not None and not settings.draws_candidates:
        likeliest = LikeliestAnswers(settings)
        return likeliest, Scores(settings), Changed(likeliest)
    written = WrittenAnswers(settings, extraction, extraction_key)
    scores = (Scores(settings),) if settings.draws_candidates else ()
    return written, *scores, Changed(written)
