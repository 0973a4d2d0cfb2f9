"""The files of a model or an adapter. They are untrusted, so they are checked before any library reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from calm_ray.core.errors import InputError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".spm", ".tiktoken", ".jinja")
"""The files that make up a model. Code and pickles next to them are never read, fetched or copied."""
INDEX = ".safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")

_READ_AS_JSON = {
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "adapter_config.json", "processor_config.json", "preprocessor_config.json"),
}
_LARGEST_JSON = 64 << 20
_MOST_LAYERS = 10_000
CONVERT = "convert them first: load them in a trusted environment and save_pretrained(folder, safe_serialization=True)"


def model_files(folder: Path) -> list[Path]:
    """Returns the model files directly in a folder, sorted.

    Raises InputError for a symlink that points outside the folder, other than into the hub's cache.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    inside = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parent.parent / "blobs")
    for file in files:
        if file.is_symlink() and not any(file.resolve().is_relative_to(place) for place in inside):
            raise InputError(f"{file}: is a symlink that points outside its folder; copy the file itself there")
    return [file for file in files if file.is_file()]


def check_files(folder: Path) -> None:
    """Raises InputError for a file that is not what its name says, or that refers to files outside the folder."""
    files = model_files(folder)
    names = {file.name for file in files}
    for file in files:
        if file.suffix == ".safetensors":
            _check_tensors(file)
        elif file.name.endswith(INDEX):
            _check_index(file, names)
        elif file.name in _READ_AS_JSON:
            _check_settings(file)


def require_safetensors(folder: Path) -> None:
    """Raises InputError unless the folder's weights are safetensors and all model files are valid.

    Pickles next to a model's safetensors are fine: vLLM and transformers are told to read only safetensors. For
    adapters they are not: vLLM falls back to adapter_model.bin if adapter_model.safetensors is missing.
    """
    names = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not any(name.endswith(".safetensors") for name in names):
        raise InputError(f"{folder}: has no *.safetensors weights ({', '.join(pickles) or 'none at all'}); {CONVERT}")
    adapters = [name for name in pickles if name.startswith("adapter_model.")]
    if adapters or (ADAPTER[0] in names and ADAPTER[1] not in names):
        found = ", ".join(adapters) or "no adapter weights"
        raise InputError(f"{folder}: expected {ADAPTER[1]}, found {found}; {CONVERT}")
    check_files(folder)


def context_tokens(folder: Path, engine_args: Mapping[str, Any]) -> int | None:
    """Maximum number of tokens that the engines accept for a prompt and its answer; None if unknown."""
    from transformers import AutoConfig

    limit = engine_args.get("max_model_len")
    if isinstance(limit, int):
        return limit
    return getattr(AutoConfig.from_pretrained(folder, trust_remote_code=False), "max_position_embeddings", None)


def _check_tensors(file: Path) -> None:
    """Reads only the header. safetensors rejects headers that are too long or point beyond the end of the file."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read as safetensors: {error}; download or copy it again") from None


def _check_index(file: Path, names: set[str]) -> None:
    weights = _read_json(file).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise InputError(f"{file}: has no weight_map from weights to files")
    if foreign := sorted(set(weights.values()) - names):
        raise InputError(f"{file}: names {foreign[0]!r:.200}, which is not a safetensors file in its folder")


def _check_settings(file: Path) -> None:
    layers = _read_json(file).get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise InputError(f"{file}: num_hidden_layers is {layers:.3g}; no model has that many")


def _read_json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _LARGEST_JSON:
        raise InputError(f"{file}: is larger than {_LARGEST_JSON >> 20} MB, too large for a settings file")
    try:
        value = json.loads(file.read_bytes())
    except RecursionError:
        raise InputError(f"{file}: cannot be read as JSON: nested too deeply") from None
    except (ValueError, OSError) as error:  # not JSON, not UTF-8, a number with thousands of digits
        raise InputError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: must contain a JSON object")
    return value
