"""`train.engine: trl`: the same pairs, references and policies, trained by TRL's DPOTrainer in the same workers.

DDP on CPUs, FSDP through accelerate on GPUs. Supports all of TRL's loss types: `train.trl: {loss_type: [ipo]}`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from calm_ray.run.policies import Policy, publish
from calm_ray.training.job import TrainJob
from calm_ray.training.loop import Trainer, read_examples
from calm_ray.training.model import PolicyModel, fresh_lora, lora_config
from calm_ray.training.reference import Logps
from calm_ray.training.reports import Report, Row
from calm_ray.training.trees import Tree


class PairTrainer(DPOTrainer):
    """TRL's trainer for tokenized rows with known reference log-probabilities."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def train_with_trl(job: TrainJob, device: torch.device, report: Report) -> Policy:
    """Trains one round with TRL; writes the same files as `train_policy`. Collective: call on all ranks."""
    training, validation, too_long = read_examples(job)
    ref_logps = _reference_logps(job, device, training + validation, report)
    metrics: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = PairTrainer(
            model=_start_model(job),
            args=_arguments(job, device, scratch, has_validation=bool(validation)),
            train_dataset=_dataset(training, ref_logps),
            eval_dataset=_dataset(validation, ref_logps) if validation else None,
            processing_class=AutoTokenizer.from_pretrained(job.model.local_folder(), trust_remote_code=False),
            callbacks=[_Metrics(job.round_number, too_long, metrics, report)],
        )
        trainer.train()
        trainer.save_model(scratch)
        return _publish(job, Path(scratch), metrics)


def _reference_logps(job: TrainJob, device: torch.device, examples: list[Tree], report: Report) -> Logps:
    """Uses calm_ray's own model, so that `train.reference` means the same for both engines."""
    model = PolicyModel(job.model.local_folder(), job.train, device)
    return Trainer(job, model, report).reference_logps(examples)


def _start_model(job: TrainJob) -> nn.Module:
    train = job.train
    folder = job.start.local_folder() if job.start.kind == "weights" else job.model.local_folder()
    dtype = getattr(torch, train.dtype) if train.lora is not None else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    if train.lora is None:
        return model
    if job.start.kind == "adapter":
        return PeftModel.from_pretrained(model, str(job.start.local_folder()), is_trainable=True, use_safetensors=True)
    adapted = get_peft_model(model, lora_config(train.lora, folder))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(fresh_lora(name.replace(".default.", "."), parameter.shape, job.seed))
    return adapted


def _arguments(job: TrainJob, device: torch.device, scratch: str, *, has_validation: bool) -> DPOConfig:
    train = job.train
    world = dist.get_world_size()
    extra = dict(train.trl)
    per_device = extra.pop("per_device_train_batch_size", max(1, train.batch_pairs // world))
    extra = {**(job.objective.for_trl() or {}), **extra}
    if world > 1 and device.type == "cuda":
        extra = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}, **extra}
    settings = {
        "output_dir": scratch,
        "learning_rate": train.learning_rate,
        "num_train_epochs": train.epochs,
        "lr_scheduler_type": "cosine",
        "warmup_steps": train.warmup_ratio,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": max(1, train.batch_pairs // (world * per_device)),
        "max_grad_norm": train.max_grad_norm,
        "weight_decay": train.weight_decay,
        "max_length": train.max_pair_tokens,
        "precompute_ref_log_probs": True,
        "gradient_checkpointing": train.activation_checkpointing,
        "bf16": device.type == "cuda" and train.dtype == "bfloat16",
        "use_cpu": device.type == "cpu",
        "seed": job.seed,
        "eval_strategy": "epoch" if has_validation else "no",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
    }
    return DPOConfig(**{**settings, **extra})


def _dataset(trees: list[Tree], ref_logps: Logps) -> Dataset:
    (chosen, rejected) = zip(*(tree.branches for tree in trees), strict=True)
    (ref_chosen, ref_rejected) = zip(*(ref_logps[tree.key] for tree in trees), strict=True)
    return Dataset.from_dict(
        {
            "prompt_ids": [tree.prompt for tree in trees],
            "chosen_ids": [branch.tokens for branch in chosen],
            "rejected_ids": [branch.tokens for branch in rejected],
            "ref_chosen_logps": list(ref_chosen),
            "ref_rejected_logps": list(ref_rejected),
        }
    )


class _Metrics(TrainerCallback):
    """Reports TRL's logs as rows of metrics."""

    def __init__(
        self,
        round_number: int,
        too_long: int,
        rows: list[Row],
        report: Report,
    ) -> None:
        self._round, self._too_long, self._rows, self._report = round_number, too_long, rows, report

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(state, {"steps": state.max_steps, "too_long_pairs": self._too_long})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        names = {"loss": "train/loss", "eval_loss": "validation/loss", "learning_rate": "learning_rate"}
        self._note(state, {"step": state.global_step} | {names.get(k, f"trl/{k}"): v for k, v in (logs or {}).items()})

    def _note(self, state: Any, row: Row) -> None:
        if state.is_world_process_zero:
            line = {"round": self._round, **row}
            self._rows.append(line)
            self._report(line)


def _publish(job: TrainJob, saved: Path, metrics: list[Row]) -> Policy:
    """Publishes the model that TRL saved, without its pickled arguments."""
    published: list[Policy | None] = [None]
    if dist.get_rank() == 0:
        folder = saved / "policy"
        folder.mkdir()
        for file in saved.iterdir():
            if file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
                shutil.move(file, folder / file.name)
        published = [publish(folder, job.output.storage, "policy", job.round_number, job.kind)]
        job.output.storage.write_json("metrics.json", metrics)
    dist.broadcast_object_list(published)
    assert published[0] is not None
    return published[0]
