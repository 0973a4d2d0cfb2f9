"""The run directory: the only place that knows the paths inside a run and which parts of it are finished.

    STORAGE/NAME/
      config.json            the resolved configuration, versions, git revision
      summary.json           one entry per round
      metrics.jsonl          training metrics, one line per step
      bad_prompts.parquet    prompts that crash every engine, if any
      questions/             the questions as read
      model.json, model/     which model, and the demo world's weights for nodes that lack them
      start.json, start/     the earlier policy that the run starts from (init_from)
      rounds/1/NAME/         one folder per step of the round

`calm_ray.run.stage` describes a step's folder; the method defines the steps.
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
"""Version of the files in a run, saved in config.json. Runs of another format are refused."""
CONFIG_FILE = "config.json"
DELETING = "deleting.json"
"""Marks a run whose deletion has started."""
PARTS = [
    BAD_PROMPTS, CONFIG_FILE, DELETING, "evaluations", "finished.json", "metrics.jsonl", "model", "model.json", "probe",
    "questions", "rounds", "start", "start.json", "summary.json",
]  # fmt: skip
"""Everything a run's folder may contain."""
BEFORE_ROUNDS = ["questions", "start.json", "start", "model.json", "model"]
Split = Literal["align", "held_out"]
"""The questions to train on, and the held-out ones."""


def path_of(folder: Folder) -> str:
    number, name = folder
    return f"rounds/{number}/{name}"


