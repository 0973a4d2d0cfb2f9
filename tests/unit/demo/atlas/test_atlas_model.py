"""A model of the public hub in the trainer and in files: chat template, tied embeddings, grouped heads, adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("babel", reason="needs the extra atlas")

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from calm_ray.core.errors import InputError
from calm_ray.core.sections import Lora, Train
from calm_ray.demo.atlas import model as atlas_model_module
from calm_ray.demo.atlas.model import atlas_model
from calm_ray.demo.atlas.questions import build_atlas
from calm_ray.packing.batch import Branch, pack
from calm_ray.prompts.candidates import CandidateForm, as_choices
from calm_ray.prompts.rendering import encode_prompt
from calm_ray.run.merging import merge
from calm_ray.run.policies import Policy
from calm_ray.training.model import PolicyModel
from calm_ray.training.trees import Tree

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 2e-3
"""Nats, for a sum over a candidate's tokens in float32."""


@pytest.fixture(scope="module")
def trainer(atlas_folder: Path) -> Iterator[PolicyModel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    lora = Lora(r=16, alpha=32, targets=TARGETS)
    model = PolicyModel(atlas_folder, Train(learning_rate=1e-3, warmup_ratio=0.0, dtype="float32", lora=lora), CPU)
    model.load(Policy(), 0)
    yield model
    dist.destroy_process_group()


CPU = torch.device("cpu")


def trees(folder: Path, chat: bool) -> list[Tree]:
    """Questions in several languages, with their candidates as branches."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    form = CandidateForm(as_choices, chat)
    rows = build_atlas(0, ["en", "fr", "de"]).align[:3]
    found = [form.of(row, tokenizer) for row in rows]
    return [
        Tree(row["question_id"], row["language"], 0, row["prompt_token_ids"], tuple(map(Branch, row["token_ids"])))
        for row in found
    ]


def alone(model: torch.nn.Module, rows: list[Tree]) -> torch.Tensor:
    """Log-probabilities of all branches from plain transformers, one sequence at a time."""
    found = []
    for prompt, side in ((row.prompt, branch.tokens) for row in rows for branch in row.branches):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + side])).logits[0].float().log_softmax(-1)
        found.append(sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(side)))
    return torch.tensor(found)


@pytest.mark.parametrize("chat", [False, True])
def test_packed_logps_match_single_sequences(atlas_folder: Path, trainer: PolicyModel, chat: bool) -> None:
    rows = trees(atlas_folder, chat)
    plain = AutoModelForCausalLM.from_pretrained(atlas_folder, dtype=torch.float32)
    trainer.load(Policy(), 0)
    with torch.no_grad():
        packed = trainer.logps(pack(rows))
    difference = (packed - alone(plain, rows)).abs().max()
    print(f"largest difference {difference:.1e} nats")
    assert difference < TOLERANCE


def test_prompts_use_the_chat_template(atlas_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(atlas_folder)
    prompt = str(tokenizer.decode(encode_prompt(tokenizer, "Hello?")))
    assert prompt.endswith("<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.count("<|im_start|>system") == 1


def test_the_model_is_small_llama_with_tied_embeddings_and_grouped_heads(atlas_folder: Path) -> None:
    config = json.loads((atlas_folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert config["tie_word_embeddings"] is True
    model = AutoModelForCausalLM.from_pretrained(atlas_folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_merged_weights_answer_like_the_adapter(atlas_folder: Path, trainer: PolicyModel, tmp_path: Path) -> None:
    rows = trees(atlas_folder, chat=False)
    trainer.load(Policy(), 1)
    for name, parameter in trainer.adapter_parameters():
        if ".lora_B." in name:
            parameter.detach().to_local().normal_(std=0.02)  # type: ignore[attr-defined]
    with torch.no_grad():
        trained = trainer.logps(pack(rows))
    trainer.save(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(atlas_folder, dtype=torch.float32)
    untrained = alone(base, rows)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert (trained - alone(adapted, rows)).abs().max() < TOLERANCE
    assert (trained - untrained).abs().mean() > 0.5
    merge(atlas_folder, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings
    difference = (trained - alone(merged.float(), rows)).abs()
    print(f"merged into bfloat16: mean difference {difference.mean():.1e}, largest {difference.max():.1e} nats")
    assert difference.mean() < 0.1  # rounding to bfloat16


def test_damaged_file_of_the_package_is_refused(monkeypatch: pytest.MonkeyPatch, atlas_folder: Path) -> None:
    monkeypatch.setattr(atlas_model_module, "SHA256", "0" * 64)
    with pytest.raises(InputError, match=r"is damaged \(SHA-256 b179c952"):
        atlas_model()


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path))
    monkeypatch.setattr(atlas_model_module, "PACKAGE", "llm_no_such_package")
    with pytest.raises(InputError, match=r"the atlas is not installed: python -m pip install"):
        atlas_model()


def test_damaged_cache_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, atlas_folder: Path) -> None:
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path))
    folder, sha256 = atlas_model()
    assert atlas_model() == (folder, sha256)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert atlas_model() == (folder, sha256)
    assert len(weights.read_bytes()) == (atlas_folder / "model.safetensors").stat().st_size
