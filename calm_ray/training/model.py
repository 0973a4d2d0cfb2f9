"""The policy being trained: a causal language model, LoRA or full weights, sharded over the workers with FSDP2.

No process ever holds the whole model: it is built on the meta device and sharded, then every worker reads its own
slices from the safetensors files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_slices
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl.trainer import add_fused_lm_head, disable_dropout_in_model

from calm_ray.core.errors import InputError
from calm_ray.core.sections import Lora, Train
from calm_ray.core.seeds import derive_seed
from calm_ray.packing import attention
from calm_ray.packing.batch import PackedBatch, Row, pack, packed_tokens
from calm_ray.run.policies import Policy

SHARD_BYTES = 4 << 30
"""Size of a saved weights file, and so the most the saving worker holds at a time."""


class PolicyModel:
    """A sharded model that scores packed batches and can be loaded, saved, and (LoRA) run without its adapter."""

    def __init__(self, folder: Path, train: Train, device: torch.device) -> None:
        attention.register()
        self.device = device
        self._folder = folder
        self._loaded: Path | None = None
        self._lora = train.lora
        self._varlen = train.attention in (attention.VARLEN, "flash_attention_2")
        dtype = getattr(torch, train.dtype) if train.lora is not None else torch.float32
        base = empty_model(folder, train, dtype)
        on_cpu = train.attention == attention.VARLEN and device.type == "cpu"
        self._shares_prompts = on_cpu and attention.keeps_branches_apart(base.config)
        add_fused_lm_head(base)
        disable_dropout_in_model(base)
        layers = decoder_layers(base)
        self.model: nn.Module = base if train.lora is None else get_peft_model(base, lora_config(train.lora, folder))
        mixed = MixedPrecisionPolicy()
        if train.lora is None and train.dtype == "bfloat16":
            mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = build_mesh(device.type, train.shards)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=mixed)
        fully_shard(self.model, mesh=mesh, mp_policy=mixed)
        _allocate(self.model, device)

    def load(self, policy: Policy, seed: int) -> None:
        """Loads a policy's weights. With LoRA, `base` is the model with a fresh adapter drawn from `seed`."""
        self._reshard()
        weights = policy.local_folder() if policy.kind == "weights" else self._folder
        if self._lora is None or self._loaded != weights:
            _load_weights(self._base_weights(), weights)
            self._loaded = weights
        if self._lora is None:
            return
        adapter = _read_adapter(policy.local_folder()) if policy.kind == "adapter" else None
        for name, parameter in self.adapter_parameters():
            full = adapter[name] if adapter is not None else fresh_lora(name, parameter.shape, seed)
            _assign(parameter, full)

    def pack(self, rows: Sequence[Row]) -> PackedBatch:
        """Packs rows on the model's device, with prompts once where its attention allows it."""
        return pack(rows, share_prompts=self._shares_prompts).to(self.device)

    def tokens(self, row: Row) -> int:
        """Number of tokens that `pack` lays out for a row."""
        return packed_tokens(row, share_prompts=self._shares_prompts)

    def logps(self, batch: PackedBatch) -> Tensor:
        """Summed log-probability of each branch, [N] float32, in nats."""
        output = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            shift_labels=batch.labels,
            fused_lm_head=True,
            **(attention.arguments(batch) if self._varlen else {}),
        )
        sums = torch.zeros(len(batch.completion_lengths), dtype=torch.float32, device=self.device)
        return sums.index_add(0, batch.sequence_ids, output.log_probs[0].float())

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Disables the adapter, leaving the untrained model (LoRA only)."""
        context = self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()
        with context:
            yield

    def trainable(self) -> list[nn.Parameter]:
        return list(self.named_trainable().values())

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters, sharded, by their names in the model."""
        self._reshard()
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def save(self, folder: Path) -> None:
        """Writes the adapter in PEFT's format, or all weights in Hugging Face's. Collective: call on all ranks."""
        self._reshard()
        is_writer = dist.get_rank() == 0
        if self._lora is not None:
            state = {name: _gather(parameter).cpu() for name, parameter in self.adapter_parameters()}
            if is_writer:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
                assert isinstance(self.model, PeftModel)
                self.model.peft_config["default"].save_pretrained(str(folder))
                _sort_targets(folder / "adapter_config.json")
            return
        _save_weights(self.model, self._folder, folder, is_writer)

    def adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The adapter's parameters, by their names in PEFT's files."""
        return [(name.replace(".default.", "."), p) for name, p in self.model.named_parameters() if ".lora_" in name]

    def _reshard(self) -> None:
        """Reshards the parameters, since FSDP leaves the root's own ones gathered after a forward pass.

        Writes to gathered parameters are lost, and an optimizer over them trains nothing.
        """
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()

    def _base_weights(self) -> dict[str, Tensor]:
        """The weights stored in the model's own files, by their names there."""
        return {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter.detach()
            for name, parameter in self.model.named_parameters()
            if ".lora_" not in name
        }


