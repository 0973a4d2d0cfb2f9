"""The stages of a round. Each is done once: what is finished is read from the run directory, not done again."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from calm_ray.cluster.over_chunks import count_over, over_chunks
from calm_ray.config import Config
from calm_ray.core.console import progress_bar, say
from calm_ray.core.rows import gold_of, rows_of
from calm_ray.engines.generator import Decoding
from calm_ray.engines.pool import EnginePool
from calm_ray.engines.requests import Answer, Sample
from calm_ray.engines.stage_runner import over_chunks_and_languages
from calm_ray.evaluation.from_scores import answers_of, changed_answers
from calm_ray.evaluation.report import evaluation_report
from calm_ray.job.prompt_limits import context_tokens
from calm_ray.methods.calm.step import PreferenceJob
from calm_ray.methods.calm.vote_report import sample_report
from calm_ray.methods.dco.objective import DCO
from calm_ray.methods.dco.sampled_step import OwnCandidates
from calm_ray.methods.dco.scoring import Scoring
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage
from calm_ray.training.job import TrainJob
from calm_ray.training.objectives import DPO, SFT, Objective
from calm_ray.training.workers import train_round

TRAINED = ("reference.parquet", "metrics.json", "policy.json")
"""What training leaves beside the policy's own files."""
COLLAPSE_NATS = 1.0
"""A fall of the chosen sides' log-probability per token, from the reference, that is worth a warning."""


