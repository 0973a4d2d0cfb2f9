"""What a round does with candidates: the engines score them, Ray Data draws pairs and joins their margins.

Scores of a policy are made once. What a round starts from was mostly scored when the round before was evaluated.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from calm_ray.cluster.over_chunks import count_over, over_chunks
from calm_ray.config import Config
from calm_ray.core.console import progress_bar
from calm_ray.core.sections import Candidates
from calm_ray.engines.pool import EnginePool
from calm_ray.engines.requests import Score
from calm_ray.engines.stage_runner import over_chunks_and_languages
from calm_ray.evaluation.from_scores import ScoreCounter
from calm_ray.methods.candidates import candidate_form
from calm_ray.methods.dco.optimum import OptimumCounter
from calm_ray.methods.dco.sampled_step import OwnCandidates
from calm_ray.methods.dco.step import CandidatePairs
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage

Part = Literal["score", "evaluate"]
"""The questions that are trained on, or those held out: the stages that hold a policy's scores of them."""


@dataclass(frozen=True)
class Scoring:
    config: Config
    run: RunDirectory
    pool: EnginePool
    settings: Candidates

    def has(self, part: Part, number: int) -> bool:
        """Whether there are candidates to score: those that are sampled come with a round, and none are held out."""
        return self.settings.form != "samples" or (part == "score" and number > 0)

    def score(self, number: int, policy: Policy, part: Part, name: str | None = None) -> Stage:
        """A policy's scores of the candidates of a part, and their report, in the round's stage of that name."""
        output = self.run.stage(number, name or part)
        self.ask(f"round {number}: {part}", policy, self._asked(number, part), output, self._languages(part))
        return output

    def ask(self, title: str, policy: Policy, questions: Stage, output: Stage, languages: list[str]) -> dict[str, Any]:
        """A policy's scores of the candidates of some questions, and their report; returns the stage's record."""
        if output.is_finished:
            return output.record
        started = time.monotonic()
        self.pool.load(policy)
        refreshed = time.monotonic()
        form = candidate_form(self.settings, self.config.world.seed)
        request = Score(form, with_prompt=self.settings.score == "mean_full")
        over_chunks_and_languages(self.pool, self.run.bad_prompts, request, title, questions, output, languages)
        report = ScoreCounter(output, languages, self.settings.score).report()
        return output.finish(
            {
                "policy": policy.name,
                "report": report,
                "refresh_seconds": refreshed - started,
                "seconds": time.monotonic() - refreshed,
            }
        )

    def under(self, reference: Policy, number: int, part: Part) -> Stage:
        """The reference's scores of a round's candidates: those that are there already, if they are the same."""
        if self.settings.form != "samples":
            for earlier in range(max(1, number)):
                for name in (part, f"reference_{part}"):
                    stage = self.run.stage(earlier, name)
                    if stage.is_finished and stage.record["policy"] == reference.name:
                        return stage
        return self.score(number, reference, part, f"reference_{part}")

    def draw_candidates(self, job: OwnCandidates) -> None:
        """The policy's own completions as candidates in every language, for `form: samples`."""
        if job.output.is_finished:
            return
        chunks = sorted(job.questions.chunks())
        there, made = job.output.chunks(), Counter[str]()
        with progress_bar(f"round {job.round_number}: candidates", len(chunks)) as progress:
            progress.advance(len(there))
            for row in over_chunks(job, [chunk for chunk in chunks if chunk not in there]):
                made.update({key: row[key] for key in ("questions", "candidates")})
                progress.advance(note=f"{made['candidates']} candidates of {made['questions']} questions")
        job.output.finish(dict(count_over(job.count, chunks)))

    def pair(self, number: int, reference: Policy) -> dict[str, Any]:
        """Draws the pairs of a round, with their target margins; returns the record of the stage."""
        pairs = self.run.stage(number, "pairs")
        started = time.monotonic()
        scored = self.under(reference, number, "score")
        job = CandidatePairs(
            scored=scored,
            pairs=pairs,
            languages=self.config.languages,
            settings=self.config.dco,
            beta=self.config.train.beta,
            gold=self.config.method.endswith("_gold"),
            seed=self.config.seed,
            round_number=number,
        )
        chunks = sorted(self._asked(number, "score").chunks())
        there = pairs.chunks()
        with progress_bar(f"round {number}: pair candidates", len(chunks)) as progress:
            progress.advance(len(there))
            for row in over_chunks(job, [chunk for chunk in chunks if chunk not in there]):
                progress.advance(note=f"{row['pairs']} pairs in {row['chunk']}")
        counts = count_over(job.count, chunks)
        return pairs.finish({"pairs": counts["pairs"], "seconds": time.monotonic() - started})

    def optimum(self, number: int, reference: Policy) -> dict[str, Any]:
        """The optimal policy that a round's reference leads to, beside the round's policy; without training."""
        stage = self.run.stage(number, "optimal")
        if stage.is_finished:
            return stage.record
        parts: tuple[Part, Part] = ("score", "evaluate")
        record: dict[str, Any] = {}
        for part, name in zip(parts, ("training", "held_out"), strict=True):
            lacking = set(self.config.languages) - set(self._languages(part))
            if self.has(part, number) and not lacking:
                policy = ScoreCounter(self.run.stage(number, part), self.config.languages, self.settings.score)
                under = self.under(reference, number, part)
                report = OptimumCounter(policy, under, self.config.dco, self.config.train.beta).report()
                record |= {name: report} if report else {}
        return stage.finish(record)

    def _asked(self, number: int, part: Part) -> Stage:
        if part == "score" and self.settings.form == "samples":
            return self.run.stage(number, "candidates")
        return self.run.questions("align" if part == "score" else "evaluate")

    def _languages(self, part: Part) -> list[str]:
        return self.config.languages if part == "score" else self.config.asked_languages