class RunDirectory:
    """The folder STORAGE/NAME."""

    def __init__(self, storage: str, name: str) -> None:
        self.storage = Storage(storage).under(name)

    @property
    def uri(self) -> str:
        return self.storage.uri()

    def stage(self, round_number: int, name: str) -> Stage:
        return Stage(self.storage.under(f"rounds/{round_number}/{name}"))

    def training(self, round_number: int) -> Stage:
        """The stage that trains a round's policy."""
        return self.stage(round_number, "train")

    def trained_rounds(self) -> list[int]:
        """The rounds that have a policy."""
        return [number for number in dict.fromkeys(n for n, _ in self.folders()) if self.training(number).is_finished]

    def questions(self, split: str) -> Stage:
        """The questions of a `Split`, in chunks. Each file has the same questions in all languages."""
        return Stage(self.storage.under(f"questions/{split}"))

    @property
    def bad_prompts(self) -> BadPrompts:
        return BadPrompts(self.storage)

    @property
    def is_there(self) -> bool:
        """Whether the run exists."""
        return self.storage.exists(CONFIG_FILE)

    def check(self, changes: Changes | None, *, overwrite: bool = False, redo: bool = False) -> None:
        """Raises InputError if the folder contains something else, or a run that this configuration would invalidate.

        `changes` is what the configuration changes in the existing run; None if there is no run. `redo` allows
        invalid parts to be recomputed. Writes nothing.
        """
        if changes is None:
            if not (overwrite and self.is_there):
                self._check_without_config(overwrite)
            return
        invalid = self.invalid_parts(changes)
        if invalid and not redo and not overwrite:
            lines = "\n".join(f"  {key}: {change}" for key, change in changes.keys.items())
            raise InputError(
                f"{self.uri} contains a run with a different configuration:\n{lines}\n"
                f"The new configuration invalidates: {', '.join(invalid)}.\n"
                "Give this run another name, add --redo to recompute them, or --overwrite to delete the whole run."
            )

    def _check_without_config(self, overwrite: bool) -> None:
        names = self.storage.names()
        if foreign := [name for name in names if name not in PARTS]:
            raise InputError(f"{self.uri} contains {foreign[0]} and is not a run; give this run another name")
        if {"rounds", "questions"} & set(names) and DELETING not in names and not overwrite:
            raise InputError(
                f"{self.uri} contains a run without its config.json; restore it, or add --overwrite to delete the run"
            )

    def invalid_parts(self, changes: Changes) -> list[str]:
        """Returns the paths of the parts of the run that the changes invalidate."""
        first = [part for part in BEFORE_ROUNDS if self.storage.exists(part)] if changes.starts_over else []
        return first + [path_of(folder) for folder in changes.folders]

    def is_complete(self, rounds: int, changes: Changes | None) -> bool:
        """Whether the run is finished, has all `rounds`, and the configuration invalidates none of it."""
        if changes is None or not self.is_finished or rounds > self.config.get("rounds", 0):
            return False
        return not self.invalid_parts(changes) and all(stage.is_finished for stage in self.all_stages().values())

    def begin(
        self, record: dict[str, Any], provenance: dict[str, Any], changes: Changes | None, *, overwrite: bool = False
    ) -> list[str]:
        """Creates a new run directory; a resumed run keeps its valid folders.

        Returns log lines about what has changed in the configuration.
        """
        if overwrite:
            # First, so that a partly deleted run is never resumed.
            self.storage.write_json(DELETING, {})
            self.storage.delete(CONFIG_FILE)
        content = {"format": FORMAT, "config": record, **provenance}
        if changes is None or overwrite:
            self.storage.delete("")
            self.storage.write_json(CONFIG_FILE, content)
            return []
        invalid = self.invalid_parts(changes)
        if changes.keys:
            findings = ["evaluations", BAD_PROMPTS] if changes.discards_findings else []
            for part in ["finished.json", *findings, *invalid]:
                self.storage.delete(part)
            # Last, so that an interrupted deletion is repeated.
            self.storage.write_json(CONFIG_FILE, content)
        lines = [f"changed: {key}: {change}" for key, change in changes.keys.items()]
        return lines + [f"will be recomputed: {part}" for part in invalid]

    def folders(self) -> list[Folder]:
        """The folders of all started rounds."""
        rounds = sorted(int(name) for name in self.storage.names("rounds") if name.isdecimal())
        names_of_round = {number: set(self.storage.names(f"rounds/{number}")) for number in rounds}
        return [
            (number, name)
            for number, names in names_of_round.items()
            for name in sorted(names.difference(self.storage.files(f"rounds/{number}")))
        ]

    def all_stages(self) -> dict[str, Stage]:
        """All folders of questions and of started rounds, by path relative to the run."""
        questions = {f"questions/{name}": self.questions(name) for name in self.storage.names("questions")}
        return questions | {path_of(folder): self.stage(*folder) for folder in self.folders()}

    def discard_stale(self, graph: Graph, number: int, policy: str) -> list[str]:
        """Deletes folders that depend on a round's policy if a different policy produced them; returns their paths.

        A lost policy that is trained again does not necessarily get the same weights.
        """
        dependent = [
            (n, name) for n, name in self.folders() if n > number or (n == number and graph.follows_training(name))
        ]
        stages = [self.stage(number, name) for name in graph.answered_by("trained")]
        stages += [self.stage(number + 1, name) for name in graph.answered_by("start") if name != graph.trains]
        chunks = [(stage, min(stage.chunks())) for stage in stages if stage.chunks()]
        names = [stage.read_chunk(chunk, ["policy"])["policy"].to_pylist() for stage, chunk in chunks]
        if {name for of_chunk in names for name in of_chunk} == {policy}:
            return []
        for folder in dependent:
            self.storage.delete(path_of(folder))
        return [path_of(folder) for folder in dependent]

    @property
    def start(self) -> Policy | None:
        """The run's copy of the earlier policy that it starts from (`init_from`), if any."""
        return self._relocated(Policy(**self._read("start.json"))) if self.storage.exists("start.json") else None

    def policy(self, round_number: int) -> Policy:
        """The policy that a round trained; the training must be finished."""
        return self._relocated(Policy(**self.training(round_number).record["policy"]))

    def _relocated(self, policy: Policy) -> Policy:
        """Points a policy to its folder in this run, which may have been moved or copied since."""
        if policy.kind == "base":
            return policy
        folder = self.training(policy.round).storage.under("policy") if policy.round else self.storage.under("start")
        return replace(policy, location=folder.uri())

    def record_model(self, model: RunModel, folder: Path) -> RunModel:
        """Records the run's model once, in a form that every node can load: uploads the demo's model to the run."""
        if self.model is not None:
            return self.model
        if model.sha256:
            self.storage.upload(folder, "model")
            model = replace(model, location=self.storage.uri("model"))
        self.storage.write_json("model.json", model.__dict__)
        return model

    @property
    def model(self) -> RunModel | None:
        """The model that the run starts from; None until it is recorded."""
        if not self.storage.exists("model.json"):
            return None
        model = RunModel(**self._read("model.json"))
        return replace(model, location=self.storage.uri("model")) if model.location else model

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return dict(self.storage.read_json(name))
        except (ValueError, TypeError):
            raise InputError(f"{self.storage.uri(name)} is corrupt; delete it to have it regenerated") from None

    @property
    def config(self) -> dict[str, Any]:
        """The run's resolved configuration.

        Raises InputError if there is no run or it has another format.
        """
        if not self.is_there:
            raise InputError(f"{self.uri}: there is no run here (no config.json)")
        try:
            content = dict(self.storage.read_json(CONFIG_FILE))
            config, run_format = dict(content["config"]), content.get("format")
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.uri}: config.json is corrupt; restore it, or run the recipe with --overwrite"
            ) from None
        if run_format != FORMAT:
            raise InputError(
                f"{self.uri}: was written by an incompatible version of calm_ray; run the recipe under another name, "
                "or with --overwrite, which deletes this run"
            )
        return config

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json. Raises InputError if no round has finished yet."""
        if not self.storage.exists("summary.json"):
            raise InputError(f"{self.uri}: no round has finished yet (no summary.json)")
        return dict(self.storage.read_json("summary.json"))

    def finish(self, record: dict[str, Any]) -> None:
        self.storage.write_json("finished.json", record)

    @property
    def is_finished(self) -> bool:
        return self.storage.exists("finished.json")

    def write_metrics(self, rounds: int) -> None:
        """Collects the training metrics of all rounds in `metrics.jsonl`."""
        lines: list[str] = []
        for number in range(1, rounds + 1):
            storage = self.training(number).storage
            if storage.exists("metrics.json"):
                lines += [json.dumps(row) for row in storage.read_json("metrics.json")]
        self.storage.write("metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())
