"""Memory of engines and training workers, compared with sums by hand and with what torch keeps."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from calm_ray.cluster.machines import DEVICES, GB, GIB
from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.core.sections import Lora, Train
from calm_ray.demo import pretraining
from calm_ray.packing import attention
from calm_ray.planning.memory import (
    CUDA_ALLOWANCE,
    engine_memory,
    host_memory,
    kept_per_token,
    pack_tokens,
    worker_memory,
)
from calm_ray.planning.model_shape import DEMO_SHAPES, Shape, shape_of, shape_of_config, shape_of_folder, shape_of_name
from calm_ray.recipes.load import load_config

LLAMA3_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip
A100 = DEVICES["A100-80"]
PARAMETERS = 8_030_261_248
"""Llama 3 8B: its files on the Hub hold 16,060,522,496 bytes of bfloat16."""


@pytest.fixture
def llama(tmp_path: Path) -> Shape:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B))
    return shape_of_config(tmp_path / "config.json")


def recipe(*overrides: str) -> Config:
    return load_config("llama3_8b", list(overrides))


def test_llama_3_8b_has_its_published_size(llama: Shape) -> None:
    assert llama.parameters == PARAMETERS
    assert 2 * llama.kv_values == 128 * 1024  # bytes per token in bfloat16
    assert llama.root_parameters == 2 * 128256 * 4096 + 4096
    assert llama.lora_parameters(Lora(r=8, targets=["q_proj", "v_proj"])) == 32 * 8 * (2 * 4096 + 4096 + 1024)


def test_kv_cache_fills_what_weights_and_activations_leave(llama: Shape) -> None:
    engine = engine_memory(recipe(), llama, 80 * GB, A100)  # gpu_memory_utilization: 0.9, max_model_len: 2048
    assert engine.weights == 2 * PARAMETERS
    batch = 8192 * 2 * (2 * 4096 + 3 * 14336)  # tokens, bytes, residual stream and the MLP
    assert engine.activations == batch + 256 * 128256 * 20
    assert engine.kv_cache == int(0.9 * 80 * GB) - engine.weights - engine.activations - CUDA_ALLOWANCE
    assert engine.cached_tokens == engine.kv_cache // (128 * 1024)
    assert engine.full_sequences == pytest.approx(engine.cached_tokens / 2048)


def test_tensor_parallel_gpus_share_an_engine(llama: Shape) -> None:
    one, two = (engine_memory(recipe(f"engines.tensor_parallel_size={n}"), llama, 80 * GB, A100) for n in (1, 2))
    assert two.weights == PARAMETERS
    assert two.kv_per_token == one.kv_per_token
    assert two.cached_tokens == two.kv_cache // (64 * 1024)  # each GPU keeps half of the heads
    sixteen = engine_memory(recipe("engines.tensor_parallel_size=16"), llama, 80 * GB, A100)
    assert sixteen.cached_tokens == sixteen.kv_cache // (16 * 1024)  # eight heads, each on two GPUs


def test_vllm_arguments_change_the_cache(llama: Shape) -> None:
    plain = engine_memory(recipe("engines.args={}"), llama, 80 * GB, A100)
    assert plain.limit == int(0.92 * 80 * GB)  # vLLM's default
    assert plain.context == 8192
    small = engine_memory(recipe("engines.args={kv_cache_dtype: fp8}"), llama, 80 * GB, A100)
    assert small.cached_tokens == pytest.approx(2 * plain.cached_tokens, abs=1)
    given = engine_memory(recipe(f"engines.args={{kv_cache_memory_bytes: {GIB}}}"), llama, 80 * GB, A100)
    assert given.cached_tokens == 8192
    h100 = engine_memory(recipe(), llama, 80 * GB, DEVICES["H100"])
    assert h100.max_sequences == 1024


@pytest.mark.parametrize("value", ["0.5", "0", "-3", "many", "true", "2048.0", "1.0e+30"])
@pytest.mark.parametrize("name", ["max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"])
def test_vllm_counts_must_be_positive_integers(llama: Shape, name: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"engines\.args\.{name}: must be a positive integer \(got"):
        engine_memory(recipe(f"engines.args.{name}={value}"), llama, 80 * GB, A100)


@pytest.mark.parametrize("value", ["0", "1.5", "-0.1", "most", "true"])
def test_gpu_memory_utilization_must_be_a_fraction(llama: Shape, value: str) -> None:
    with pytest.raises(InputError, match=r"engines\.args\.gpu_memory_utilization: must be above 0 and at most 1"):
        engine_memory(recipe(f"engines.args.gpu_memory_utilization={value}"), llama, 80 * GB, A100)


def test_lora_keeps_frozen_weights_and_a_small_optimizer(llama: Shape) -> None:
    worker = worker_memory(recipe(), llama, workers=8)
    assert worker.weights == 2 * PARAMETERS // 8
    assert worker.optimizer == 16 * 3_407_872 // 8  # adapter, gradient and two moments in float32
    layer = (PARAMETERS - llama.root_parameters) // 32
    assert worker.gathered == 2 * (llama.root_parameters + 2 * layer)
    assert worker.tokens == 4096
    kept = 4096 * (32 * 4096 * 2)  # with checkpointing, each layer's input
    assert worker.activations == kept + 2 * 4096 * kept_per_token(recipe().train, llama)


def test_full_fine_tuning_takes_sixteen_bytes_per_parameter(llama: Shape) -> None:
    full = recipe("train.lora=null", "engines.refresh=merged")
    eight, four = (worker_memory(full, llama, workers) for workers in (8, 4))
    assert eight.weights + eight.optimizer == 16 * PARAMETERS // 8
    assert four.weights + four.optimizer == 2 * (eight.weights + eight.optimizer)
    hybrid = worker_memory(recipe("train.lora=null", "engines.refresh=merged", "train.shards=4"), llama, 8)
    assert hybrid == four


def test_pair_may_be_larger_than_a_pack(llama: Shape) -> None:
    assert pack_tokens(recipe("engines.args.max_model_len=8192"), llama) == 2 * 4096  # train.max_pair_tokens
    assert pack_tokens(recipe("engines.args.max_model_len=8192", "method=sft"), llama) == 4096
    assert pack_tokens(recipe("engines.args.max_model_len=1024"), llama) == 4096


def test_sleeping_engines_keep_their_weights_in_host_memory(llama: Shape) -> None:
    def host(*overrides: str) -> int:
        config = recipe(*overrides)
        engine = engine_memory(config, llama, 80 * GB, A100)
        return host_memory(config, llama, engine, worker_memory(config, llama, 8)).engine

    assert host("placement=colocate", "train.workers=6") - host() == 2 * PARAMETERS


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("lora", [None, Lora(), Lora(r=16, targets=["q_proj", "k_proj", "o_proj", "up_proj"])])
def test_memory_kept_per_layer_matches_torch(lora: Lora | None, dtype: Any) -> None:
    train = Train(learning_rate=1e-3, warmup_ratio=0.0, lora=lora, dtype=dtype)
    measured = (measure_kept(train, layers=3) - measure_kept(train, layers=1)) / 2
    shape = Shape(128, 1, 448, 4, 2, 32, 256, False, 512, 0, "")
    assert kept_per_token(train, shape) == pytest.approx(measured, rel=0.01)


def measure_kept(train: Train, layers: int, tokens: int = 64) -> float:
    """Bytes per token that a small Llama keeps for the backward pass, excluding weights."""
    attention.register()
    config = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=256, hidden_size=128, intermediate_size=448, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention.VARLEN,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(getattr(torch, train.dtype))
    decoder = model.model
    if train.lora is not None:
        get_peft_model(model, LoraConfig(r=train.lora.r, target_modules=list(train.lora.targets), lora_dropout=0.0))
    of_model = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in of_model:
            kept[pointer] = tensor
        return tensor

    boundaries = torch.tensor([0, tokens], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(
            input_ids=torch.zeros(1, tokens, dtype=torch.long), position_ids=torch.arange(tokens)[None],
            cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=tokens, max_length_k=tokens,
            use_cache=False,
        )  # fmt: skip
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens


def test_model_files_give_parameters_and_tied_embeddings(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    shape = shape_of_folder(tmp_path)
    assert shape.tied
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    (tmp_path / "model.safetensors").unlink()
    assert shape_of_folder(tmp_path).parameters == shape.parameters  # from config.json alone


def test_every_expert_counts(tmp_path: Path, llama: Shape) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA3_8B, "num_local_experts": 8}))
    more = shape_of_folder(tmp_path).parameters - llama.parameters
    assert more == 7 * 32 * 3 * 4096 * 14336


def test_demo_has_the_shape_it_is_pretrained_with() -> None:
    made = (pretraining.WIDTH, pretraining.MLP, pretraining.LAYERS, pretraining.HEADS)
    assert made == (
        DEMO_SHAPES["world"].hidden,
        DEMO_SHAPES["world"].intermediate,
        DEMO_SHAPES["world"].layers,
        DEMO_SHAPES["world"].heads,
    )
    assert shape_of("world") == DEMO_SHAPES["world"]


@pytest.mark.parametrize(
    ("name", "size", "hidden"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8e9, 4096),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7e9, 4096),
        ("Qwen/Qwen2.5-14B", 14e9, 5120),
        ("/shared/models/gemma-3-12b-pt", 12e9, 5120),
        ("Qwen/Qwen2.5-0.5B", 0.5e9, 896),
        ("HuggingFaceTB/SmolLM2-360M", 0.36e9, 896),
        ("mistralai/Mixtral-8x7B-v0.1", 56e9, 8192),
    ],
)
def test_model_name_implies_its_size(name: str, size: float, hidden: int) -> None:
    shape = shape_of_name(name)
    assert (shape.parameters, shape.hidden, shape.is_assumed) == (size, hidden, True)


def test_models_of_unknown_size_are_rejected() -> None:
    with pytest.raises(InputError, match=r"unknown size of openai/gpt.*--model-config"):
        shape_of("openai/gpt")


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", None), ("hidden_size", "big"), ("vocab_size", 0), ("head_dim", True)]
)
def test_bad_model_configs_are_reported(tmp_path: Path, field: str, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA3_8B, field: value}))
    with pytest.raises(InputError, match=f"{field}: must be a positive integer"):
        shape_of_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 7) + b'{"a":1}'],
)
def test_bad_model_files_are_rejected_without_reading_them_whole(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        shape_of_folder(tmp_path)


def test_index_may_not_name_files_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert shape_of_folder(tmp_path).parameters > 0  # counted from config.json; nothing outside was opened
