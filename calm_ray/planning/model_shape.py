"""How large a model is, read from its config.json and the headers of its safetensors files with json alone."""

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
from calm_ray.core.sections import WORLD, Lora

MOST_HEADER_BYTES = 100_000_000
"""The longest header that safetensors itself reads."""
ASSUMED_CONTEXT = 8192
"""Tokens, of models whose configuration is not at hand."""


@dataclass(frozen=True)
class Shape:
    """A decoder as Llama's: attention with grouped keys, a gated MLP, embeddings that the head may share."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    context: int
    """The most positions."""
    parameters: int
    source: str
    """Where these numbers are from."""
    is_assumed: bool = False

    @property
    def root_parameters(self) -> int:
        """What is in no layer: the embeddings, the head unless it shares them, the last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def layer_parameters(self) -> int:
        """One layer of them, on average."""
        return max(0, self.parameters - self.root_parameters) // self.layers

    @property
    def kv_values(self) -> int:
        """Numbers that the cache keeps of one token: a key and a value in every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def widths(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear maps, by the names that LoRA's targets have."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q), "k_proj": (self.hidden, kv), "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden), "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden),
        }  # fmt: skip

    def lora_parameters(self, lora: Lora) -> int:
        """r (in + out) for every target (Hu et al. 2021, section 4.1); targets of other names are not counted."""
        widths = self.widths()
        return self.layers * sum(lora.r * sum(widths[name]) for name in set(lora.targets) & widths.keys())


def _counted(shape: Shape) -> Shape:
    """With the parameters that the widths make: linear maps without biases, two norms in a layer."""
    layer = sum(a * b for a, b in shape.widths().values()) + 2 * shape.hidden
    return replace(shape, parameters=shape.layers * layer + shape.root_parameters)


def _like(name: str, *numbers: int, tied: bool) -> Shape:
    hidden, layers, intermediate, heads, kv_heads, vocabulary = numbers
    return _counted(
        Shape(
            hidden, layers, intermediate, heads, kv_heads, hidden // heads, vocabulary, tied, ASSUMED_CONTEXT, 0, name,
            is_assumed=True,
        )
    )  # fmt: skip


# The config.json files of these models on the hub.
KNOWN = [
    _like("Qwen2.5 0.5B", 896, 24, 4864, 14, 2, 151936, tied=True),
    _like("Llama 3.2 1B", 2048, 16, 8192, 32, 8, 128256, tied=True),
    _like("Llama 3.2 3B", 3072, 28, 8192, 24, 8, 128256, tied=True),
    _like("Llama 3 8B", 4096, 32, 14336, 32, 8, 128256, tied=False),
    _like("Qwen2.5 14B", 5120, 48, 13824, 40, 8, 152064, tied=False),
    _like("Qwen2.5 32B", 5120, 64, 27648, 40, 8, 152064, tied=False),
    _like("Llama 3 70B", 8192, 80, 28672, 64, 8, 128256, tied=False),
]
WORLD_SHAPE = replace(_like("the demo's model", 128, 4, 384, 4, 4, 960, tied=True), context=256, is_assumed=False)
"""As `calm_ray.demo.pretraining` makes it; its vocabulary differs a little from world to world."""
_SIZE = re.compile(r"(?:^|[-_ ./])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?=$|[-_ ./])", re.IGNORECASE)


OLD_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
}
"""How other models of transformers name the fields of their configurations."""


def shape_of(model: str, config_file: str | Path | None = None) -> Shape:
    """The shape of a run's model: of its folder, of the hub's cache on this machine, or assumed from its name.

    `config_file` is a config.json to go by instead. Raises InputError where nothing tells the size.
    """
    if config_file is not None:
        return shape_of_config(local_path(str(config_file), "model-config"))
    if model == WORLD:
        return WORLD_SHAPE
    folder = local_path(model, "model")
    if folder.is_dir():
        return shape_of_folder(folder)
    if (cached := _cached(model)) is not None:
        return shape_of_folder(cached)
    return shape_of_name(model)


def shape_of_folder(folder: Path) -> Shape:
    """The shape of a model's folder: its config.json, and its weights as far as they are there."""
    parameters, names = _weights_in(folder)
    tied = not any(name.endswith("lm_head.weight") for name in names) if names else None
    shape = shape_of_config(folder / "config.json", tied)
    if parameters:
        return replace(shape, parameters=parameters, source=f"{folder}: config.json and safetensors headers")
    return shape


