"""The dimensions of a model, read from config.json and safetensors headers without torch or transformers."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calm_ray.core.errors import InputError
from calm_ray.core.safety import local_path
from calm_ray.core.sections import ATLAS, WORLD, Lora

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
ASSUMED_CONTEXT = 8192
"""Tokens; for models whose config does not give it."""


@dataclass(frozen=True)
class Shape:
    """A Llama-style decoder: grouped-query attention, a gated MLP, optionally tied embeddings."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    context: int
    """Maximum positions, in tokens."""
    parameters: int
    source: str
    """Where these numbers come from."""
    is_assumed: bool = False

    @property
    def root_parameters(self) -> int:
        """Parameters outside the layers: embeddings, untied head, final norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def layer_parameters(self) -> int:
        """Average parameters of a layer."""
        return max(0, self.parameters - self.root_parameters) // self.layers

    @property
    def kv_values(self) -> int:
        """Values in the KV cache per token: keys and values of every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def widths(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear layers of a block, by LoRA target name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q), "k_proj": (self.hidden, kv), "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden), "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden),
        }  # fmt: skip

    def lora_parameters(self, lora: Lora) -> int:
        """r (in + out) per target (Hu et al. 2021, section 4.1). Ignores targets with other names."""
        widths = self.widths()
        return self.layers * sum(lora.r * sum(widths[name]) for name in set(lora.targets) & widths.keys())


def _with_parameters(shape: Shape) -> Shape:
    """The same shape with its parameters counted: linear layers without biases, two norms per layer."""
    layer = sum(a * b for a, b in shape.widths().values()) + 2 * shape.hidden
    return replace(shape, parameters=shape.layers * layer + shape.root_parameters)


def _known_shape(name: str, *numbers: int, tied: bool) -> Shape:
    hidden, layers, intermediate, heads, kv_heads, vocabulary = numbers
    return _with_parameters(
        Shape(
            hidden, layers, intermediate, heads, kv_heads, hidden // heads, vocabulary, tied, ASSUMED_CONTEXT, 0, name,
            is_assumed=True,
        )
    )  # fmt: skip


# From the config.json files of these models on the Hugging Face Hub.
KNOWN = [
    _known_shape("Qwen2.5 0.5B", 896, 24, 4864, 14, 2, 151936, tied=True),
    _known_shape("Llama 3.2 1B", 2048, 16, 8192, 32, 8, 128256, tied=True),
    _known_shape("Llama 3.2 3B", 3072, 28, 8192, 24, 8, 128256, tied=True),
    _known_shape("Llama 3 8B", 4096, 32, 14336, 32, 8, 128256, tied=False),
    _known_shape("Qwen2.5 14B", 5120, 48, 13824, 40, 8, 152064, tied=False),
    _known_shape("Qwen2.5 32B", 5120, 64, 27648, 40, 8, 152064, tied=False),
    _known_shape("Llama 3 70B", 8192, 80, 28672, 64, 8, 128256, tied=False),
]
DEMO_SHAPES = {
    WORLD: replace(_known_shape("the demo model", 128, 4, 384, 4, 4, 960, tied=True), context=256, is_assumed=False),
    ATLAS: replace(_known_shape("SmolLM2-135M", 576, 30, 1536, 9, 3, 49152, tied=True), context=8192, is_assumed=False),
}
"""Models of `calm_ray.demo`. The world's vocabulary varies slightly with its seed."""
_SIZE = re.compile(r"(?:^|[-_ ./])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?=$|[-_ ./])", re.IGNORECASE)


ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
}
"""Other names of config fields in transformers."""


def shape_of(model: str, config_file: str | Path | None = None) -> Shape:
    """Shape of a run's model: from its folder, from the local Hugging Face cache, or guessed from its name.

    `config_file`, a config.json, takes precedence. Raises InputError if the size cannot be determined.
    """
    if config_file is not None:
        return shape_of_config(local_path(str(config_file), "model-config"))
    if model in DEMO_SHAPES:
        return DEMO_SHAPES[model]
    folder = local_path(model, "model")
    if folder.is_dir():
        return shape_of_folder(folder)
    if (cached := _cached(model)) is not None:
        return shape_of_folder(cached)
    return shape_of_name(model)


