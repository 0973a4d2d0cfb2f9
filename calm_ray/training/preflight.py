"""Catches training errors before anything is sampled."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from peft import get_peft_model

from calm_ray.core.errors import InputError
from calm_ray.core.sections import Train
from calm_ray.packing import attention
from calm_ray.training.model import decoder_layers, empty_model, lora_config, require_weights


def check_training(folder: Path, train: Train) -> None:
    """Raises InputError if the model in `folder` cannot be trained as the recipe asks.

    Builds the model on the meta device. Checks its weights only if the folder has them: Hub models are downloaded
    later, by the nodes that need them.
    """
    attention.register()
    try:
        model = empty_model(folder, train, torch.bfloat16)
        decoder_layers(model)
        if any(folder.glob("*.safetensors")):
            require_weights({name for name, _ in model.named_parameters()}, folder)
        if train.lora is not None:
            get_peft_model(model, lora_config(train.lora, folder))
    except (ValueError, ImportError) as error:
        raise InputError(f"train: cannot train the model in {folder} with this recipe: {error}") from None
    if train.engine == "trl":
        _check_trl(train)


def _check_trl(train: Train) -> None:
    from trl import DPOConfig

    known = {field.name for field in fields(DPOConfig)}
    if unknown := sorted(train.trl.keys() - known):
        raise InputError(f"train.trl: {unknown[0]} is not an argument of TRL's DPOConfig")
