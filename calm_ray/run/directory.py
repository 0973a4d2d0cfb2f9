"""The run directory: the only owner of the paths inside a run, and of what is finished in it.

    STORAGE/NAME/
      config.json            the resolved configuration, versions, git revision
      summary.json           one entry for each round
      metrics.jsonl          training metrics, one line a step
      bad_prompts.parquet    prompts that crash every engine, if there are any
      questions/             the questions as they were read
      model.json, model/     the model, and the demo world's itself, for nodes that do not have it
      start.json, start/     the earlier policy that the run starts from (init_from)
      rounds/1/NAME/         a folder for each step of the round

What a step's folder holds is in `calm_ray.run.stage`; which steps there are, the method says.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from calm_ray.core.errors import InputError
from calm_ray.run.bad_prompts import FILE as BAD_PROMPTS
from calm_ray.run.bad_prompts import BadPrompts
from calm_ray.run.invalidation import Changes, Folder, Graph
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

FORMAT = 2
"""Of the files in a run, noted in config.json: a run of another format is refused."""
CONFIG_FILE = "config.json"
DELETING = "deleting.json"
"""Says that what is left of a run was to be deleted."""
PARTS = [
    BAD_PROMPTS, CONFIG_FILE, DELETING, "evaluations", "finished.json", "metrics.jsonl", "model", "model.json", "probe",
    "questions", "rounds", "start", "start.json", "summary.json",
]  # fmt: skip
"""All that lies in a run's folder."""
BEFORE_ROUNDS = ["questions", "start.json", "start", "model.json", "model"]
Split = Literal["align", "held_out"]
"""The questions trained on, and those held out."""


def path_of(folder: Folder) -> str:
    number, name = folder
    return f"rounds/{number}/{name}"


