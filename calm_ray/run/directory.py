"""The run directory: the only owner of the paths inside a run, and of what is finished in it.

    STORAGE/NAME/
      config.json            the resolved configuration, versions, git revision
      summary.json           one entry for each round
      metrics.jsonl          training metrics, one line a step
      bad_prompts.parquet    prompts that end every engine, if there are any
      questions/             the questions as they were read
      model.json, model/     the model, and the demo world's itself, for nodes that do not have it
      start.json, start/     the earlier policy that the run starts from (init_from)
      rounds/1/sample/       Parquet, one file for each chunk and language
      rounds/1/votes/        Parquet
      rounds/1/pairs/        Parquet
      rounds/1/train/        margins, and policy/: the adapter or the weights
      rounds/1/evaluate/     Parquet

What a stage's folder holds is in `calm_ray.run.stage`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.run.bad_prompts import FILE as BAD_PROMPTS
from calm_ray.run.bad_prompts import BadPrompts
from calm_ray.run.invalidation import PARTS_OF, STEPS_OF_A_ROUND, Step, differences, earliest, invalid_stages
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

CONFIG_FILE = "config.json"
DELETING = "deleting.json"
"""Says that what is left of a run was to be deleted."""
PARTS = [
    BAD_PROMPTS, CONFIG_FILE, DELETING, "evaluations", "finished.json", "metrics.jsonl", "model", "model.json", "probe",
    "questions", "rounds", "start", "start.json", "summary.json",
]  # fmt: skip
"""All that lies in a run's folder."""
BEFORE_ROUNDS = ["questions", "start.json", "start", "model.json", "model"]
ORDER = [name for step in STEPS_OF_A_ROUND for name in PARTS_OF[step]]
"""The stages of a round, in the order in which they are made."""