def shape_of_folder(folder: Path) -> Shape:
    """Shape of a model folder, from its config.json and, if present, its weights."""
    parameters, names = _weights_in(folder)
    tied = not any(name.endswith("lm_head.weight") for name in names) if names else None
    shape = shape_of_config(folder / "config.json", tied)
    if parameters:
        return replace(shape, parameters=parameters, source=f"{folder}: config.json and safetensors headers")
    return shape


def shape_of_config(path: Path, tied: bool | None = None) -> Shape:
    """Shape from a config.json. `tied` overrides its `tie_word_embeddings`.

    Raises InputError naming the missing or invalid field.
    """
    raw = _read_json(path)
    text = raw.get("text_config") if isinstance(raw.get("text_config"), dict) else raw
    assert isinstance(text, dict)

    def number(field: str, default: int | None = None) -> int:
        names = (field, *ALIASES.get(field, ()))
        value = next((text[name] for name in names if text.get(name) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**9:
            raise InputError(f"{path}: {field}: must be a positive integer (got {value!r})")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    kind = str(text.get("model_type", ""))
    # These classes tie embeddings by default, and their config.json files omit the default.
    tied_by_default = kind.startswith(("gemma", "cohere"))
    declared = text.get("tie_word_embeddings", raw.get("tie_word_embeddings", tied_by_default))
    shape = Shape(
        hidden, number("num_hidden_layers"), number("intermediate_size", 4 * hidden), heads,
        number("num_key_value_heads", heads), number("head_dim", max(1, hidden // heads)), number("vocab_size"),
        bool(declared) if tied is None else tied, number("max_position_embeddings", ASSUMED_CONTEXT), 0, str(path),
    )  # fmt: skip
    shape = _with_parameters(shape)
    experts = number("num_experts", 1)
    if experts == 1:
        return shape
    # Mixture of experts: one MLP per expert in each layer.
    mlps = experts * number("moe_intermediate_size", shape.intermediate) - shape.intermediate
    return replace(shape, parameters=shape.parameters + shape.layers * 3 * hidden * mlps)


def shape_of_name(name: str) -> Shape:
    """Shape guessed from the size in a model's name: that of the nearest known model, with this many parameters.

    Raises InputError if the name contains no size.
    """
    found = _SIZE.search(name)
    if found is None:
        raise InputError(
            f"model: unknown size of {name}: it is neither a local folder nor in the Hugging Face cache, and its "
            "name contains no size such as 8B; pass its config.json with --model-config"
        )
    size = float(found[2]) * int(found[1] or 1) * (1e9 if found[3].lower() == "b" else 1e6)
    if not 1e6 <= size <= 1e13:
        raise InputError(f"model: {name} implies {size:g} parameters, which is implausible")
    nearest = min(KNOWN, key=lambda shape: abs(math.log(shape.parameters / size)))
    source = f"{size / 1e9:g}B from its name, shaped like {nearest.source}, {ASSUMED_CONTEXT:,} positions"
    return replace(nearest, parameters=int(size), source=source)


def _cached(name: str) -> Path | None:
    """Folder of a model in the local Hugging Face cache; None if its config.json is not cached."""
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _weights_in(folder: Path) -> tuple[int, set[str]]:
    """(number of parameters, tensor names) of a folder's weights; 0 parameters if files are missing."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index}: weight_map: missing or not a mapping")
        files = [folder / name for name in sorted({str(name) for name in weight_map.values()})]
        if any("/" in file.name or file.parent != folder or not file.is_file() for file in files):
            return 0, {str(name) for name in weight_map}
    tensors = [tensor for file in files for tensor in _header(file)]
    return sum(count for _, count in tensors), {name for name, _ in tensors}


def _header(file: Path) -> Iterator[tuple[str, int]]:
    """(name, number of values) of each tensor in a safetensors file: 8 bytes of length, then a JSON header."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES:
            raise InputError(f"{file}: not a safetensors file")
        header = _parse_json(file, stream.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            sizes = tensor.get("shape") if isinstance(tensor, dict) else None
            if not isinstance(sizes, list) or not all(isinstance(size, int) and size >= 0 for size in sizes):
                raise InputError(f"{file}: not a safetensors file: {name} has no valid shape")
            yield name, math.prod(sizes)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"model: file not found: {path}")
    with path.open("rb") as stream:
        return _parse_json(path, stream.read(MAX_HEADER_BYTES))


def _parse_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not a JSON object")
    return raw
