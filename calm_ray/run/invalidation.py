"""Which folders of a run a changed configuration makes invalid. All of it follows from what the steps declare."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from calm_ray.core.errors import InputError

Folder = tuple[int, str]
"""Round and name: `rounds/1/sample`."""

QUESTION_KEYS = ("init_from", "languages", "model", "questions", "sampling.prompts_per_chunk", "seed", "world")
"""What changes the questions, the model or the policy that a run starts from: everything begins again."""
PLUGINS = "plugins"
"""What changes the code of a method's steps."""

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
"""How the work is done, not what comes of it. A longer key that a step names goes before a shorter one here."""


class Declared(Protocol):
    """A step, as far as it is needed here (`calm_ray.methods.base.Step`)."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> tuple[Any, ...]: ...
    @property
    def beside(self) -> tuple[str, ...]: ...
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
"""What steps read that no step makes."""


@dataclass(frozen=True)
class Graph:
    """The steps of a round in their order."""

    training: tuple[Declared, ...]
    """Those of the method, and the one that trains; round 0 has none of them."""
    evaluation: tuple[Declared, ...]
    section: str
    """The section of the method's own settings. A key of it that no step names changes every step."""

    def __post_init__(self) -> None:
        """Raises InputError where steps do not go together, as those of a method from outside may."""
        there: dict[str, Any] = dict.fromkeys(QUESTIONS)
        for step in (*self.training, *self.evaluation):
            if missing := [name for name in step.reads if name not in there]:
                raise InputError(f"method: step {step.name} reads {missing[0]}, which no step before it makes")
            for name in (step.name, *step.beside):
                if there.setdefault(name, step.kind) != step.kind:  # a step may serve training and evaluation
                    raise InputError(f"method: two steps have the folder {name}; call one of them otherwise")

    @cached_property
    def by_name(self) -> dict[str, Declared]:
        return {step.name: step for step in (*self.training, *self.evaluation)}

    @property
    def trains(self) -> str:
        """The step whose folder holds a round's policy."""
        return self.training[-1].name

    def of_round(self, number: int) -> list[Declared]:
        """The steps that a round has."""
        steps = self.by_name if number else {step.name: step for step in self.evaluation}
        return [step for step in steps.values() if step.first_round <= number]

    @cached_property
    def owners(self) -> dict[str, Declared]:
        """Each folder of a round, in the order in which they are made, and the step that fills it."""
        return {name: step for step in self.by_name.values() for name in (*step.beside, step.name)}

    def follows_training(self, folder: str) -> bool:
        """Whether a folder of a round is made by the round's new policy, or from what that made."""
        step = self.owners.get(folder)
        if step is None:
            return False
        return step.asks == "trained" or any(self.follows_training(name) for name in step.reads)

    def leads_to_training(self, folder: str) -> bool:
        """Whether what is trained on depends on a folder of the round."""
        wanted, open_ = set(), [self.trains]
        while open_:
            step = self.by_name.get(open_.pop())
            for name in step.reads if step is not None else ():
                if name not in wanted:
                    wanted.add(name)
                    open_.append(name)
        return folder in self.owners and self.owners[folder].name in wanted

    def answered_by(self, asks: str) -> list[str]:
        """The steps that a policy answers."""
        return [step.name for step in self.by_name.values() if step.asks == asks]

    def has_unnamed(self, key: str) -> bool:
        """Whether a key is one of the method's own that no step names."""
        named = [name for step in self.by_name.values() for name in (*step.keys, *step.trained_keys)]
        return _is_below(key, self.section) and not _touches(key, named)

    def together(self, folder: str) -> list[str]:
        """The other folders whose chunks are written along with those of this one; the step's own comes first."""
        step = self.owners.get(folder)
        return [name for name in (step.name, *step.beside) if name != folder] if step is not None else []


@dataclass(frozen=True)
class Changes:
    """What another configuration means for a run that is there."""

    keys: dict[str, str] = field(default_factory=dict)
    """The keys that differ, each with what it was and what it is."""
    starts_over: bool = False
    """Whether nothing of the run stays, its questions and its model included."""
    folders: tuple[Folder, ...] = ()
    """What becomes invalid of its rounds."""
    finds_again: bool = False
    """Whether what was found out about prompts and policies on the way is invalid, too."""


def changes_between(
    before: Mapping[str, Any], after: Mapping[str, Any], old: Graph, new: Graph, there: Sequence[Folder]
) -> Changes:
    """What it means that a run is resumed with another configuration; `there` are the folders of its rounds."""
    changed = differences(before, after)
    if any(_touches(key, QUESTION_KEYS) for key in changed):
        return Changes(changed, True, tuple(there), True)
    is_base = after.get("init_from") is None
    invalid = invalid_folders(changed, old, new, there, starts_from_base=is_base)
    finds_again = any(number == 0 or (number == 1 and new.leads_to_training(name)) for number, name in invalid)
    return Changes(changed, False, tuple(invalid), finds_again)


def invalid_folders(
    changed: Collection[str], old: Graph, new: Graph, there: Sequence[Folder], *, starts_from_base: bool
) -> list[Folder]:
    """Of the folders that are there, those that a step would fill otherwise now, or that no step fills any more."""
    before = {name: step.kind for name, step in old.by_name.items()}
    replaced = {name for name, step in new.by_name.items() if step.kind != before.get(name)}
    is_same = old.section == new.section and old.by_name.keys() == new.by_name.keys()
    if any(_is_below(key, PLUGINS) or (is_same and new.has_unnamed(key)) for key in changed):
        replaced = set(new.by_name)
    invalid: set[Folder] = set()
    for number in range(max((number for number, _ in there), default=-1) + 1):
        for step in new.of_round(number):
            made_by = {"start": number - 1, "trained": number}.get(step.asks or "", 0)
            is_trained = made_by > 0 or (step.asks != "base" and not starts_from_base)
            keys = (*step.keys, *(step.trained_keys if is_trained else ()))
            if (
                step.name in replaced
                or any(_touches(key, keys) for key in changed)
                or any((number, name) in invalid for name in step.reads)
                or (step.asks in ("start", "trained") and (made_by, new.trains) in invalid)
            ):
                invalid.add((number, step.name))
    owners = new.owners
    return [
        (number, name)
        for number, name in sorted(there, key=lambda folder: (folder[0], [*owners, folder[1]].index(folder[1])))
        if name not in owners or (number, owners[name].name) in invalid
    ]


def differences(before: Any, after: Any, path: str = "") -> dict[str, str]:
    """The keys in which two configurations differ, each with what it was and what it is."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found: dict[str, str] = {}
        for key in dict.fromkeys([*before, *after]):
            found |= differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if before == after else {path: f"{before!r} in the run, {after!r} in the recipe"}


def _touches(key: str, keys: Iterable[str]) -> bool:
    """Whether a changed key is one of these, lies below one, or holds one; the longest rule for it counts."""
    named = [name for name in keys if _is_below(key, name)]
    if any(_is_below(name, key) and name != key for name in keys):  # a whole section that came or went
        return True
    harmless = max((len(name) for name in HARMLESS if _is_below(key, name)), default=-1)
    return max(map(len, named), default=-1) > harmless


def _is_below(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")
