"""Engines give candidates the same log-probabilities as the trainer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from factories import tree
from small_runs import random_adapters, scoring_engine

from calm_ray.core.sections import Engines, Lora, Train
from calm_ray.engines.generator import Likelihoods
from calm_ray.engines.spec import EngineSpec
from calm_ray.engines.vllm import MAX_LABELS
from calm_ray.packing.batch import pack
from calm_ray.run.policies import Policy, RunModel
from calm_ray.testing import word_tokenizer, write_tiny_model
from calm_ray.training.model import PolicyModel

LORA = Lora(r=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"])
WORDS = 300
TOLERANCE = 1e-3

Job = tuple[list[int], list[list[int]]]
"""Token ids of a prompt and of its candidates."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), word_tokenizer([f"w{i}" for i in range(WORDS)]))


@pytest.fixture(scope="module")
def trainer(model: Path) -> Iterator[PolicyModel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train = Train(learning_rate=1e-3, warmup_ratio=0.0, dtype="float32", lora=LORA)
    yield PolicyModel(model, train, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def policies(trainer: PolicyModel, tmp_path_factory: pytest.TempPathFactory) -> list[Policy]:
    return random_adapters(trainer, tmp_path_factory.mktemp("policies"), std=0.1)


@pytest.fixture(scope="module", params=["adapter", pytest.param("merged", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, ray_8_cpus: None, model: Path) -> Iterator[Any]:
    engines = Engines(
        shared=1, cpus=0.5, dtype="float32", refresh=request.param,
        # Too few tokens for all candidates, so they are prefilled in several steps.
        args={"max_model_len": 64, "max_num_seqs": 16, "max_num_batched_tokens": 128},
    )  # fmt: skip
    spec = EngineSpec(RunModel(str(model)), engines, LORA, "cpu", seed=0)
    actor = ray.remote(num_cpus=0.5)(scoring_engine()).remote(spec)
    yield actor
    ray.kill(actor)


def random_jobs(lengths: Sequence[Sequence[int]], seed: int = 0) -> list[Job]:
    """A prompt per list of candidate lengths. The first prompt has one token, each later one four more."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, WORDS) for _ in range(count)]

    return [(tokens(1 + 4 * number), [tokens(length) for length in sides]) for number, sides in enumerate(lengths)]


LABELS = [(0, 7, 11), (5, 0), (20, 21, 22, 23, 24, 25), (9, 9)]
"""Single-token candidates (labels) per question. Token 0 is as valid as any other."""


def label_jobs() -> list[Job]:
    prompts = [prompt for prompt, _ in random_jobs([[1]] * len(LABELS), seed=1)]
    return [(prompt, [[token] for token in tokens]) for prompt, tokens in zip(prompts, LABELS, strict=True)]


def text_jobs() -> list[Job]:
    return random_jobs([(1, 2), (3, 1, 4), (6, 5, 2, 1), (2, 2)])


def engine_scores(engine: Any, jobs: list[Job], with_prompt: bool = False) -> list[Likelihoods]:
    scores: list[Likelihoods] = ray.get(engine.likelihoods.remote(jobs, with_prompt))
    return scores


def trainer_logps(trainer: PolicyModel, sequences: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The trainer's log-probabilities of completions after their prompts, computed in one batch."""
    with torch.no_grad():
        return trainer.logps(pack([tree(prompt, side) for prompt, side in sequences]))


def logps_of(scores: Sequence[Likelihoods]) -> torch.Tensor:
    return torch.tensor([logp for one in scores for logp in one.logps])


def largest_difference(what: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """Prints and returns the largest difference between log-probabilities, in nats."""
    difference = float((found - expected).abs().max())
    print(f"{what}: {len(found)} log-probabilities, largest difference {difference:.1e} nats")
    return difference


def flatten(jobs: Sequence[Job]) -> list[tuple[list[int], list[int]]]:
    return [(prompt, side) for prompt, sides in jobs for side in sides]


def test_engine_matches_the_trainer_for_every_policy(engine: Any, trainer: PolicyModel, policies: list[Policy]) -> None:
    """Labels and texts, which take different code paths, in one call; and the base model again after the adapters."""
    mixed = [job for both in zip(label_jobs(), text_jobs(), strict=True) for job in both]
    before = torch.zeros(len(flatten(mixed)))
    for policy in [*policies, policies[0]]:
        ray.get(engine.load.remote(policy))
        trainer.load(policy, 0)
        scores = engine_scores(engine, mixed)
        logps = logps_of(scores)
        assert largest_difference(policy.name, logps, trainer_logps(trainer, flatten(mixed))) <= TOLERANCE
        assert {one.prompt_logp for one in scores} == {None}
        assert (logps - before).abs().mean() > 100 * TOLERANCE  # the policies clearly differ
        before = logps


def test_prompts_are_scored_with_their_candidates(engine: Any, trainer: PolicyModel, policies: list[Policy]) -> None:
    """And labels get the same log-probabilities with and without prompt scores."""
    ray.get(engine.load.remote(policies[1]))
    trainer.load(policies[1], 0)
    both = label_jobs() + text_jobs()
    scores = engine_scores(engine, both, with_prompt=True)
    assert largest_difference("candidates", logps_of(scores), trainer_logps(trainer, flatten(both))) <= TOLERANCE
    prompts = torch.tensor([one.prompt_logp for one in scores])
    # The first prompt of either kind is a single token, which has no log-probability.
    assert prompts[0] == prompts[len(LABELS)] == 0.0
    longer = [number for number, (prompt, _) in enumerate(both) if len(prompt) > 1]
    expected = trainer_logps(trainer, [(both[number][0][:1], both[number][0][1:]) for number in longer])
    assert largest_difference("prompts", prompts[longer], expected) <= TOLERANCE
    with_prompt, without = logps_of(scores[: len(LABELS)]), logps_of(engine_scores(engine, label_jobs()))
    assert largest_difference("labels, both ways", without, with_prompt) <= TOLERANCE


def test_cached_prefixes_do_not_change_scores(engine: Any, policies: list[Policy]) -> None:
    ray.get(engine.load.remote(policies[2]))
    both = label_jobs() + text_jobs()
    first, again = engine_scores(engine, both), engine_scores(engine, both[::-1])[::-1]
    assert largest_difference("again", logps_of(again), logps_of(first)) <= TOLERANCE


def test_more_labels_than_fit_in_one_request(engine: Any, trainer: PolicyModel, policies: list[Policy]) -> None:
    ray.get(engine.load.remote(policies[1]))
    trainer.load(policies[1], 0)
    for count in (MAX_LABELS, MAX_LABELS + 1):
        many = [([4, 5, 6], [[token] for token in range(count)])]
        logps = logps_of(engine_scores(engine, many))
        assert largest_difference("many", logps, trainer_logps(trainer, flatten(many))) <= TOLERANCE


def test_scoring_nothing_returns_nothing(engine: Any) -> None:
    assert engine_scores(engine, []) == engine_scores(engine, [], with_prompt=True) == []
