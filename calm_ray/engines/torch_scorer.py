"""Scores candidates on CPUs with each prompt computed once; vLLM would compute it again for every candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calm_ray.packing import attention
from calm_ray.packing.batch import IGNORED, Branch, pack, packed_tokens, split_into_packs
from calm_ray.run.model_files import require_safetensors
from calm_ray.run.policies import Policy, RunModel

PACK_TOKENS = 1024
"""Tokens per forward pass."""


@dataclass(frozen=True)
class Candidates:
    """A prompt with its candidates, as token ids."""

    prompt: list[int]
    branches: tuple[Branch, ...]


class TorchScorer:
    """A policy in this process, besides the engine's; loaded when it first scores."""

    def __init__(self, model: RunModel, dtype: str, on_pack: Callable[[], None]) -> None:
        """`on_pack` is called after each forward pass."""
        self._source, self._dtype, self._on_pack = model, getattr(torch, dtype), on_pack
        self._model: Any = None
        self._loaded: str | None = None

    def score(self, policy: Policy, jobs: Sequence[tuple[list[int], list[list[int]]]]) -> Iterator[list[float]]:
        """Yields the summed log-probabilities, in nats, of each prompt's candidates."""
        self._load(policy)
        rows = [Candidates(prompt, tuple(map(Branch, candidates))) for prompt, candidates in jobs]
        sizes = [packed_tokens(row, share_prompts=True) for row in rows]
        for numbers in split_into_packs(range(len(rows)), sizes, PACK_TOKENS):
            part = [rows[number] for number in numbers]
            logps = iter(self._logps(part))
            for row in part:
                yield [next(logps) for _ in row.branches]
            self._on_pack()

    @torch.inference_mode()
    def _logps(self, rows: Sequence[Candidates]) -> list[float]:
        batch = pack(rows, share_prompts=True)
        places = (batch.labels[0] != IGNORED).nonzero()[:, 0]
        logits = self._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            logits_to_keep=places,
            use_cache=False,
            **attention.arguments(batch),
        ).logits[0]
        labels = batch.labels[0, places]
        found = logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
        sums = torch.zeros(len(batch.completion_lengths)).index_add(0, batch.sequence_ids[places], found)
        return [float(value) for value in sums]

    def _load(self, policy: Policy) -> None:
        from transformers import AutoModelForCausalLM

        if policy.name == self._loaded:
            return
        attention.register()
        self._model = self._loaded = None  # at most one policy in memory
        folder = policy.local_folder() if policy.kind == "weights" else self._source.local_folder()
        require_safetensors(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=self._dtype, attn_implementation=attention.VARLEN, use_safetensors=True,
            trust_remote_code=False,
        )  # fmt: skip
        if policy.kind == "adapter":
            from peft import PeftModel

            adapter = policy.local_folder()
            require_safetensors(adapter)
            model = PeftModel.from_pretrained(model, str(adapter), use_safetensors=True).merge_and_unload()
        self._model, self._loaded = model.eval(), policy.name
