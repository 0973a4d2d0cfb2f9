"""A model of the public hub in vLLM: the engine gives the trainer's log-probabilities under every policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist
from factories import tree
from small_runs import random_adapters, scoring_engine

pytest.importorskip("babel", reason="needs the extra atlas")

from transformers import AutoTokenizer

from calm_ray.core.sections import Engines, Lora, Train
from calm_ray.demo.atlas.questions import build_atlas
from calm_ray.engines.spec import EngineSpec
from calm_ray.packing.batch import pack
from calm_ray.prompts.candidates import CandidateForm, as_choices
from calm_ray.run.policies import Policy, RunModel
from calm_ray.training.model import PolicyModel

LORA = Lora(r=16, alpha=32, targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
EXACT, ROUNDED = 5e-3, 0.6
"""Largest differences of a candidate's log-probability, in nats: with adapters in float32, and where an adapter was
merged into bfloat16 weights."""


@pytest.fixture(scope="module")
def trainer(atlas_folder: Path) -> Iterator[PolicyModel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train = Train(learning_rate=1e-3, warmup_ratio=0.0, dtype="float32", lora=LORA)
    yield PolicyModel(atlas_folder, train, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def policies(trainer: PolicyModel, tmp_path_factory: pytest.TempPathFactory) -> list[Policy]:
    return random_adapters(trainer, tmp_path_factory.mktemp("policies"), std=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("refresh", ["adapter", "merged"])
def test_engine_matches_the_trainer_while_policies_change(
    ray_8_cpus: None, atlas_folder: Path, trainer: PolicyModel, policies: list[Policy], refresh: str
) -> None:
    engines = Engines(shared=1, cpus=0.5, dtype="float32", refresh=refresh, args={"max_model_len": 128})  # type: ignore[arg-type]
    spec = EngineSpec(RunModel(str(atlas_folder)), engines, LORA, "cpu", seed=0)
    engine = ray.remote(num_cpus=0.5)(scoring_engine()).remote(spec)
    tokenizer = AutoTokenizer.from_pretrained(atlas_folder)
    rows = [CandidateForm(as_choices).of(row, tokenizer) for row in build_atlas(0, ["en", "fr", "es"]).align[:6]]
    jobs = [(row["prompt_token_ids"], row["token_ids"]) for row in rows]
    sequences = [tree(prompt, side) for prompt, sides in jobs for side in sides]
    before = torch.zeros(len(sequences))
    for policy in [*policies, policies[0]]:
        ray.get(engine.load.remote(policy))
        trainer.load(policy, 0)
        with torch.no_grad():
            expected = trainer.logps(pack(sequences))
        found = torch.tensor([logp for one in ray.get(engine.likelihoods.remote(jobs, False)) for logp in one.logps])
        difference = (found - expected).abs().max()
        print(f"{refresh}, {policy.name}: largest difference {difference:.1e} nats")
        assert difference < (ROUNDED if refresh == "merged" and policy.kind == "adapter" else EXACT)
        assert (found - before).abs().mean() > 1.0
        before = found
    ray.kill(engine)
