"""Which folders of a run a changed configuration invalidates, derived from what the steps declare."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from calm_ray.core.errors import InputError

Folder = tuple[int, str]
"""Round and name: `rounds/1/sample`."""

QUESTION_KEYS = ("init_from", "languages", "model", "questions", "sampling.prompts_per_chunk", "seed", "world")
"""Keys that change the questions, the model or the starting policy: the whole run starts over."""
PLUGINS = "plugins"
"""The section that can change the code of a method's steps."""

HARMLESS = (
    "engines", "name", "placement", "rounds", "storage",
    *(
        f"engines.args.{name}"
        for name in (
            "block_size", "cpu_offload_gb", "disable_log_stats", "enable_prefix_caching", "enforce_eager",
            "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs",
        )
    ),
    *(
        f"train.{name}"
        for name in (
            "activation_checkpointing", "checkpoint_steps", "cpus_per_worker", "max_failures", "pack_tokens", "shards",
            "workers",
        )
    ),
)  # fmt: skip
"""Keys that change how the work is done but not its results. A step overrides them by declaring a longer key."""


class StepLike(Protocol):
    """The part of `calm_ray.methods.base.Step` that is needed here."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> tuple[Any, ...]: ...
    @property
    def also_fills(self) -> tuple[str, ...]: ...
    @property
    def reads(self) -> tuple[str, ...]: ...
    @property
    def keys(self) -> tuple[str, ...]: ...
    @property
    def trained_keys(self) -> tuple[str, ...]: ...
    @property
    def asks(self) -> str | None: ...
    @property
    def first_round(self) -> int: ...


QUESTIONS = ("questions", "held_out")
"""Folders that steps read but no step makes."""


@dataclass(frozen=True)
class Graph:
    """The steps of a round, in order."""

    training: tuple[StepLike, ...]
    """The method's steps; the last one trains. Round 0 has none of them."""
    evaluation: tuple[StepLike, ...]
    section: str
    """The method's own section. A key in it that no step declares affects every step."""

    def __post_init__(self) -> None:
        """Raises InputError if the steps do not fit together, which can happen with a plug-in's method."""
        folders: dict[str, Any] = dict.fromkeys(QUESTIONS)
        for step in (*self.training, *self.evaluation):
            if missing := [name for name in step.reads if name not in folders]:
                raise InputError(f"method: step {step.name} reads {missing[0]}, which no earlier step makes")
            for name in (step.name, *step.also_fills):
                if folders.setdefault(name, step.kind) != step.kind:  # one step may serve training and evaluation
                    raise InputError(f"method: two steps have the folder {name}; rename one of them")

    @cached_property
    def by_name(self) -> dict[str, StepLike]:
        return {step.name: step for step in (*self.training, *self.evaluation)}

    @property
    def trains(self) -> str:
        """The step whose folder contains a round's policy."""
        return self.training[-1].name

    def of_round(self, number: int) -> list[StepLike]:
        """The steps of one round."""
        steps = self.by_name if number else {step.name: step for step in self.evaluation}
        return [step for step in steps.values() if step.first_round <= number]

    @cached_property
    def owners(self) -> dict[str, StepLike]:
        """The step that fills each folder of a round, in the order of creation."""
        return {name: step for step in self.by_name.values() for name in (*step.also_fills, step.name)}

    def follows_training(self, folder: str) -> bool:
        """Whether a folder of a round depends on the policy that the round trains."""
        step = self.owners.get(folder)
        if step is None:
            return False
        return step.asks == "trained" or any(self.follows_training(name) for name in step.reads)

    def leads_to_training(self, folder: str) -> bool:
        """Whether training depends on a folder of the round."""
        dependencies, pending = set(), [self.trains]
        while pending:
            step = self.by_name.get(pending.pop())
            for name in step.reads if step is not None else ():
                if name not in dependencies:
                    dependencies.add(name)
                    pending.append(name)
        return folder in self.owners and self.owners[folder].name in dependencies

    def answered_by(self, asks: str) -> list[str]:
        """Names of the steps that ask this policy."""
        return [step.name for step in self.by_name.values() if step.asks == asks]

    def is_undeclared(self, key: str) -> bool:
        """Whether a key is in the method's own section and no step declares it."""
        declared = [name for step in self.by_name.values() for name in (*step.keys, *step.trained_keys)]
        return _is_below(key, self.section) and not _touches(key, declared)

    def together(self, folder: str) -> list[str]:
        """The other folders that the same step fills along with this one, the step's own folder first."""
        step = self.owners.get(folder)
        return [name for name in (step.name, *step.also_fills) if name != folder] if step is not None else []


