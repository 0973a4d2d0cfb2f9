"""Merges an adapter into its model, for engines that load full weights and for exporting the result."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from calm_ray.run.model_files import model_files
from calm_ray.run.policies import Policy, RunModel, cache_folder, node_lock


def merge(model: Path, adapter: Path, target: Path) -> None:
    """Merges the adapter into the model and writes the result as safetensors, with tokenizer and configuration."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False, use_safetensors=True)
    with torch.no_grad():
        merged = PeftModel.from_pretrained(base, str(adapter), use_safetensors=True).merge_and_unload()
    merged.save_pretrained(target)
    for file in model_files(model):
        if not (target / file.name).exists() and ".safetensors" not in file.name:
            shutil.copyfile(file, target / file.name)


def merged_folder(model: RunModel, policy: Policy) -> Path:
    """Returns the folder with a policy's full weights on this node, merged once for all engines of the node."""
    if policy.kind == "base":
        return model.local_folder()
    if policy.kind == "weights":
        return policy.local_folder()
    folder = cache_folder() / "merged" / policy.name
    with node_lock(folder):
        if not folder.is_dir():
            temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
            merge(model.local_folder(), policy.local_folder(), temporary)
            temporary.rename(folder)
    return folder


def delete_merged(policy: str) -> None:
    """Deletes a policy's merged weights from this node: they are as large as the model, and can be merged again."""
    shutil.rmtree(cache_folder() / "merged" / policy, ignore_errors=True)