class RunDirectory:
    """STORAGE/NAME."""

    def __init__(self, storage: str, name: str) -> None:
        self.storage = Storage(storage).under(name)

    @property
    def uri(self) -> str:
        return self.storage.uri()

    def stage(self, round_number: int, name: str) -> Stage:
        return Stage(self.storage.under(f"rounds/{round_number}/{name}"))

    def training(self, round_number: int) -> Stage:
        """Where the policy of a round is made."""
        return self.stage(round_number, "train")

    def trained_rounds(self) -> list[int]:
        """The rounds whose policy is there."""
        return [number for number in dict.fromkeys(n for n, _ in self.folders()) if self.training(number).is_finished]

    def questions(self, split: str) -> Stage:
        """The questions of a `Split` in chunks: a file holds the same questions in all languages."""
        return Stage(self.storage.under(f"questions/{split}"))

    @property
    def bad_prompts(self) -> BadPrompts:
        return BadPrompts(self.storage)

    @property
    def is_there(self) -> bool:
        """Whether there is a run."""
        return self.storage.exists(CONFIG_FILE)

    def check(self, changes: Changes | None, *, overwrite: bool = False, redo: bool = False) -> None:
        """Raises InputError where something else, or a run that another configuration made, is in the way.

        `changes` is what the configuration means for the run; None where there is none. With `redo`, what becomes
        invalid may be done again. Writes nothing.
        """
        if changes is None:
            if not (overwrite and self.is_there):
                self._check_without_config(overwrite)
            return
        invalid = self.invalid_parts(changes)
        if invalid and not redo and not overwrite:
            lines = "\n".join(f"  {key}: {change}" for key, change in changes.keys.items())
            raise InputError(
                f"{self.uri} holds a run with another configuration:\n{lines}\n"
                f"With this one, these would have to be done again: {', '.join(invalid)}.\n"
                "Give this run another name, add --redo to do them again, or --overwrite to delete the whole run."
            )

    def _check_without_config(self, overwrite: bool) -> None:
        names = self.storage.names()
        if foreign := [name for name in names if name not in PARTS]:
            raise InputError(f"{self.uri} holds {foreign[0]} and is not a run; give this run another name")
        if {"rounds", "questions"} & set(names) and DELETING not in names and not overwrite:
            raise InputError(
                f"{self.uri} holds a run without its config.json; put that back, or add --overwrite to delete the run"
            )

    def invalid_parts(self, changes: Changes) -> list[str]:
        """What of the run a configuration makes invalid, by its path."""
        first = [part for part in BEFORE_ROUNDS if self.storage.exists(part)] if changes.starts_over else []
        return first + [path_of(folder) for folder in changes.folders]

    def is_complete(self, rounds: int, changes: Changes | None) -> bool:
        """Whether the run is finished, has all rounds that a configuration wants, and none would be done otherwise."""
        if changes is None or not self.is_finished or rounds > self.config.get("rounds", 0):
            return False
        return not self.invalid_parts(changes) and all(stage.is_finished for stage in self.all_stages().values())

    def begin(
        self, record: dict[str, Any], provenance: dict[str, Any], changes: Changes | None, *, overwrite: bool = False
    ) -> list[str]:
        """Creates a new run directory; a resumed run keeps its valid folders.

        Returns what is to be said of a configuration that has changed, a line each.
        """
        if overwrite:
            # First, so that what an interrupted deletion leaves is never taken for a run.
            self.storage.write_json(DELETING, {})
            self.storage.delete(CONFIG_FILE)
        noted = {"format": FORMAT, "config": record, **provenance}
        if changes is None or overwrite:
            self.storage.delete("")
            self.storage.write_json(CONFIG_FILE, noted)
            return []
        invalid = self.invalid_parts(changes)
        if changes.keys:
            found_out = ["evaluations", BAD_PROMPTS] if changes.finds_again else []
            for part in ["finished.json", *found_out, *invalid]:
                self.storage.delete(part)
            # Last: a deletion that was interrupted begins again.
            self.storage.write_json(CONFIG_FILE, noted)
        said = [f"changed: {key}: {change}" for key, change in changes.keys.items()]
        return said + [f"to be done again: {part}" for part in invalid]

    def folders(self) -> list[Folder]:
        """The folders of rounds that have begun."""
        rounds = sorted(int(name) for name in self.storage.names("rounds") if name.isdecimal())
        there = {number: set(self.storage.names(f"rounds/{number}")) for number in rounds}
        return [
            (number, name)
            for number, names in there.items()
            for name in sorted(names.difference(self.storage.files(f"rounds/{number}")))
        ]

    def all_stages(self) -> dict[str, Stage]:
        """Every folder of questions or of a round that has begun, by its path in the run."""
        found = {f"questions/{name}": self.questions(name) for name in self.storage.names("questions")}
        return found | {path_of(folder): self.stage(*folder) for folder in self.folders()}

    def forget_after(self, graph: Graph, number: int, policy: str) -> list[str]:
        """Deletes what a round's policy made where that is not this policy any more; returns the folders' paths.

        It was lost and has been trained again, which need not give the same weights.
        """
        after = [
            (n, name) for n, name in self.folders() if n > number or (n == number and graph.follows_training(name))
        ]
        made = [self.stage(number, name) for name in graph.answered_by("trained")]
        made += [self.stage(number + 1, name) for name in graph.answered_by("start") if name != graph.trains]
        chunks = [(stage, min(stage.chunks())) for stage in made if stage.chunks()]
        names = [stage.read_chunk(chunk, ["policy"])["policy"].to_pylist() for stage, chunk in chunks]
        if {name for of_chunk in names for name in of_chunk} == {policy}:
            return []
        for folder in after:
            self.storage.delete(path_of(folder))
        return [path_of(folder) for folder in after]

    @property
    def start(self) -> Policy | None:
        """The copy of an earlier run's policy that this run starts from (`init_from`); None where there is none."""
        return self._here(Policy(**self._read("start.json"))) if self.storage.exists("start.json") else None

    def policy(self, round_number: int) -> Policy:
        """The policy that a round ended with; the round's training must be finished."""
        return self._here(Policy(**self.training(round_number).record["policy"]))

    def _here(self, policy: Policy) -> Policy:
        """A policy where it lies in this run, which may have been moved or copied since."""
        if policy.kind == "base":
            return policy
        made_in = self.training(policy.round).storage.under("policy") if policy.round else self.storage.under("start")
        return replace(policy, location=made_in.uri())

    def share_model(self, model: RunModel, folder: Path) -> RunModel:
        """Notes the run's model, once, as every node can get it: the demo's is put into the run."""
        if self.model is not None:
            return self.model
        if model.sha256:
            self.storage.upload(folder, "model")
            model = replace(model, location=self.storage.uri("model"))
        self.storage.write_json("model.json", model.__dict__)
        return model

    @property
    def model(self) -> RunModel | None:
        """The model that the run started from; None before it has one."""
        if not self.storage.exists("model.json"):
            return None
        model = RunModel(**self._read("model.json"))
        return replace(model, location=self.storage.uri("model")) if model.location else model

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return dict(self.storage.read_json(name))
        except (ValueError, TypeError):
            raise InputError(f"{self.storage.uri(name)} is torn; delete it, and it is made again") from None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run that is here.

        Raises InputError where there is none, or where the run is of another format.
        """
        if not self.is_there:
            raise InputError(f"{self.uri}: there is no run here (no config.json)")
        try:
            noted = dict(self.storage.read_json(CONFIG_FILE))
            config, written = dict(noted["config"]), noted.get("format")
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.uri}: its config.json is torn; put it back, or run its recipe with --overwrite"
            ) from None
        if written != FORMAT:
            raise InputError(
                f"{self.uri}: was written by another version of calm_ray, whose files differ; run its recipe under "
                "another name, or with --overwrite, which deletes it"
            )
        return config

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json; InputError where no round is finished yet."""
        if not self.storage.exists("summary.json"):
            raise InputError(f"{self.uri}: no round is finished yet (no summary.json)")
        return dict(self.storage.read_json("summary.json"))

    def finish(self, record: dict[str, Any]) -> None:
        self.storage.write_json("finished.json", record)

    @property
    def is_finished(self) -> bool:
        return self.storage.exists("finished.json")

    def write_metrics(self, rounds: int) -> None:
        """Gathers the rounds' training metrics into `metrics.jsonl`."""
        lines: list[str] = []
        for number in range(1, rounds + 1):
            storage = self.training(number).storage
            if storage.exists("metrics.json"):
                lines += [json.dumps(row) for row in storage.read_json("metrics.json")]
        self.storage.write("metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())
