"""What a changed configuration undoes: all of it follows from what the steps declare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.core.sections import Section
from calm_ray.methods import METHODS
from calm_ray.methods.base import Step
from calm_ray.methods.round import Round
from calm_ray.recipes import RECIPES, load_config
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import (
    HARMLESS,
    PLUGINS,
    QUESTION_KEYS,
    Graph,
    changes_between,
    differences,
    invalid_folders,
)
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage

DEMO, DCO_DEMO = RECIPES / "demo.yaml", RECIPES / "dco_demo.yaml"


def rounds_of(config: Config) -> list[tuple[int, str]]:
    """The folders of two whole rounds."""
    evaluated = [(0, step.name) for step in config.graph.of_round(0)]
    return evaluated + [(number, name) for number in (1, 2) for name in config.graph.owners]


def undone(old: Config, new: Config) -> list[str]:
    changes = changes_between(old.as_record(), new.as_record(), old.graph, new.graph, rounds_of(old))
    return ["everything"] if changes.starts_over else [f"{number}/{name}" for number, name in changes.folders]


ROUND_2 = ["2/sample", "2/votes", "2/pairs", "2/train", "2/evaluate", "2/changed"]
SINCE_TRAINING = ["1/train", "1/evaluate", "1/changed", *ROUND_2]
SINCE_VOTES = ["1/votes", "1/pairs", *SINCE_TRAINING]
SINCE_SAMPLES = ["1/sample", *SINCE_VOTES]
ALL = ["0/evaluate", "0/changed", *SINCE_SAMPLES]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["train.workers=2", "engines.cpus=0.5", "rounds=3", "placement=colocate"], []),
        (["engines.args.gpu_memory_utilization=0.5", "engines.args.max_num_seqs=9"], []),
        (["engines.args.max_model_len=200"], ALL),
        (["engines.dtype=float32"], ALL),
        (["sampling.max_new_tokens=40"], ALL),
        (["sampling.temperature=0.5"], SINCE_SAMPLES),
        (["preferences.extraction=released"], ALL),
        (["preferences.ties=smallest"], SINCE_VOTES),
        (["train.learning_rate=1e-3"], SINCE_TRAINING),
        (["train.lora.r=32"], SINCE_TRAINING),
        (["method=sft"], SINCE_TRAINING),
        (["dco.loss=huber"], []),  # of another method
        (["languages=[en, fr]"], ["everything"]),
        (["sampling.prompts_per_chunk=9"], ["everything"]),
        (["seed=1"], ["everything"]),
    ],
    ids=str,
)
def test_a_change_undoes_what_depends_on_it(changes: list[str], expected: list[str]) -> None:
    assert undone(load_config(DEMO), load_config(DEMO, changes)) == expected


def test_how_policies_are_refreshed_does_not_concern_the_base_model() -> None:
    """What it answered stays: round 0, and the samples and votes of round 1."""
    old, new = load_config(DEMO), load_config(DEMO, ["engines.refresh=merged"])
    assert "0/evaluate" not in undone(old, new)
    assert "1/sample" not in undone(old, new)
    assert {"1/evaluate", "2/sample", "2/train"} <= set(undone(old, new))
    assert "1/train" not in undone(old, new)


def test_a_run_that_starts_from_another_runs_policy_has_no_base_models_rows() -> None:
    init = ["init_from=earlier"]
    old, new = load_config(DEMO, init), load_config(DEMO, [*init, "engines.refresh=merged"])
    assert undone(old, new) == ALL


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        (["dco.gamma=2"], {"0/evaluate", "0/score", "0/changed"}),
        (["train.beta=0.5"], {"0/evaluate", "0/score", "0/changed"}),
        (["dco.loss=huber"], {"0/evaluate", "0/score", "0/changed", "0/optimal", "1/pairs"}),
        (["candidates.pairs=2"], {"0/evaluate", "0/score", "0/changed", "0/optimal"}),
        (["preferences.ties=smallest", "sampling.temperature=0.5"], None),
    ],
    ids=str,
)
def test_what_dco_depends_on(changes: list[str], kept: set[str] | None) -> None:
    """The optimal policy that the first reference leads to depends on gamma; scores of the base model do not."""
    old = load_config(DCO_DEMO)
    there = {f"{number}/{name}" for number, name in rounds_of(old)}
    gone = set(undone(old, load_config(DCO_DEMO, changes)))
    of_reference = {f"{n}/reference_{name}" for n in (0, 1) for name in ("score", "evaluate")}
    assert there - gone - of_reference == (there - of_reference if kept is None else kept)


def test_another_method_keeps_the_steps_it_has_in_common() -> None:
    """DCO's pairs have the name of CALM's, and are made by another step."""
    candidates = ["candidates={form: world}", "train.sft_weight=0"]
    old, new = load_config(DEMO, candidates), load_config(DEMO, [*candidates, "method=dco"])
    gone = undone(old, new)
    assert "0/evaluate" not in gone
    assert {"1/sample", "1/votes", "1/pairs", "1/train"} <= set(gone)


def leaf_keys(section: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        below = next(
            (k for k in (kind, *getattr(kind, "__args__", ())) if isinstance(k, type) and issubclass(k, Section)), None
        )
        keys += leaf_keys(below, f"{prefix}{name}.") if below is not None else [f"{prefix}{name}"]
    return keys


def named(keys: Sequence[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in keys)


def test_every_key_is_named_by_a_step_or_known_to_be_harmless() -> None:
    """A key that nobody names would leave what it changes as it was."""
    recipes = [
        [f"method={method}", "train.sft_weight=0", f"candidates={form}"]
        for method in METHODS
        for form in ("null", "{form: world}", "{form: samples}")
        if (form != "{form: samples}" or method == "dco") and (form != "null" or method != "dco")
    ]
    configs = [load_config(DEMO, overrides) for overrides in recipes]
    of_steps = [
        key
        for c in configs
        for step in (*c.steps, c.training, *c.evaluation)
        for key in (*step.keys, *step.trained_keys)
    ]
    known = [*of_steps, *QUESTION_KEYS, *HARMLESS, PLUGINS]
    assert [key for key in leaf_keys(type(configs[0])) if not named(known, key)] == []


def test_differences_name_the_keys() -> None:
    before = {"a": 1, "b": {"c": 2, "d": None}, "e": [1]}
    after = {"a": 1, "b": {"c": 3, "d": {"x": 1}}, "e": [1, 2], "f": 0}
    assert differences(before, after) == {
        "b.c": "2 in the run, 3 in the recipe",
        "b.d": "None in the run, {'x': 1} in the recipe",
        "e": "[1] in the run, [1, 2] in the recipe",
        "f": "None in the run, 0 in the recipe",
    }


SHARED = [
    "candidates={form: world}", "train.sft_weight=0", "train.reference=base", "train.beta=0.5",
    "train.learning_rate=1e-4", "train.warmup_share=0", "train.schedule=linear", "train.epochs=1",
    "train.validation_share=0",
]  # fmt: skip


@pytest.mark.parametrize("before", METHODS)
@pytest.mark.parametrize("after", METHODS)
def test_no_method_trains_on_what_another_made_of_it(before: str, after: str) -> None:
    """Though both have the same settings: the examples stay only where the same steps make them of the same answers."""
    old, new = (load_config(DEMO, [*SHARED, f"method={method}"]) for method in (before, after))
    gone = undone(old, new)
    if before == after:
        assert gone == []
        return
    assert {"1/train", "1/evaluate"} <= set(gone)
    assert "0/evaluate" not in gone
    shares_pairs = [{"calm", "sft"}, {"dpo_gold", "sft_gold"}]
    assert ("1/pairs" in gone) == ({before, after} not in shares_pairs)


def test_answers_that_were_read_otherwise_are_not_kept() -> None:
    old = load_config(DEMO, ["preferences.extraction=released", "train.sft_weight=0"])
    new = load_config(DEMO, ["method=dco", "candidates={form: samples}", "train.sft_weight=0"])
    assert {"0/evaluate", "1/sample"} <= set(undone(old, new))


def test_the_reference_of_sampled_candidates_scores_them_again() -> None:
    recipe = ["method=dco", "candidates={form: samples}", "train.sft_weight=0", "init_from=earlier"]
    old, new = (load_config(DEMO, [*recipe, f"train.reference={name}"]) for name in ("base", "previous"))
    gone = undone(old, new)
    assert "1/reference_score" in gone
    assert "1/candidates" not in gone


@dataclass(frozen=True)
class Made(Step):
    """A step of a method from outside."""

    name: str = "made"  # type: ignore[misc]
    reads: tuple[str, ...] = ("questions",)
    keys: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        for stage in (output, *map(round.stage, self.beside)):
            stage.finish({"made": True})


def test_a_key_of_its_own_that_no_step_names_changes_every_step() -> None:
    graph = Graph((Made(keys=("short.length",)), Made("train", ("made",))), (), "short")
    there = [(1, "made"), (1, "train")]

    def gone(key: str) -> list[tuple[int, str]]:
        return invalid_folders([key], graph, graph, there, starts_from_base=True)

    assert gone("short.forgotten") == gone("short.length") == there
    assert gone("sampling.temperature") == []


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Made(reads=("nothing",))], "step made reads nothing, which no step before it makes"),
        ([Made(), Made(beside=("votes",))], "two steps have the folder made"),
        ([Made("held_out")], "two steps have the folder held_out"),
    ],
)
def test_steps_that_do_not_go_together_are_refused(steps: list[Made], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Graph(tuple(steps), (), "short")


def test_a_step_whose_second_folder_is_not_finished_is_made_again(tmp_path: Path) -> None:
    unused: Any = None
    round = Round(1, unused, RunDirectory(str(tmp_path), "run"), unused, unused, unused, Policy())
    step = Made(beside=("votes",))
    step.run(round, [])
    round.stage("votes").storage.write("stage.json", b"to")
    round.stage("votes").recover()
    assert not round.stage("votes").is_finished
    step.run(round, [])
    assert round.stage("votes").is_finished
