"""A run that is gone on with under another configuration: which of its stages that makes invalid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

Step = Literal["questions", "evaluate", "sample", "pairs", "train", "nothing"]
"""Where in the run a key has its first effect: everything from there on depends on it. `evaluate` is that of the policy
before training; the others are those of round 1."""

STEPS: tuple[Step, ...] = ("questions", "evaluate", "sample", "pairs", "train", "nothing")

# How an engine goes about its work, not what comes of it; one that ran out of memory is helped by these.
ENGINE_CARE = (
    "block_size", "cpu_offload_gb", "disable_log_stats", "enable_prefix_caching", "enforce_eager",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs",
)  # fmt: skip

# The longest key that fits counts; what is in none of them changes everything.
FIRST_EFFECT: dict[str, Step] = {
    "name": "nothing",
    "storage": "nothing",
    "rounds": "nothing",
    "placement": "nothing",
    "method": "sample",
    "device": "evaluate",
    "engines": "nothing",
    "engines.dtype": "evaluate",
    "engines.refresh": "evaluate",
    "engines.args": "evaluate",
    **{f"engines.args.{name}": "nothing" for name in ENGINE_CARE},
    "sampling": "evaluate",
    "sampling.completions": "sample",
    "sampling.temperature": "sample",
    "sampling.top_p": "sample",
    "sampling.prompts_per_chunk": "questions",
    "candidates": "evaluate",
    "preferences": "pairs",
    "preferences.extraction": "evaluate",
    "dco": "pairs",
    "train": "train",
    "train.workers": "nothing",
    "train.cpus_per_worker": "nothing",
    "train.max_failures": "nothing",
    "train.checkpoint_steps": "nothing",
    "train.pack_tokens": "nothing",
    "train.activation_checkpointing": "nothing",
    "train.shards": "nothing",
}
FIRST_EFFECT_OF_DCO: dict[str, Step] = {"train.beta": "pairs", "train.reference": "pairs"}
"""Its pairs carry the margins that the reference leads to."""

STEPS_OF_A_ROUND = ("sample", "pairs", "train", "evaluate")
PARTS_OF = {
    "sample": ("sample",),
    "pairs": ("candidates", "reference_score", "reference_evaluate", "votes", "pairs"),
    "train": ("train",),
    "evaluate": ("evaluate", "score", "optimal", "changed"),
}
"""The folders that each step of a round makes."""


def differences(before: Any, after: Any, path: str = "") -> dict[str, str]:
    """The keys in which two configurations differ, each with what it was and what it is."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, str] = {}
        for key in dict.fromkeys([*before, *after]):
            found |= differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if before == after else {path: f"{before!r} there, {after!r} here"}


def first_effect(key: str, method: str) -> Step:
    """Where a key of the configuration has its first effect in a run of a method."""
    effects = FIRST_EFFECT | (FIRST_EFFECT_OF_DCO if method == "dco" else {})
    words = key.split(".")
    prefixes = (".".join(words[:count]) for count in range(len(words), 0, -1))
    return next((effects[prefix] for prefix in prefixes if prefix in effects), "questions")


def earliest(keys: Iterable[str], method: str) -> Step:
    """The first of the steps in which some keys of the configuration have their first effect."""
    return min((first_effect(key, method) for key in keys), key=STEPS.index, default="nothing")


def invalid_stages(step: Step, there: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Of the stages that are there, (round, name), those that are invalid from a step on."""
    if step == "nothing":
        return []
    if step in ("questions", "evaluate"):
        return list(there)
    made_of_pairs = step in ("sample", "pairs")  # the optimal policy that the first reference leads to
    return [
        (number, name)
        for number, name in there
        if number > 1 or (number == 1 and follows(name, step)) or (name == "optimal" and made_of_pairs)
    ]


def follows(name: str, step: str) -> bool:
    """Whether a stage of a round is made in a step of it, or after that."""
    made_in = next(step for step, parts in PARTS_OF.items() if name in parts)
    return STEPS_OF_A_ROUND.index(made_in) >= STEPS_OF_A_ROUND.index(step)
