"""What is compared, what runs share, and the table; without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from factories import completion, question

from calm_ray.comparison.contenders import TABLE_1, Comparison, named_methods, plan
from calm_ray.comparison.main import DEMO, main, report
from calm_ray.comparison.shared import check_common_start, share_questions, share_start
from calm_ray.comparison.table import change
from calm_ray.core.errors import InputError
from calm_ray.core.rows import Completion, Question, rows_of, table
from calm_ray.recipes.load import load_config
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage

RECIPE: dict[str, Any] = {
    "name": "t1",
    "method": "dco",
    "languages": ["en", "fr"],
    "candidates": {"form": "world"},
    "engines": {"shared": 1},
    "preferences": {"translator": "world"},
    "train": {"learning_rate": 1e-3, "epochs": 4, "batch_pairs": 16},
}


def write_recipe(folder: Path, **changes: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "storage": str(folder), **changes}))
    return file


def make_comparison(folder: Path, methods: list[str], overrides: tuple[str, ...] = (), **changes: Any) -> Comparison:
    return plan(write_recipe(folder, **changes), methods, overrides)


def test_run_comes_after_the_one_it_starts_from(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path, named_methods(["base", "dpo_gold→dco", "dco", "dpo_gold"]))
    assert comparison.methods == ["base", "dpo_gold->dco", "dco", "dpo_gold"]
    assert comparison.name == "t1"
    runs = [(one.method, one.config.name, one.config.method, one.config.init_from) for one in comparison.contenders]
    assert runs == [
        ("dpo_gold", "t1-dpo_gold", "dpo_gold", None),
        ("dpo_gold->dco", "t1-dpo_gold-dco", "dco", "t1-dpo_gold"),
        ("dco", "t1-dco", "dco", None),
    ]


def test_learning_rate_applies_only_to_the_objective_of_the_recipe(tmp_path: Path) -> None:
    section = {"sft_gold": {"train": {"learning_rate": 5e-7}}, "dpo_gold->dco": {"rounds": 2}}
    comparison = make_comparison(tmp_path, TABLE_1, compare=section)
    configs = {one.method: one.config for one in comparison.contenders}
    trains = {method: (c.train.learning_rate, c.train.epochs, c.train.beta) for method, c in configs.items()}
    assert trains == {
        "sft_gold": (5e-7, 3, 0.1),
        "dpo_gold": (5e-6, 3, 0.1),
        "calm": (5e-6, 3, 0.1),
        "dpo_gold->dco": (1e-3, 4, 1.0),
        "dco": (1e-3, 4, 1.0),
    }
    assert {c.train.batch_pairs for c in configs.values()} == {16}
    assert {method: c.rounds for method, c in configs.items() if c.rounds > 1} == {"dpo_gold->dco": 2}


def test_overrides_apply_to_all_methods_or_to_one(tmp_path: Path) -> None:
    overrides = ("train.epochs=1", "compare.dpo_gold.train.epochs=2", "compare.calm.train.beta=0.2", "name=other")
    section = {"calm": {"train": {"epochs": 7, "beta": 0.3}}}
    comparison = make_comparison(tmp_path, ["dpo_gold", "calm", "dco"], overrides, compare=section)
    assert comparison.name == "other"
    found = {one.config.name: (one.config.train.epochs, one.config.train.beta) for one in comparison.contenders}
    assert found == {"other-dpo_gold": (2, 0.1), "other-calm": (1, 0.2), "other-dco": (1, 1.0)}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["dpo_golden"], "dpo_golden is not known; did you mean dpo_gold"),
        (["dpo_gold-"], "quote the arrow: 'dpo_gold->dco'"),
        (["base->dco"], "base is not known"),
        (["dpo_gold->"], "is not known"),
    ],
)
def test_unknown_methods_are_rejected(methods: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        named_methods(methods)


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"candidates": None}, (), "candidates: is missing"),
        ({"compare": {"clam": {}}}, (), "clam is not known; did you mean calm"),
        ({"compare": {"calm": 3}}, (), "must map methods to keys"),
        ({"compare": {"calm": {"name": "x"}}}, (), "calm.name: cannot be set per method"),
        ({"compare": {"calm": {"rouds": 1}}}, (), "method calm, is not a valid recipe:\n.*did you mean rounds"),
        ({"compare": {"calm": {"seed": 1}}}, (), "seed must be the same for all methods, but calm differs"),
        ({"compare": {"calm": {"train": {"lora": {"r": 64}}}}}, (), "train.lora must be the same"),
        ({"rounds": 0}, (), "rounds: is 0 for dco"),
        ({}, ("method=calm",), "set methods with --methods"),
        ({}, ("candidates.form=samples",), "this method does not draw its candidates from samples"),
        (
            {"model": "/m", "candidates": {}, "preferences": {}, "questions": {"align": "q.jsonl"}}, (),
            "compared on held-out questions",
        ),
    ],
)  # fmt: skip
def test_invalid_comparisons_are_rejected(
    tmp_path: Path, changes: dict[str, Any], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_comparison(tmp_path, ["dco", "calm"], overrides, **changes)


def test_bad_input_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path))
    assert main([recipe, "--methods", "base"]) == 2
    assert main([recipe, "--methods", "base", "dco", "train.epoch=2"]) == 2  # overrides may follow --methods
    assert main([recipe, "dco/tables"]) == 2
    printed = capsys.readouterr().err
    for words in ("name a method to compare with base", "did you mean epochs", "choose a row of a table"):
        assert words in printed
    assert not list(tmp_path.glob("t1-*"))


def test_run_with_another_recipe_stops_the_whole_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = make_comparison(tmp_path, ["calm", "dco"])
    dco = comparison.contenders[1]
    dco.run.begin(dco.config.as_record(), {}, None)
    dco.run.stage(1, "train").finish({})
    assert main([str(tmp_path / "recipe.yaml"), "--methods", "calm", "dco", "train.epochs=2"]) == 2
    assert "train.epochs: 4 in the run, 2 in the recipe" in capsys.readouterr().err
    assert not (tmp_path / "t1-calm").exists()


def test_demo_compares_all_methods_and_is_itself_a_recipe() -> None:
    comparison = plan(DEMO, TABLE_1, ["storage=/nowhere"])
    assert [one.method for one in comparison.contenders] == TABLE_1[1:]
    alone, dco = load_config(DEMO), comparison.contenders[-1].config
    assert alone.train == dco.train


def write_stage(run: RunDirectory, number: int, name: str, policy: str) -> Stage:
    stage = run.stage(number, name)
    for chunk in ("00000-en", "00000-fr"):
        rows = [completion("A", chunk[-2:]) | {"policy": policy}]
        stage.write(chunk, table(Completion, rows))  # any rows with a policy
    stage.finish({"policy": policy, "seconds": 2.0})
    return stage


def test_results_of_the_start_are_copied_under_its_policy_name(tmp_path: Path) -> None:
    dpo, chain, calm, sft = make_comparison(tmp_path, ["dpo_gold->dco", "calm", "sft"]).contenders
    trained = Policy("r0001-abcdefgh", 1, "adapter", "there", "abcdefgh")
    start = Policy("start-abcdefgh", 0, "adapter", "here", "abcdefgh")
    for part in ("evaluate", "score"):
        write_stage(dpo.run, 0, part, "base")
        write_stage(dpo.run, 1, part, trained.name)
    dpo.run.stage(1, "train").finish({"policy": trained.as_json()})
    samples = write_stage(calm.run, 1, "sample", "base")

    chain.run.storage.write_json("start.json", start.as_json())  # as copied when the run was launched
    share_start(chain, [dpo, calm, sft])
    share_start(sft, [dpo, chain, calm])
    for part in ("evaluate", "score"):
        copied = chain.run.stage(0, part)
        assert copied.record == {
            "policy": start.name, "seconds": 2.0, "copied_from": dpo.run.stage(1, part).storage.uri(),
        }  # fmt: skip
        before, after = rows_of(dpo.run.stage(1, part).read()), rows_of(copied.read())
        assert after == [row | {"policy": start.name} for row in before]
        assert sft.run.stage(0, part).record["copied_from"] == dpo.run.stage(0, part).storage.uri()
    assert not chain.run.stage(1, "sample").is_finished  # DCO samples nothing
    assert sft.run.stage(1, "sample").storage.read("00000-fr.parquet") == samples.storage.read("00000-fr.parquet")


def test_interrupted_copy_is_not_a_finished_stage(tmp_path: Path) -> None:
    run, other = RunDirectory(str(tmp_path), "run"), RunDirectory(str(tmp_path), "other")
    stage = write_stage(other, 1, "sample", "r0001-abc")
    whole = stage.storage.read("00000-fr.parquet")
    stage.storage.write("00000-fr.parquet", b"corrupt")
    with pytest.raises(pa.ArrowInvalid, match="Parquet"):
        run.stage(0, "sample").copy(stage, "start-abc")
    assert run.stage(0, "sample").chunks() == {"00000-en"}
    assert not run.stage(0, "sample").is_finished
    stage.storage.write("00000-fr.parquet", whole)
    run.stage(0, "sample").copy(stage, "start-abc")
    assert run.stage(0, "sample").is_finished
    assert {row["policy"] for row in rows_of(run.stage(0, "sample").read())} == {"start-abc"}


def test_all_runs_share_the_same_questions(tmp_path: Path) -> None:
    contenders = make_comparison(tmp_path, ["calm", "dco", "sft"]).contenders
    runs = [one.run for one in contenders]
    for split in ("align", "held_out"):
        stage = runs[0].questions(split)
        stage.write("00000", table(Question, [question("q1", "en"), question("q1", "fr")]))
        stage.storage.write("bad_rows.jsonl", b"{}\n")
        stage.finish({"questions": 1})
    share_questions(runs[1], [runs[0], runs[2]])
    check_common_start(contenders)
    copied = runs[1].questions("held_out")
    assert copied.storage.read("bad_rows.jsonl") == b"{}\n"
    assert copied.record["questions"] == 1
    runs[2].questions("held_out").write("00000", table(Question, [question("q2", "en"), question("q2", "fr")]))
    runs[2].questions("held_out").finish({})
    message = r"t1-sft and .*t1-calm cannot be compared: their questions \(held_out\) differ"
    with pytest.raises(InputError, match=message):
        check_common_start(contenders)


def test_runs_of_different_models_are_not_compared(tmp_path: Path) -> None:
    contenders = make_comparison(tmp_path, ["calm", "dco"]).contenders
    for one, sha256 in zip(contenders, ("abc", "def"), strict=True):
        one.run.storage.write_json("model.json", RunModel("world-0", "there", sha256).__dict__)
    with pytest.raises(InputError, match=r"t1-dco and .*t1-calm cannot be compared: their models differ"):
        check_common_start(contenders)


def test_dco_after_dpo_must_start_from_the_compared_dpo(tmp_path: Path) -> None:
    contenders = make_comparison(tmp_path, ["dpo_gold->dco"]).contenders
    dpo, chain = contenders
    dpo.run.stage(1, "train").finish({"policy": Policy("r0001-new", 1, "adapter", "there", "new").as_json()})
    dpo.run.finish({})
    for sha256 in ("new", "old"):
        chain.run.storage.write_json("start.json", Policy(f"start-{sha256}", 0, "adapter", "here", sha256).as_json())
        if sha256 == "new":
            check_common_start(contenders)
    message = r"t1-dpo_gold-dco and .*t1-dpo_gold cannot be compared: the first does not start from the last policy"
    with pytest.raises(InputError, match=message):
        check_common_start(contenders)


def entry(rankc: float, accuracy: float, pairs: int, **more: Any) -> dict[str, Any]:
    return {
        "policy": "p", "rankc_en": rankc, "rankc_mean": rankc - 0.1, "accuracy": {"en": accuracy, "fr": accuracy / 2},
        "accuracy_others": accuracy / 2, "pairs": pairs, "seconds": {"train": 10.0 * pairs, "evaluate": 2.0}, **more,
    }  # fmt: skip


def test_table_shows_base_in_percent_and_others_as_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = make_comparison(tmp_path, ["base", "calm", "dco"])
    optimal = {"held_out": entry(0.9, 0.75, 0)}
    for one, last in zip(
        comparison.contenders, (entry(0.625, 0.375, 4), entry(0.75, 0.5, 8, optimal=optimal)), strict=True
    ):
        one.run.storage.write_json("summary.json", {"rounds": [entry(0.5, 0.5, 0), last]})
    report(comparison)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["base", "50.0", "40.0", "50.0", "25.0", "0", "2"] in lines
    assert ["calm", "+12.5", "+12.5", "-12.5", "-6.2", "4", "42"] in lines
    assert ["dco", "+25.0", "+25.0", "+0.0", "+0.0", "8", "82"] in lines
    assert ["pi*", "of", "dco", "+40.0", "+40.0", "+25.0", "+12.5", "-", "-"] in lines
    written = json.loads((tmp_path / "t1-compare.json").read_text())
    assert [row["method"] for row in written["rows"]] == ["base", "calm", "dco", "pi* of dco"]
    assert written["rows"][1]["rankc_en"] == 0.625


def test_missing_value_has_no_difference() -> None:
    assert change(None, 0.5) == change(0.5, None) == "-"
    assert change(0.5, 0.25) == "+25.0"


@pytest.mark.parametrize("method", ["sft_gold", "dpo_gold", "calm"])
def test_compared_baselines_match_the_papers_own_recipes(method: str) -> None:
    comparison = plan("dco/tables:table1[aya,dco]", [method], [])
    own = load_config(f"dco/tables:table1[aya,{method}]")
    (one,) = comparison.contenders
    assert one.config.model_copy(update={"name": own.name}) == own
