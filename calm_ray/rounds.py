"""The method on one screen: sample, prefer, train, refresh, evaluate; repeat with the new policy."""

from __future__ import annotations

from calm_ray.job.job import Job
from calm_ray.methods.round import Round
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage


def run_rounds(job: Job) -> None:
    """Runs all rounds. A resumed run reads finished stages instead of recomputing them."""
    policy = job.initial_policy()
    evaluate(job, job.round(0, policy, policy), dict(job.questions))
    for number in range(1, job.config.rounds + 1):
        round, stages = job.round(number, start=policy), dict(job.questions)
        for step in job.config.steps:  # CALM: sample, vote and pair. DCO: score candidates, pair them
            stages[step.name] = step.run(round, [stages[name] for name in step.reads])
        policy = train(job, round, examples=stages[job.config.steps[-1].name])
        job.engines.refresh(policy)  # swaps the weights without restarting the engines
        evaluate(job, job.round(number, round.start, policy), stages)


def train(job: Job, round: Round, examples: Stage) -> Policy:
    """TRAIN: fits the round's policy to the examples with the method's objective."""
    job.config.training.run(round, [examples])
    return job.run.policy(round.number)


def evaluate(job: Job, round: Round, stages: dict[str, Stage]) -> None:
    """EVALUATE: the round's policy on held-out questions, compared with all earlier policies."""
    for step in job.config.evaluation:
        if round.number >= step.first_round:
            stages[step.name] = step.run(round, [stages[name] for name in step.reads])
    job.summarize()