@dataclass(frozen=True)
class Stages:
    config: Config
    run: RunDirectory
    model: RunModel
    pool: EnginePool

    @property
    def scoring(self) -> Scoring | None:
        """What the run does with candidates, if it has any."""
        settings = self.config.candidates
        return Scoring(self.config, self.run, self.pool, settings) if settings is not None else None

    def sample(self, number: int, policy: Policy) -> dict[str, Any]:
        """Every question in every language, `sampling.completions` times, from the policy of the round before.

        Only where the method needs completions.
        """
        stage = self.run.stage(number, "sample")
        if not self.config.samples:
            return {}
        if stage.is_finished:
            return stage.record
        started = time.monotonic()
        sampling = self.config.sampling
        self.pool.load(policy)
        decoding = Decoding(sampling.completions, sampling.temperature, sampling.top_p, sampling.max_new_tokens)
        extraction = self.config.preferences.extraction
        request = Sample(decoding, self.config.seed, number, sampling.instruction, extraction)
        counts = over_chunks_and_languages(
            self.pool, self.run.bad_prompts, request, f"round {number}: sample", self.run.questions("align"), stage,
            self.config.languages,
        )  # fmt: skip
        return stage.finish({**counts, "policy": policy.name, "seconds": time.monotonic() - started})

    def prefer(self, number: int, start: Policy) -> dict[str, Any]:
        """The pairs of a round: of a vote on what was sampled, or of candidates that were scored."""
        stage = self.run.stage(number, "pairs")
        scoring = self.scoring if not self.config.votes else None
        draws = scoring is not None and self.config.samples
        if stage.is_finished and not (draws and not self.run.stage(number, "candidates").is_finished):
            return stage.record
        if self.config.samples:
            self.pool.load(start)  # who wrote the completions may have to translate them; they may be there already
        if scoring is None:
            return self._vote(number, stage)
        if draws:
            scoring.draw_candidates(self._own_candidates(number))
        if stage.is_finished:
            return stage.record
        return scoring.pair(number, self._reference(start))

    def _own_candidates(self, number: int) -> OwnCandidates:
        config = self.config
        assert config.candidates is not None
        return OwnCandidates(
            questions=self.run.questions("align"),
            completions=self.run.stage(number, "sample"),
            output=self.run.stage(number, "candidates"),
            languages=config.languages,
            model=self.model,
            translator=config.preferences.translator,
            instruction=config.sampling.instruction,
            most=config.candidates.most,
            seed=config.seed,
            round_number=number,
            world_seed=config.world.seed,
            text_service=self.pool.text_service,
            max_new_tokens=config.sampling.max_new_tokens,
            context_tokens=context_tokens(self.model.local_folder(weights=False), config),
        )

    def _vote(self, number: int, stage: Stage) -> dict[str, Any]:
        """Votes and pairs, and, where gold answers are known, how right the vote is."""
        started = time.monotonic()
        questions = self.run.questions("align")
        job = PreferenceJob(
            questions=questions,
            completions=self.run.stage(number, "sample"),
            votes=self.run.stage(number, "votes"),
            pairs=stage,
            languages=self.config.languages,
            preferences=self.config.preferences,
            instruction=self.config.sampling.instruction,
            model=self.model,
            seed=self.config.seed,
            round_number=number,
            world_seed=self.config.world.seed,
            text_service=self.pool.text_service,
            max_new_tokens=self.config.sampling.max_new_tokens,
        )
        chunks = questions.chunks()
        todo = sorted(chunks - (stage.chunks() & job.votes.chunks()))
        with progress_bar(f"round {number}: vote and pair", len(chunks)) as progress:
            progress.advance(len(chunks) - len(todo))
            made: Counter[str] = Counter()
            for row in over_chunks(job, todo):
                made.update({"drafts": row["drafts"], "pairs": row["pairs"]})
                lost = made["drafts"] - made["pairs"]
                progress.advance(note=f"{made['pairs']} pairs" + (f", {lost} not carried over" if lost else ""))
            counts = count_over(job.count, sorted(chunks))
        job.votes.finish({})
        record = {"pairs": counts["pairs"], "vote": sample_report(counts), "seconds": time.monotonic() - started}
        return stage.finish(record)

    def train(self, number: int, start: Policy) -> Policy:
        """The policy of this round; without pairs there is nothing to learn, and it stays the one it starts from."""
        stage = self.run.stage(number, "train")
        if stage.is_finished:
            return self.run.policy(number)
        started = time.monotonic()
        pairs = self.run.stage(number, "pairs")
        policy = start
        if pairs.record["pairs"]:
            policy = self._trained(stage) or self._train(self._train_job(number, start))
        else:
            why = "all languages agree wherever there is a winner" if self.config.votes else "no pair could be drawn"
            say(f"round {number}: {why}, so there is nothing to train on")
        for name in self.run.forget_after_training(number, policy.name):
            say(f"{name}: was made by a policy that is lost, and is made again")
        stage.storage.delete("checkpoints")
        files = [name for name in TRAINED if stage.storage.exists(name)]
        files += [f"policy/{name}" for name in stage.storage.files("policy")]
        stage.finish({"policy": policy.as_json(), "seconds": time.monotonic() - started}, files)
        return policy

    def _trained(self, stage: Stage) -> Policy | None:
        """The policy of a training that had ended when the driver died."""
        try:
            policy = Policy(**stage.storage.read_json("policy.json"))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return policy if stage.storage.hash_folder("policy") == policy.sha256 else None

    def _train_job(self, number: int, start: Policy) -> TrainJob:
        return TrainJob(
            examples=self.run.stage(number, "pairs"),
            output=self.run.stage(number, "train"),
            model=self.model,
            start=start,
            reference=self._reference(start),
            train=self.config.train,
            objective=self._objective(),
            seed=self.config.seed,
            round_number=number,
        )

    def _objective(self) -> Objective:
        train = self.config.train
        if self.config.objective == "dco":
            return DCO(train.beta, self.config.dco.loss)
        return SFT(train.sft_mean) if self.config.objective == "sft" else DPO(train.beta, train.sft_weight)

    def _reference(self, start: Policy) -> Policy:
        """What a round's margins are measured against."""
        return Policy() if self.config.train.reference == "base" else start

    def _train(self, job: TrainJob) -> Policy:
        warned = False
        with progress_bar(f"round {job.round_number}: train") as progress:

            def report(row: dict[str, Any]) -> None:
                nonlocal warned
                if "steps" in row:
                    progress.set_total(row["steps"])
                    if row["too_long_pairs"]:
                        say(f"  {row['too_long_pairs']} pairs are longer than train.max_pair_tokens and were left out")
                elif "train/loss" in row:
                    change = row.get("train/chosen_change_per_token")  # neither DCO nor TRL tell
                    chosen = f", chosen {change:+.2f} nats/token" if change is not None else ""
                    progress.advance(note=f"loss {row['train/loss']:.3f}{chosen}")
                    is_dpo = isinstance(job.objective, DPO)
                    if is_dpo and change is not None and change < -COLLAPSE_NATS and not warned:
                        warned = True
                        say(
                            f"  warning: at step {row['step']} the chosen answers have become {-change:.1f} nats per "
                            "token less likely than under the reference; DPO is lowering both sides. "
                            "Lower train.learning_rate or raise train.sft_weight."
                        )

            if self.config.placement == "split":
                return train_round(job, self.config.device, report)
            with self.pool.asleep():
                return train_round(job, self.config.device, report, 1.0 - self.pool.spec.gpu_fraction)

    def evaluate(self, number: int, policy: Policy, start: Policy) -> None:
        """Refreshes the engines with the policy and asks it the held-out questions.

        With candidates those of the training questions are scored again; with DCO the optimal policy is put beside it.
        """
        output = self.run.stage(number, "evaluate")
        self.ask(f"round {number}: evaluate", policy, self.run.questions("evaluate"), output)
        if self.scoring is not None and self.scoring.has("score", number):
            self.scoring.score(number, policy, "score")
        if self.scoring is not None and self.config.has_optimum:
            self.scoring.optimum(number, self._reference(start))
        self._compare(number)

    def _compare(self, number: int) -> None:
        """Notes how many held-out answers of each language are not those of each earlier policy."""
        stage = self.run.stage(number, "changed")
        if stage.is_finished:
            return
        is_scored = self.scoring is not None and not self.config.answers_by_writing
        convention = self.scoring.settings.score if self.scoring and is_scored else None
        now, *earlier = (answers_of(self.run.stage(n, "evaluate"), convention) for n in (number, *range(number)))
        stage.finish({str(n): changed_answers(now, before) for n, before in enumerate(earlier)})

    def ask(self, title: str, policy: Policy, questions: Stage, output: Stage) -> dict[str, Any]:
        """A policy's answers to some questions, written or by the likeliest candidate, and their report, if any."""
        if self.scoring is not None and not self.config.answers_by_writing:
            return self.scoring.ask(title, policy, questions, output, self.config.asked_languages)
        if output.is_finished:
            return output.record
        started = time.monotonic()
        self.pool.load(policy)
        refreshed = time.monotonic()
        sampling = self.config.sampling
        request = Answer(sampling.max_new_tokens, sampling.instruction, self.config.preferences.extraction)
        over_chunks_and_languages(
            self.pool, self.run.bad_prompts, request, title, questions, output, self.config.asked_languages,
        )  # fmt: skip
        report = {}
        if output.chunks():
            report = evaluation_report(rows_of(output.read()), gold_of(rows_of(questions.read())))
        return output.finish(
            {
                "policy": policy.name,
                "report": report,
                "refresh_seconds": refreshed - started,
                "seconds": time.monotonic() - refreshed,
            }
        )