def _path(stage: tuple[int, str]) -> str:
    number, name = stage
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

    def questions(self, split: Literal["align", "evaluate"]) -> Stage:
        """The questions in chunks: a file holds the same questions in all languages."""
        return self._questions(split)

    def _questions(self, split: str) -> Stage:
        return Stage(self.storage.under(f"questions/{split}"))

    @property
    def bad_prompts(self) -> BadPrompts:
        return BadPrompts(self.storage)

    def check(self, config: dict[str, Any], overwrite: bool, *, redo: bool = False) -> None:
        """Raises InputError where something else, or a run that another configuration made, is in the way.

        With `redo`, what a changed configuration makes invalid may be done again. Writes nothing.
        """
        if not self.storage.exists(CONFIG_FILE):
            self._check_without_config(overwrite)
            return
        if overwrite:
            return
        changed, _, invalid = self._changes(config)
        if invalid and not redo:
            lines = "\n".join(f"  {key}: {change}" for key, change in changed.items())
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

    def is_complete(self, config: dict[str, Any]) -> bool:
        """Whether the run is finished, has all rounds that a configuration wants, and none would be done otherwise."""
        if not self.is_finished or config.get("rounds", 0) > self.config.get("rounds", 0):
            return False
        _, _, invalid = self._changes(config)
        return not invalid and all(stage.is_finished for stage in self.all_stages().values())

    def _changes(self, config: dict[str, Any]) -> tuple[dict[str, str], Step, list[str]]:
        """The keys that differ, each with how, their first effect, and the parts of the run that it makes invalid."""
        changed = differences(_with_new_keys(self.config), config)
        step = earliest(changed, str(config.get("method")))
        first = [part for part in BEFORE_ROUNDS if self.storage.exists(part)] if step == "questions" else []
        return changed, step, first + [_path(stage) for stage in invalid_stages(step, self.stages())]

    def begin(self, config: dict[str, Any], about: dict[str, Any], overwrite: bool) -> list[str]:
        """Makes the directory of a new run; one that is gone on with keeps what is still valid in it.

        Returns what is to be said of a configuration that has changed, a line each.
        """
        if overwrite:
            # First, so that what an interrupted deletion leaves is never taken for a run.
            self.storage.write_json(DELETING, {})
            self.storage.delete(CONFIG_FILE)
        if not self.storage.exists(CONFIG_FILE):
            self.storage.delete("")
            self.storage.write_json(CONFIG_FILE, {"config": config, **about})
            return []
        changed, step, invalid = self._changes(config)
        if changed:
            found_out = ["evaluations", BAD_PROMPTS] if step not in ("train", "nothing") else []
            for part in ["finished.json", *found_out, *invalid]:
                self.storage.delete(part)
            # Last: a deletion that was interrupted begins again.
            self.storage.write_json(CONFIG_FILE, {"config": config, **about})
        said = [f"changed: {key}: {change}" for key, change in changed.items()]
        return said + [f"to be done again: {part}" for part in invalid]

    def starts_over(self, config: dict[str, Any]) -> bool:
        """Whether a changed configuration leaves nothing of the run that is here, its model and start included."""
        return self.storage.exists(CONFIG_FILE) and self._changes(config)[1] == "questions"

    def stages(self) -> list[tuple[int, str]]:
        """The stages that have begun, (round, name), in the order in which a run makes them."""
        rounds = sorted(int(name) for name in self.storage.names("rounds") if name.isdecimal())
        return [stage for stage in product(rounds, ORDER) if self.storage.exists(_path(stage))]

    def all_stages(self) -> dict[str, Stage]:
        """Every stage that has begun, by its name in the run."""
        found = {f"questions/{name}": self._questions(name) for name in self.storage.names("questions")}
        return found | {_path(stage): self.stage(*stage) for stage in self.stages()}

    def forget_after_training(self, number: int, policy: str) -> list[str]:
        """Deletes what a round's policy made where that is not this policy any more; returns the stages' names.

        It was lost and has been trained again, which need not give the same weights.
        """
        after = [(n, name) for n, name in self.stages() if n > number or (n == number and name in PARTS_OF["evaluate"])]
        made = [self.stage(number, "evaluate"), self.stage(number, "score"), self.stage(number + 1, "sample")]
        chunks = [(stage, min(stage.chunks())) for stage in made if stage.chunks()]
        if {name for stage, chunk in chunks for name in stage.read_chunk(chunk, ["policy"])["policy"].to_pylist()} == {
            policy
        }:
            return []
        for stage in after:
            self.storage.delete(_path(stage))
        return [_path(stage) for stage in after]

    @property
    def start(self) -> Policy | None:
        """The copy of an earlier run's policy that this run starts from (`init_from`); None where there is none."""
        return self._here(Policy(**self._read("start.json"))) if self.storage.exists("start.json") else None

    def policy(self, round_number: int) -> Policy:
        """The policy that a round ended with; the round's training must be finished."""
        return self._here(Policy(**self.stage(round_number, "train").record["policy"]))

    def _here(self, policy: Policy) -> Policy:
        """A policy where it lies in this run, which may have been moved or copied since."""
        if policy.kind == "base":
            return policy
        folder = f"rounds/{policy.round}/train/policy" if policy.round else "start"
        return replace(policy, location=self.storage.uri(folder))

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
        """The resolved configuration of the run that is here; InputError where there is none."""
        if not self.storage.exists(CONFIG_FILE):
            raise InputError(f"{self.uri}: there is no run here (no config.json)")
        try:
            return dict(self.storage.read_json(CONFIG_FILE)["config"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.uri}: its config.json is torn; put it back, or start again with --overwrite"
            ) from None

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json; InputError where no round is finished yet."""
        if not self.storage.exists("summary.json"):
            raise InputError(f"{self.uri}: no round is finished yet (no summary.json)")
        return dict(self.storage.read_json("summary.json"))

    def vote_report(self, round_number: int) -> dict[str, Any]:
        """What the pairs of a round and the vote behind them amount to; InputError where the round has none yet."""
        pairs = self.stage(round_number, "pairs")
        if not pairs.is_finished:
            raise InputError(f"{self.uri}: round {round_number} has no pairs yet; name another with --round")
        if "vote" not in pairs.record:
            raise InputError(
                f"{self.uri}: its pairs come from candidates, not from a vote; see it with `calm-ray show`"
            )
        report = dict(pairs.record["vote"])
        if "pairs_by_language" not in report:
            sample = self.stage(round_number, "sample").storage.uri()
            raise InputError(f"{self.uri}: was made before calm_ray counted this; name {sample} to have it counted")
        return report

    def finish(self, record: dict[str, Any]) -> None:
        self.storage.write_json("finished.json", record)

    @property
    def is_finished(self) -> bool:
        return self.storage.exists("finished.json")

    def write_metrics(self, rounds: int) -> None:
        """Gathers the rounds' training metrics into `metrics.jsonl`."""
        lines: list[str] = []
        for number in range(1, rounds + 1):
            storage = self.stage(number, "train").storage
            if storage.exists("metrics.json"):
                lines += [json.dumps(row) for row in storage.read_json("metrics.json")]
        self.storage.write("metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())


def _with_new_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the defaults of keys that came after it was written."""
    try:
        return Config.model_validate(config).model_dump(mode="json")
    except ValidationError:  # it has keys that went since
        return config