def shape_of_config(path: Path, tied: bool | None = None) -> Shape:
    """The shape that a config.json says; `tied` is whether the head shares the embeddings, where files tell it.

    Raises InputError naming the field that is missing or wrong.
    """
    raw = _read_json(path)
    text = raw.get("text_config") if isinstance(raw.get("text_config"), dict) else raw
    assert isinstance(text, dict)

    def number(field: str, default: int | None = None) -> int:
        names = (field, *OLD_NAMES.get(field, ()))
        value = next((text[name] for name in names if text.get(name) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**9:
            raise InputError(f"{path}: {field}: must be a whole number, 1 or more (it is {value!r})")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    kind = str(text.get("model_type", ""))
    # Models whose classes share the embeddings unless told otherwise, and whose files then do not say it.
    shares = kind.startswith(("gemma", "cohere"))
    says = text.get("tie_word_embeddings", raw.get("tie_word_embeddings", shares))
    shape = Shape(
        hidden, number("num_hidden_layers"), number("intermediate_size", 4 * hidden), heads,
        number("num_key_value_heads", heads), number("head_dim", max(1, hidden // heads)), number("vocab_size"),
        bool(says) if tied is None else tied, number("max_position_embeddings", ASSUMED_CONTEXT), 0, str(path),
    )  # fmt: skip
    shape = _counted(shape)
    experts = number("num_experts", 1)
    if experts == 1:
        return shape
    # A mixture of experts has that many MLPs in each layer.
    mlps = experts * number("moe_intermediate_size", shape.intermediate) - shape.intermediate
    return replace(shape, parameters=shape.parameters + shape.layers * 3 * hidden * mlps)


def shape_of_name(name: str) -> Shape:
    """The shape that a name with a size in it suggests: that of a known model of about this size, scaled to it.

    Raises InputError where the name says no size.
    """
    found = _SIZE.search(name)
    if found is None:
        raise InputError(
            f"model: the size of {name} is not known: it is neither a folder here nor in the hub's cache, and its "
            "name says no size such as 8B; give its config.json with --model-config"
        )
    size = float(found[2]) * int(found[1] or 1) * (1e9 if found[3].lower() == "b" else 1e6)
    if not 1e6 <= size <= 1e13:
        raise InputError(f"model: {name} says a size of {size:g} parameters, which cannot be")
    nearest = min(KNOWN, key=lambda shape: abs(math.log(shape.parameters / size)))
    source = f"{size / 1e9:g}B by its name, shaped like {nearest.source}, {ASSUMED_CONTEXT:,} positions"
    return replace(nearest, parameters=int(size), source=source)


def _cached(name: str) -> Path | None:
    """The folder of a model of the hub in this machine's cache, if its configuration is there."""
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
    """(parameters, names) of a folder's weights; (0, none) where they are not there in full."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        placed = _read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise InputError(f"{index}: weight_map: is missing")
        files = [folder / name for name in sorted({str(name) for name in placed.values()})]
        if any("/" in file.name or file.parent != folder or not file.is_file() for file in files):
            return 0, {str(name) for name in placed}
    tensors = [tensor for file in files for tensor in _header(file)]
    return sum(count for _, count in tensors), {name for name, _ in tensors}


def _header(file: Path) -> Iterator[tuple[str, int]]:
    """(name, number of values) of each tensor of a safetensors file: 8 bytes of length, then a header in JSON."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MOST_HEADER_BYTES + 1
        if length > MOST_HEADER_BYTES:
            raise InputError(f"{file}: is no safetensors file")
        header = _parse_json(file, stream.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            sizes = tensor.get("shape") if isinstance(tensor, dict) else None
            if not isinstance(sizes, list) or not all(isinstance(size, int) and size >= 0 for size in sizes):
                raise InputError(f"{file}: {name} has no shape; it is no safetensors file")
            yield name, math.prod(sizes)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"model: there is no file {path}")
    with path.open("rb") as stream:
        return _parse_json(path, stream.read(MOST_HEADER_BYTES))


def _parse_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: is no mapping of keys to values")
    return raw