def build_mesh(device_type: str, shards: int | None) -> DeviceMesh:
    """One copy of the model over all workers or, with `shards`, workers / shards copies (hybrid sharding)."""
    world = dist.get_world_size()
    if shards is None or shards == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world // shards, shards), mesh_dim_names=("copy", "shard"))


def empty_model(folder: Path, train: Train, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `folder` with its weights on the meta device; its buffers, which are computed, are real."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=train.attention)
    model.tie_weights()  # building on the meta device unties tied weights
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers to shard one by one. Raises InputError if the model does not declare them."""
    kinds = set(model._no_split_modules or [])
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise InputError(f"model: {type(model).__name__} does not declare its layers, so it cannot be sharded")
    return layers


def lora_config(lora: Lora, folder: Path) -> LoraConfig:
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(folder),
    )


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Allocates the sharded parameters on `device`; the buffers keep their computed values."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def _load_weights(state: dict[str, Tensor], folder: Path) -> None:
    """Reads this worker's slices of the weights from the safetensors files in `folder`."""
    require_weights(state.keys(), folder)
    load_slices(dict(state), storage_reader=HuggingFaceStorageReader(str(folder)))


def require_weights(names: Set[str], folder: Path) -> None:
    """Raises InputError unless the safetensors files in `folder` hold all weights of these names."""
    present: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            present.update(tensors.keys())
    if missing := sorted(names - present):
        raise InputError(
            f"model: the safetensors files in {folder} lack {len(missing)} weights, e.g. {missing[0]}; if only their "
            "names differ, load the model with transformers and save it again"
        )


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def fresh_lora(name: str, shape: torch.Size, seed: int) -> Tensor:
    """PEFT's initial LoRA weights (A uniform, B zero), the same for any number of workers."""
    full = torch.zeros(shape)
    if ".lora_A." in name:
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
    return full


def _assign(parameter: nn.Parameter, full: Tensor) -> None:
    with torch.no_grad():
        value: Tensor = full.to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def _gather(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def _sort_targets(file: Path) -> None:
    """Sorts the target modules, which PEFT writes in set order, so that identical adapters have identical hashes."""
    config = json.loads(file.read_text("utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _save_weights(model: nn.Module, source: Path, folder: Path, is_writer: bool) -> None:
    """Gathers and writes the full weights file by file, alongside the source model's config and tokenizer."""
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(
                (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")
            ):
                (folder / file.name).write_bytes(file.read_bytes())
    part: dict[str, Tensor] = {}
    size = 0
    index: dict[str, str] = {}

    def flush() -> None:
        nonlocal part, size
        if part and is_writer:
            file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(part, file))
        part, size = {}, 0

    for name, parameter in model.named_parameters():
        full = _gather(parameter.detach()).to(torch.bfloat16 if _is_half(source) else parameter.dtype)
        size += full.nbytes
        if is_writer:
            part[name] = full.cpu()
        if size >= SHARD_BYTES:
            flush()
    flush()
    if is_writer:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index}, indent=1)
        )


def _is_half(folder: Path) -> bool:
    """Whether the model's files are in half precision, and trained weights should be too."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            name = next(iter(tensors.keys()))
            return str(tensors.get_slice(name).get_dtype()) in ("BF16", "F16")
    return False
