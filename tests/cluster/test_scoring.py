"""The engines find candidates as likely as the model that is trained."""

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

from calm_ray.core.sections import Engines, Lora, Train
from calm_ray.engines.actor import EngineActor
from calm_ray.engines.generator import Likelihoods
from calm_ray.engines.spec import EngineSpec
from calm_ray.engines.vllm import MOST_LABELS
from calm_ray.run.policies import Policy, RunModel, publish
from calm_ray.run.storage import Storage
from calm_ray.testing import word_tokenizer, write_tiny_model
from calm_ray.training.batches import pack
from calm_ray.training.model import PolicyModel

LORA = Lora(r=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"])
WORDS = 300
TOLERANCE = 1e-3

Job = tuple[list[int], list[list[int]]]
"""A prompt and its candidates, as tokens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), word_tokenizer([f"w{i}" for i in range(WORDS)]))


@pytest.fixture(scope="module")
def trainer(model: Path) -> Iterator[PolicyModel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train = Train(learning_rate=1e-3, warmup_share=0.0, dtype="float32", lora=LORA)
    yield PolicyModel(model, train, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def policies(trainer: PolicyModel, tmp_path_factory: pytest.TempPathFactory) -> list[Policy]:
    """The model itself, and two adapters with weights large enough to change what it says."""
    folder = tmp_path_factory.mktemp("policies")
    made = [Policy()]
    for number in (1, 2):
        trainer.load(Policy(), seed=number)
        for name, parameter in trainer.adapter_parameters():
            if ".lora_B." in name:
                parameter.detach().to_local().normal_(std=0.1)  # type: ignore[attr-defined]
        trainer.save(folder / str(number))
        made.append(publish(folder / str(number), Storage(str(folder)), f"published/{number}", number, "adapter"))
    return made


def scoring_engine() -> type[EngineActor]:
    """An engine that is handed candidates directly; a local class, so that Ray ships it whole."""

    class ScoringEngine(EngineActor):
        def likelihoods(self, jobs: list[Job], with_prompt: bool) -> list[Likelihoods]:
            prompts, candidates = [prompt for prompt, _ in jobs], [sides for _, sides in jobs]
            assert self._generator is not None
            return self._generator.score(prompts, candidates, with_prompt=with_prompt)

    return ScoringEngine


@pytest.fixture(scope="module", params=["adapter", "merged"])
def engine(request: pytest.FixtureRequest, ray_8_cpus: None, model: Path) -> Iterator[Any]:
    engines = Engines(
        shared=1, cpus=0.5, dtype="float32", refresh=request.param,
        # Less than all candidates together, so that they are prefilled in turns.
        args={"max_model_len": 64, "max_num_seqs": 16, "max_num_batched_tokens": 128},
    )  # fmt: skip
    spec = EngineSpec(RunModel(str(model)), engines, LORA, "cpu", seed=0)
    actor = ray.remote(num_cpus=0.5)(scoring_engine()).remote(spec)
    yield actor
    ray.kill(actor)


def jobs(lengths: Sequence[Sequence[int]], seed: int = 0) -> list[Job]:
    """A prompt for each list of candidates' lengths; the prompts grow from a single token."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, WORDS) for _ in range(count)]

    return [(tokens(1 + 4 * number), [tokens(length) for length in sides]) for number, sides in enumerate(lengths)]


LABELS = [(0, 7, 11), (5, 0), (20, 21, 22, 23, 24, 25), (9, 9)]
"""As many questions with labels for candidates, of which token 0 is one as good as any other."""


def labels() -> list[Job]:
    prompts = [prompt for prompt, _ in jobs([[1]] * len(LABELS), seed=1)]
    return [(prompt, [[token] for token in own]) for prompt, own in zip(prompts, LABELS, strict=True)]


def texts() -> list[Job]:
    return jobs([(1, 2), (3, 1, 4), (6, 5, 2, 1), (2, 2)])


def said(engine: Any, jobs: list[Job], with_prompt: bool = False) -> list[Likelihoods]:
    found: list[Likelihoods] = ray.get(engine.likelihoods.remote(jobs, with_prompt))
    return found


def trained(trainer: PolicyModel, asked: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """What the trainer makes of prompts and their completions, all in one batch."""
    with torch.no_grad():
        return trainer.logps(pack([tree(prompt, side) for prompt, side in asked]))


def logps(found: Sequence[Likelihoods]) -> torch.Tensor:
    return torch.tensor([logp for one in found for logp in one.logps])


def largest(what: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of some log-probabilities in nats, which is printed too."""
    difference = float((found - expected).abs().max())
    print(f"{what}: {len(found)} log-probabilities, largest difference {difference:.1e} nats")
    return difference


def sequences(jobs: Sequence[Job]) -> list[tuple[list[int], list[int]]]:
    return [(prompt, side) for prompt, sides in jobs for side in sides]


def test_every_policy_is_scored_as_it_is_trained(engine: Any, trainer: PolicyModel, policies: list[Policy]) -> None:
    """Labels and texts in one list, each by its own way; and the base again, when adapters have come and gone."""
    mixed = [job for both in zip(labels(), texts(), strict=True) for job in both]
    before = torch.zeros(len(sequences(mixed)))
    for policy in [*policies, policies[0]]:
        ray.get(engine.load.remote(policy))
        trainer.load(policy, 0)
        found = said(engine, mixed)
        assert largest(policy.name, logps(found), trained(trainer, sequences(mixed))) <= TOLERANCE
        assert {one.prompt_logp for one in found} == {None}
        assert (logps(found) - before).abs().mean() > 100 * TOLERANCE  # so that no policy was taken for another
        before = logps(found)


def test_a_prompt_is_scored_with_its_candidates(engine: Any, trainer: PolicyModel, policies: list[Policy]) -> None:
    """And labels have the same log-probability by either way."""
    ray.get(engine.load.remote(policies[1]))
    trainer.load(policies[1], 0)
    both = labels() + texts()
    found = said(engine, both, with_prompt=True)
    assert largest("candidates", logps(found), trained(trainer, sequences(both))) <= TOLERANCE
    prompts = torch.tensor([one.prompt_logp for one in found])
    # The first prompt of either kind is a single token, whose log-probability nothing says.
    assert prompts[0] == prompts[len(LABELS)] == 0.0
    longer = [number for number, (prompt, _) in enumerate(both) if len(prompt) > 1]
    expected = trained(trainer, [(both[number][0][:1], both[number][0][1:]) for number in longer])
    assert largest("prompts", prompts[longer], expected) <= TOLERANCE
    by_prompt, by_label = logps(found[: len(LABELS)]), logps(said(engine, labels()))
    assert largest("labels, both ways", by_label, by_prompt) <= TOLERANCE


def test_what_was_scored_before_is_scored_the_same_again(engine: Any, policies: list[Policy]) -> None:
    """Whatever the engine has cached of it."""
    ray.get(engine.load.remote(policies[2]))
    both = labels() + texts()
    first, again = said(engine, both), said(engine, both[::-1])[::-1]
    assert largest("again", logps(again), logps(first)) <= TOLERANCE


def test_more_labels_than_one_request_tells_of(engine: Any, trainer: PolicyModel, policies: list[Policy]) -> None:
    ray.get(engine.load.remote(policies[1]))
    trainer.load(policies[1], 0)
    for count in (MOST_LABELS, MOST_LABELS + 1):
        many = [([4, 5, 6], [[token] for token in range(count)])]
        assert largest("many", logps(said(engine, many)), trained(trainer, sequences(many))) <= TOLERANCE


def test_no_candidates_have_no_scores(engine: Any) -> None:
    assert said(engine, []) == said(engine, [], with_prompt=True) == []
