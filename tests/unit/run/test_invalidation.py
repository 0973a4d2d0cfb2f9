"""Which stages a changed configuration invalidates, as derived from what the steps declare."""

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
from calm_ray.recipes.load import load_config
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

DEMO, DCO_DEMO = "demo", "dco/demo"


def two_rounds(config: Config) -> list[tuple[int, str]]:
    """The folders of two complete rounds."""
    evaluated = [(0, step.name) for step in config.graph.of_round(0)]
    return evaluated + [(number, name) for number in (1, 2) for name in config.graph.owners]


def invalidated(old: Config, new: Config) -> list[str]:
    changes = changes_between(old.as_record(), new.as_record(), old.graph, new.graph, two_rounds(old))
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
        (["dco.loss=huber"], []),  # belongs to another method
        (["languages=[en, fr]"], ["everything"]),
        (["sampling.prompts_per_chunk=9"], ["everything"]),
        (["seed=1"], ["everything"]),
    ],
    ids=str,
)
def test_changes_invalidate_dependent_stages(changes: list[str], expected: list[str]) -> None:
    assert invalidated(load_config(DEMO), load_config(DEMO, changes)) == expected


def test_refresh_mode_does_not_affect_base_model_answers() -> None:
    """Round 0 and the samples and votes of round 1 stay valid."""
    old, new = load_config(DEMO), load_config(DEMO, ["engines.refresh=merged"])
    assert "0/evaluate" not in invalidated(old, new)
    assert "1/sample" not in invalidated(old, new)
    assert {"1/evaluate", "2/sample", "2/train"} <= set(invalidated(old, new))
    assert "1/train" not in invalidated(old, new)


def test_init_from_a_run_means_no_base_model_answers() -> None:
    init = ["init_from=earlier"]
    old, new = load_config(DEMO, init), load_config(DEMO, [*init, "engines.refresh=merged"])
    assert invalidated(old, new) == ALL


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        (["dco.gamma=2"], {"0/evaluate", "0/score", "0/changed"}),
        (["train.beta=0.5"], {"0/evaluate", "0/score", "0/changed"}),
        (
            ["dco.loss=huber"],
            {"0/evaluate", "0/score", "0/changed", "0/audit", "0/optimal", "1/audit", "1/pairs"},
        ),
        (["candidates.pairs=2"], {"0/evaluate", "0/score", "0/changed", "0/audit", "0/optimal", "1/audit"}),
        (["preferences.ties=smallest", "sampling.temperature=0.5"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_dco_changes_keep_independent_stages(changes: list[str], kept: set[str] | None) -> None:
    """The optimal policy derived from the first reference depends on gamma; base model scores do not."""
    old = load_config(DCO_DEMO)
    folders = {f"{number}/{name}" for number, name in two_rounds(old)}
    invalid = set(invalidated(old, load_config(DCO_DEMO, changes)))
    of_reference = {f"{n}/reference_{name}" for n in (0, 1) for name in ("score", "evaluate")}
    assert folders - invalid - of_reference == (folders - of_reference if kept is None else kept)


def test_switching_methods_keeps_shared_steps() -> None:
    """DCO's and CALM's pairs have the same name but come from different steps."""
    candidates = ["candidates={form: world}", "train.sft_weight=0"]
    old, new = load_config(DEMO, candidates), load_config(DEMO, [*candidates, "method=dco"])
    invalid = invalidated(old, new)
    assert "0/evaluate" not in invalid
    assert {"1/sample", "1/votes", "1/pairs", "1/train"} <= set(invalid)


def leaf_keys(section: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        nested = next(
            (k for k in (kind, *getattr(kind, "__args__", ())) if isinstance(k, type) and issubclass(k, Section)), None
        )
        keys += leaf_keys(nested, f"{prefix}{name}.") if nested is not None else [f"{prefix}{name}"]
    return keys


def is_covered(keys: Sequence[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in keys)


def test_every_key_is_declared_by_a_step_or_harmless() -> None:
    """Changing an undeclared key would leave stale results in place."""
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
    assert [key for key in leaf_keys(type(configs[0])) if not is_covered(known, key)] == []


def test_differences_are_listed_by_key() -> None:
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
    "train.learning_rate=1e-4", "train.warmup_ratio=0", "train.schedule=linear", "train.epochs=1",
    "train.validation_fraction=0",
]  # fmt: skip


@pytest.mark.parametrize("before", METHODS)
@pytest.mark.parametrize("after", METHODS)
def test_methods_do_not_reuse_each_others_training_data(before: str, after: str) -> None:
    """Even with the same settings, pairs are kept only if the same steps derive them from the same answers."""
    old, new = (load_config(DEMO, [*SHARED, f"method={method}"]) for method in (before, after))
    invalid = invalidated(old, new)
    if before == after:
        assert invalid == []
        return
    assert {"1/train", "1/evaluate"} <= set(invalid)
    assert "0/evaluate" not in invalid
    shares_pairs = [{"calm", "sft"}, {"dpo_gold", "sft_gold"}]
    examples = "option_targets" if before == "dco_gold" else "pairs"
    assert (f"1/{examples}" in invalid) == ({before, after} not in shares_pairs)


def test_changing_the_answer_extraction_discards_answers() -> None:
    old = load_config(DEMO, ["preferences.extraction=released", "train.sft_weight=0"])
    new = load_config(DEMO, ["method=dco", "candidates={form: samples}", "train.sft_weight=0"])
    assert {"0/evaluate", "1/sample"} <= set(invalidated(old, new))


def test_changed_reference_rescores_sampled_candidates() -> None:
    recipe = ["method=dco", "candidates={form: samples}", "train.sft_weight=0", "init_from=earlier"]
    old, new = (load_config(DEMO, [*recipe, f"train.reference={name}"]) for name in ("base", "previous"))
    invalid = invalidated(old, new)
    assert "1/reference_score" in invalid
    assert "1/candidates" not in invalid


@dataclass(frozen=True)
class CustomStep(Step):
    """A step of a third-party method."""

    name: str = "custom"  # type: ignore[misc]
    reads: tuple[str, ...] = ("questions",)
    keys: tuple[str, ...] = ()
    also_fills: tuple[str, ...] = ()

    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        for stage in (output, *map(round.stage, self.also_fills)):
            stage.finish({"custom": True})


def test_undeclared_method_key_invalidates_every_step() -> None:
    graph = Graph((CustomStep(keys=("short.length",)), CustomStep("train", ("custom",))), (), "short")
    folders = [(1, "custom"), (1, "train")]

    def invalid(key: str) -> list[tuple[int, str]]:
        return invalid_folders([key], graph, graph, folders, starts_from_base=True)

    assert invalid("short.forgotten") == invalid("short.length") == folders
    assert invalid("sampling.temperature") == []


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([CustomStep(reads=("nothing",))], "step custom reads nothing, which no earlier step makes"),
        ([CustomStep(), CustomStep(also_fills=("votes",))], "two steps have the folder custom"),
        ([CustomStep("held_out")], "two steps have the folder held_out"),
    ],
)
def test_conflicting_steps_are_refused(steps: list[CustomStep], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Graph(tuple(steps), (), "short")


def test_step_with_an_unfinished_second_folder_reruns(tmp_path: Path) -> None:
    unused: Any = None
    round = Round(1, unused, RunDirectory(str(tmp_path), "run"), unused, unused, unused, Policy())
    step = CustomStep(also_fills=("votes",))
    step.run(round, [])
    round.stage("votes").storage.write("stage.json", b"to")
    round.stage("votes").recover()
    assert not round.stage("votes").is_finished
    step.run(round, [])
    assert round.stage("votes").is_finished
