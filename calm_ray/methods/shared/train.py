"""TRAIN: trains a round's policy on its examples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calm_ray.core.console import ProgressBar, progress_bar, say
from calm_ray.core.settings import RunSettings
from calm_ray.methods.base import Step
from calm_ray.methods.round import Asks, Round
from calm_ray.methods.work import Sizes, Work
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage
from calm_ray.training.reports import REFERENCE, Row

if TYPE_CHECKING:
    from calm_ray.training.job import TrainJob
    from calm_ray.training.objectives import Objective

OUTPUT_FILES = ("reference.parquet", "metrics.json", "policy.json")
"""Files that training writes next to the policy's own."""
COLLAPSE_NATS = 1.0
"""Warn if the chosen sides' log-probability per token drops this far below the reference."""


@dataclass(frozen=True)
class Train(Step):
    """Trains the round's policy. Without examples it stays the one the round starts from."""

    settings: RunSettings
    objective: Objective
    examples: Step
    """The step that produces the training examples."""

    name = "train"

    @property
    def asks(self) -> Asks:
        return "start"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.examples.name,)

    @property
    def keys(self) -> tuple[str, ...]:
        return ("train", "method", *self.objective.keys)

    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        started = time.monotonic()
        policy = round.start
        if inputs[0].counts()["rows"]:
            policy = trained(output) or self._train(round, self._job(round, output, inputs[0]))
        else:
            say(f"round {round.number}: nothing to train on: {self.examples.empty_reason(inputs[0].record)}")
        for name in round.run.discard_stale(round.graph, round.number, policy.name):
            say(f"{name}: was produced by a policy that has been lost; recomputing")
        output.storage.delete("checkpoints")
        files = [name for name in OUTPUT_FILES if output.storage.exists(name)]
        files += [f"policy/{name}" for name in output.storage.files("policy")]
        output.finish({"policy": policy.as_json(), "seconds": time.monotonic() - started}, files)

    def _job(self, round: Round, output: Stage, examples: Stage) -> TrainJob:
        from calm_ray.training.job import TrainJob

        settings = self.settings
        return TrainJob(
            examples=examples,
            output=output,
            model=round.model,
            start=round.start,
            reference=round.reference,
            train=settings.train,
            objective=self.objective,
            seed=settings.seed,
            round_number=round.number,
        )

    def _train(self, round: Round, job: TrainJob) -> Policy:
        from calm_ray.training.workers import train_round

        device, engines = self.settings.device, round.engines
        with progress_bar(self.heading(round)) as progress:
            report = Progress(progress, self.heading(round))
            if self.settings.placement == "split":
                return train_round(job, device, report)
            with engines.asleep():
                return train_round(job, device, report, 1.0 - engines.spec.gpu_fraction)

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        """Counts the prompt once per branch of an example."""
        examples = before[self.examples.name]
        branches = self.objective.sides or examples.branches
        tokens = examples.rows * branches * (sizes.prompt + examples.side)
        reference = tokens if self.objective.needs_reference else 0
        return Work(rows=examples.rows, unit=examples.unit, trained=tokens, reference=reference)


class Progress:
    """Shows how far training is, and warns if it makes the chosen sides less likely."""

    def __init__(self, bar: ProgressBar, heading: str) -> None:
        self._bar, self._heading = bar, heading
        self._started, self._done = 0.0, 0
        self._has_warned = False

    def __call__(self, row: Row) -> None:
        if REFERENCE in row:
            self._show_reference(row[REFERENCE], row["total"])
        elif "steps" in row:
            self._bar.begin(self._heading, row["steps"])
            if row["too_long_pairs"]:
                say(f"  {row['too_long_pairs']} pairs longer than train.max_pair_tokens were dropped")
        elif "train/loss" in row:
            self._show_step(row)

    def _show_reference(self, done: int, total: int) -> None:
        if not done:
            self._started, self._done = time.monotonic(), 0
            self._bar.begin(f"{self._heading}, log-probabilities under the reference", total)
            return
        rate = done / max(1e-9, time.monotonic() - self._started)
        self._bar.advance(done - self._done, f"{rate:.1f} examples/s")
        self._done = done

    def _show_step(self, row: Row) -> None:
        change = row.get("train/chosen_change_per_token")  # only objectives with a chosen side
        chosen = f", chosen {change:+.2f} nats/token" if change is not None else ""
        self._bar.advance(note=f"loss {row['train/loss']:.3f}{chosen}")
        if change is not None and change < -COLLAPSE_NATS and not self._has_warned:
            self._has_warned = True
            say(
                f"  warning: at step {row['step']}, chosen answers are {-change:.1f} nats per token less likely "
                "than under the reference: training lowers both sides. "
                "Lower train.learning_rate or raise train.sft_weight."
            )


def trained(output: Stage) -> Policy | None:
    """The policy of a training run that finished before the driver died; None if it did not."""
    try:
        policy = Policy(**output.storage.read_json("policy.json"))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return policy if output.storage.hash_folder("policy") == policy.sha256 else None
