"""The training core on one GPU: the flash kernel, sharded loading, activation checkpointing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from factories import tiny_model, token_pair
from transformers import AutoModelForCausalLM

from calm_ray.core.sections import Lora, Train
from calm_ray.packing.batch import pack
from calm_ray.run.policies import Policy
from calm_ray.testing import word_tokenizer, write_tiny_model
from calm_ray.training.model import PolicyModel
from calm_ray.training.trees import Tree, tree_of_pair

pytestmark = pytest.mark.gpu(1)


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    torch.cuda.reset_peak_memory_stats()
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), width=256, layers=4, key_value_heads=2)


def load_policy(folder: Path, **changes: Any) -> PolicyModel:
    settings = {"learning_rate": 1e-3, "warmup_ratio": 0.0, "lora": Lora(targets=["q_proj", "v_proj"]), **changes}
    policy_model = PolicyModel(folder, Train(**settings), torch.device("cuda"))
    policy_model.load(Policy(), 0)
    return policy_model


def examples(count: int) -> list[Tree]:
    rng = random.Random(0)
    return [tree_of_pair(token_pair(number, rng)) for number in range(count)]


def gradients(policy_model: PolicyModel, rows: list[Tree]) -> tuple[torch.Tensor, torch.Tensor]:
    logps = policy_model.logps(pack(rows).to(policy_model.device))
    logps.sum().backward()
    parts = [p.grad.full_tensor().flatten() for _, p in policy_model.adapter_parameters() if p.grad is not None]  # type: ignore[attr-defined]
    return logps.detach().cpu(), torch.cat(parts).cpu()


def test_packed_flash_attention_matches_eager_attention(model: Path) -> None:
    rows = examples(8)
    logps, _ = gradients(load_policy(model, attention="varlen"), rows)
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    reference.to(torch.device("cuda"))
    expected = []
    for prompt, side in ((row.prompt, branch.tokens) for row in rows for branch in row.branches):
        with torch.no_grad():
            found = reference(torch.tensor([prompt + side]).cuda()).logits[0].log_softmax(-1)
        expected.append(sum(float(found[len(prompt) - 1 + i, token]) for i, token in enumerate(side)))
    torch.testing.assert_close(logps, torch.tensor(expected), rtol=2e-2, atol=0.2)  # bfloat16 vs. float32


def test_flash_and_masked_attention_give_the_same_gradients(model: Path) -> None:
    _, flash = gradients(load_policy(model, attention="varlen"), examples(8))
    _, masked = gradients(load_policy(model, attention="sdpa"), examples(8))
    assert torch.nn.functional.cosine_similarity(flash, masked, dim=0) > 0.999


def test_loading_needs_little_more_memory_than_the_model(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "large", word_tokenizer(["w"]), width=1024, layers=12, key_value_heads=32)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    load_policy(folder, dtype="float32")
    assert torch.cuda.max_memory_allocated() < 1.25 * size


def test_activation_checkpointing_only_reduces_memory(model: Path) -> None:
    rows = examples(128)
    found = []
    for checkpointing in (False, True):
        policy_model = load_policy(model, activation_checkpointing=checkpointing, dtype="float32", attention="sdpa")
        torch.cuda.reset_peak_memory_stats()
        found.append((*gradients(policy_model, rows), torch.cuda.max_memory_allocated()))
        del policy_model
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)
    assert found[1][2] < 0.8 * found[0][2]
