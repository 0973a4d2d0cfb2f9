"""The method on one screen: sample, prefer, train, refresh, evaluate, and again from the new policy."""

from __future__ import annotations

from calm_ray.job.job import Job
from calm_ray.methods.round import Round
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage


def run_rounds(job: Job) -> None:
    """The rounds of a run, from where they stand: what is finished is read, not done again."""
    policy = job.initial_policy()
    evaluate(job, job.round(0, policy, policy), dict(job.questions))
    for number in range(1, job.config.rounds + 1):
        round, made = job.round(number, start=policy), dict(job.questions)
        for step in job.config.steps:  # CALM: sample, vote and pair. DCO: score candidates, pair them
            made[step.name] = step.run(round, [made[name] for name in step.reads])
        policy = train(job, round, examples=made[job.config.steps[-1].name])
        job.engines.refresh(policy)  # the engines, still running, take the new policy
        evaluate(job, job.round(number, round.start, policy), made)


def train(job: Job, round: Round, examples: Stage) -> Policy:
    """TRAIN: the examples become the round's policy, by the method's objective."""
    job.config.training.run(round, [examples])
    return job.run.policy(round.number)


def evaluate(job: Job, round: Round, made: dict[str, Stage]) -> None:
    """EVALUATE: what the round's policy answers to held-out questions, beside all earlier policies."""
    for step in job.config.evaluation:
        if round.number >= step.first_round:
            made[step.name] = step.run(round, [made[name] for name in step.reads])
    job.summarise()