@dataclass(frozen=True)
class Changes:
    """What a new configuration changes in an existing run."""

    keys: dict[str, str] = field(default_factory=dict)
    """The keys that differ, with a description of the old and new values."""
    starts_over: bool = False
    """Whether the whole run is invalid, including its questions and model."""
    folders: tuple[Folder, ...] = ()
    """The invalid folders of its rounds."""
    discards_findings: bool = False
    """Whether its bad prompts and its separate evaluations are invalid too."""


def changes_between(
    before: Mapping[str, Any], after: Mapping[str, Any], old: Graph, new: Graph, existing: Sequence[Folder]
) -> Changes:
    """What resuming a run with another configuration changes; `existing` are the folders of its rounds."""
    changed = differences(before, after)
    if any(_touches(key, QUESTION_KEYS) for key in changed):
        return Changes(changed, True, tuple(existing), True)
    is_base = after.get("init_from") is None
    invalid = invalid_folders(changed, old, new, existing, starts_from_base=is_base)
    discards_findings = any(number == 0 or (number == 1 and new.leads_to_training(name)) for number, name in invalid)
    return Changes(changed, False, tuple(invalid), discards_findings)


def invalid_folders(
    changed: Collection[str], old: Graph, new: Graph, existing: Sequence[Folder], *, starts_from_base: bool
) -> list[Folder]:
    """The existing folders that a step would now fill differently, or that no step fills any more."""
    before = {name: step.kind for name, step in old.by_name.items()}
    replaced = {name for name, step in new.by_name.items() if step.kind != before.get(name)}
    is_same = old.section == new.section and old.by_name.keys() == new.by_name.keys()
    if any(_is_below(key, PLUGINS) or (is_same and new.is_undeclared(key)) for key in changed):
        replaced = set(new.by_name)
    invalid: set[Folder] = set()
    for number in range(max((number for number, _ in existing), default=-1) + 1):
        for step in new.of_round(number):
            policy_round = {"start": number - 1, "trained": number}.get(step.asks or "", 0)
            is_trained = policy_round > 0 or (step.asks != "base" and not starts_from_base)
            keys = (*step.keys, *(step.trained_keys if is_trained else ()))
            if (
                step.name in replaced
                or any(_touches(key, keys) for key in changed)
                or any((number, name) in invalid for name in step.reads)
                or (step.asks in ("start", "trained") and (policy_round, new.trains) in invalid)
            ):
                invalid.add((number, step.name))
    owners = new.owners
    return [
        (number, name)
        for number, name in sorted(existing, key=lambda folder: (folder[0], [*owners, folder[1]].index(folder[1])))
        if name not in owners or (number, owners[name].name) in invalid
    ]


def differences(before: Any, after: Any, path: str = "") -> dict[str, str]:
    """The keys in which two configurations differ, with a description of the old and new values."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found: dict[str, str] = {}
        for key in dict.fromkeys([*before, *after]):
            found |= differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if before == after else {path: f"{before!r} in the run, {after!r} in the recipe"}


def _touches(key: str, keys: Iterable[str]) -> bool:
    """Whether a changed key is, is below, or contains one of `keys`. Against HARMLESS, the longest match wins."""
    matches = [name for name in keys if _is_below(key, name)]
    if any(_is_below(name, key) and name != key for name in keys):  # a whole section was added or removed
        return True
    harmless = max((len(name) for name in HARMLESS if _is_below(key, name)), default=-1)
    return max(map(len, matches), default=-1) > harmless


def _is_below(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")
