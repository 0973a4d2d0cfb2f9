"""Whole DCO runs with a randomly initialized model: scores, pairs, targets, training and the optimal policy."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calm_ray.config import Config, parse_config
from calm_ray.core.errors import InputError
from calm_ray.core.rows import rows_of
from calm_ray.launch import align
from calm_ray.run.directory import RunDirectory
from calm_ray.run.stage import Stage
from calm_ray.testing import word_tokenizer, write_tiny_model

pytestmark = pytest.mark.usefixtures("ray_8_cpus")

LANGUAGES = ["en", "fr", "de"]
WORDS = [f"{language}{number}" for language in LANGUAGES for number in range(20)]
CHOICES = 4
PAIRS = 6
"""Number of pairs of four candidates."""
BETA = 0.5


def write_questions(file: Path, count: int, first: int = 0, choices: int = CHOICES) -> str:
    """Writes questions of a few words in each language. With `choices=0` they are open, without gold answers."""
    lines = []
    for number in range(first, first + count):
        for language in LANGUAGES:
            words = [f"{language}{(7 * number + n * n + n) % 20}" for n in range(3 + choices)]
            row = {"question_id": f"q{number}", "language": language, "text": " ".join(words[:3])}
            row |= {"choices": [f"{word} {words[0]}" for word in words[3:]], "gold": "ABCD"[number % 4]}  # type: ignore[dict-item]
            lines.append(json.dumps(row if choices else {**row, "choices": [], "gold": None}))
    file.write_text("\n".join(lines))
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dco")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Callable[..., Config]:
    """Makes the configuration of a small run; keyword arguments override its keys."""
    model = write_tiny_model(folder / "model", word_tokenizer(WORDS))
    questions = {
        "align": write_questions(folder / "align.jsonl", 8),
        "evaluate": write_questions(folder / "evaluate.jsonl", 6, first=8),
    }

    def make(name: str, **changes: Any) -> Config:
        raw: dict[str, Any] = {
            "name": name,
            "storage": str(folder / "runs"),
            "method": "dco",
            "languages": ["en", "fr"],
            "model": str(model),
            "device": "cpu",
            "questions": questions,
            "candidates": {"form": "choices", "pairs": PAIRS},
            "sampling": {"max_new_tokens": 6, "prompt": "choices", "prompts_per_chunk": 5},
            "engines": {"shared": 1, "cpus": 0.5, "dtype": "float32", "args": {"max_model_len": 128}},
            "train": {
                "beta": BETA, "learning_rate": 3e-3, "epochs": 10, "batch_pairs": 1000, "dtype": "float32",
                "cpus_per_worker": 0.5,
            },
        }  # fmt: skip
        for key, value in changes.items():
            raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
        return parse_config(raw)

    return make


def pairs_of(run: RunDirectory, number: int) -> list[dict[str, Any]]:
    return rows_of(run.stage(number, "pairs").read())


def first_loss(run: RunDirectory, number: int) -> float:
    """The loss of a round's first step, a batch of all pairs.

    Checks that it is the mean target: at that step the policy is its reference, so all margins relative to it are 0.
    """
    lines = [json.loads(line) for line in run.storage.read("metrics.jsonl").splitlines()]
    loss = next(float(row["train/loss"]) for row in lines if row["round"] == number and row.get("step") == 1)
    targets = [abs(row["target_margin"]) for row in pairs_of(run, number)]
    assert loss == pytest.approx(sum(targets) / len(targets), abs=1e-4)
    return loss


def scored_in(stage: Stage) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["question_id"], row["language"]): row for row in rows_of(stage.read())}


def policies_in(stage: Stage) -> set[str]:
    return {row["policy"] for row in rows_of(stage.read(["policy"]))}


@pytest.fixture(scope="module")
def finished(recipe: Callable[..., Config]) -> RunDirectory:
    """A run of two rounds with LoRA; engines load adapters."""
    return align(recipe("finished", rounds=2))


def test_first_loss_of_a_round_is_its_mean_target(finished: RunDirectory) -> None:
    losses = [first_loss(finished, number) for number in (1, 2)]
    # All pairs are drawn, so the report on the candidates before training has the same mean.
    before = finished.summary["rounds"][0]["optimal"]["training"]["margin_distance"]
    assert losses[0] == pytest.approx(before, abs=1e-4)
    assert losses[1] != losses[0]


def test_target_is_the_reference_margin_in_the_other_language(finished: RunDirectory) -> None:
    """Both by the engines' scores, from which pairs are made, and by the trainer's own."""
    scored = scored_in(finished.stage(0, "score"))
    rows = rows_of(finished.stage(1, "train").storage.read_table("reference.parquet"))
    trained = {(row["question_id"], row["language"], row["number"]): row["logps"] for row in rows}
    for row in pairs_of(finished, 1):
        other = {"en": "fr", "fr": "en"}[row["language"]]
        here, there = (scored[row["question_id"], code] for code in (row["language"], other))
        chosen, rejected = (here["texts"].index(row[side]) for side in ("chosen", "rejected"))
        assert row["target_margin"] == pytest.approx(BETA * (there["logps"][chosen] - there["logps"][rejected]))
        chosen_logp, rejected_logp = trained[row["question_id"], other, row["pair"]]
        assert row["target_margin"] == pytest.approx(BETA * (chosen_logp - rejected_logp), abs=1e-3)


def test_previous_policy_is_the_reference_and_is_scored_once(finished: RunDirectory) -> None:
    names = [entry["policy"] for entry in finished.summary["rounds"]]
    assert len(set(names)) == 3
    for number in (1, 2):
        before = {names[number - 1]}
        assert {row["policy"] for row in pairs_of(finished, number)} == before
        logps = finished.stage(number, "train").storage.read_table("reference.parquet")
        assert set(logps["reference"].to_pylist()) == before
        folders = finished.storage.under(f"rounds/{number}").names()
        assert not [name for name in folders if name.startswith("reference")]
    for number, name in enumerate(names):
        for part in ("score", "evaluate"):
            assert policies_in(finished.stage(number, part)) == {name}


def test_training_moves_the_policy_towards_the_optimal_one(finished: RunDirectory) -> None:
    before, after = (entry["optimal"]["training"] for entry in finished.summary["rounds"][:2])
    assert after["margin_distance"] < 0.7 * before["margin_distance"]


def test_summary_contains_the_dco_report(finished: RunDirectory) -> None:
    summary = finished.summary
    assert summary["method"] == "dco"
    figures = {"accuracy", "accuracy_mean", "consistency", "ac3", "rankc", "rankc_mean", "rankc_en", "top1", "entropy"}
    for entry in summary["rounds"]:
        assert {*figures, "training", "optimal"} <= set(entry)
        for report in (entry, entry["training"], *entry["optimal"].values()):
            assert figures <= set(report)
            assert set(report["rankc"]) == {"en-fr"}
            assert 0 < report["rankc_mean"] <= 1
        assert set(entry["optimal"]) == {"training", "held_out"}
        # Lemma 1: with equal gamma in both directions, the optimal policy ranks the same in both languages.
        assert entry["optimal"]["held_out"]["rankc_mean"] == pytest.approx(1.0)
    assert [entry.get("pairs", 0) for entry in summary["rounds"]] == [0, 96, 96]


@pytest.mark.slow
def test_lost_pairs_are_regenerated_identically(finished: RunDirectory, recipe: Callable[..., Config]) -> None:
    pairs = finished.stage(2, "pairs")
    before, files = pairs_of(finished, 2), sorted(pairs.chunks())
    assert files == ["00000", "00001"]
    kept = Path(pairs.storage.path("00000.parquet"))
    written = kept.stat().st_mtime_ns
    for name in ("finished.json", "rounds/2/pairs/stage.json", "rounds/2/pairs/00001.parquet"):
        finished.storage.delete(name)
    align(recipe("finished", rounds=2))
    assert pairs_of(finished, 2) == before
    assert kept.stat().st_mtime_ns == written
    assert pairs.record["pairs"] == len(before)
    assert finished.storage.exists("finished.json")


@pytest.mark.slow
def test_candidates_for_open_questions_are_sampled(folder: Path, recipe: Callable[..., Config]) -> None:
    """Online DCO: candidates are completions in either language and the model's translations into the other."""
    sources = {"align": write_questions(folder / "open.jsonl", 8, choices=0), "evaluate": None}
    candidates = {"form": "samples", "max_candidates": 3}
    run = align(recipe("online", questions=sources, candidates=candidates))
    completions: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in rows_of(run.stage(1, "sample").read()):
        completions[row["question_id"], row["language"]].append((row["text"], row["token_ids"]))
    scored = scored_in(run.stage(1, "score"))
    ids, sampled_in = {question_id for question_id, _ in scored}, set[str]()
    for question_id in ids:
        rows = {code: scored[question_id, code] for code in ("en", "fr")}
        lists = {code: list(zip(row["texts"], row["token_ids"], strict=True)) for code, row in rows.items()}
        assert len(lists["en"]) == len(lists["fr"]) in (2, 3)
        for index in range(len(lists["en"])):
            own_languages = {code for code, side in lists.items() if side[index] in completions[question_id, code]}
            assert own_languages
            sampled_in |= own_languages
    assert sampled_in == {"en", "fr"}
    assert {row["question_id"] for row in pairs_of(run, 1)} == ids
    assert first_loss(run, 1) > 0
    assert policies_in(run.stage(1, "reference_score")) == {"base"}
    assert policies_in(run.stage(1, "score")) == {run.summary["rounds"][1]["policy"]}
    assert set(run.summary["rounds"][1]["optimal"]) == {"training"}


@pytest.mark.slow
def test_full_fine_tuning(recipe: Callable[..., Config]) -> None:
    train = {"lora": None, "epochs": 1, "learning_rate": 1e-4, "workers": 2}
    run = align(recipe("full", train=train, engines={"refresh": "merged"}, candidates={"pairs": 1}))
    assert len(pairs_of(run, 1)) == 8 * 2
    assert first_loss(run, 1) > 0
    assert run.stage(1, "train").record["policy"]["kind"] == "weights"
    assert policies_in(run.stage(1, "score")) == {run.summary["rounds"][1]["policy"]}
    before, after = (entry["optimal"]["training"]["margin_distance"] for entry in run.summary["rounds"])
    assert after < before


@pytest.mark.slow
def test_zero_rounds_report_only_the_optimal_policy(recipe: Callable[..., Config]) -> None:
    run = align(recipe("probe", rounds=0, dco={"anchor": {"language": "en", "strength": 100.0}}))
    (entry,) = run.summary["rounds"]
    assert entry["policy"] == "base"
    optimal = entry["optimal"]["held_out"]
    assert optimal["margin_distance"] > 0
    # A strong anchor keeps its own answers, and the other language adopts them.
    assert optimal["accuracy"]["en"] == optimal["accuracy"]["fr"] == entry["accuracy"]["en"]
    assert run.storage.under("rounds").names() == ["0"]


@pytest.fixture(scope="module")
def earlier(recipe: Callable[..., Config]) -> RunDirectory:
    """A DPO run with gold answers, in three languages."""
    return align(recipe("earlier", method="dpo_gold", languages=LANGUAGES))


@pytest.mark.slow
def test_gold_answers_are_chosen_over_all_other_candidates(earlier: RunDirectory) -> None:
    scored, pairs = scored_in(earlier.stage(0, "score")), pairs_of(earlier, 1)
    assert len(pairs) == 8 * 3 * 3  # one pair per wrong candidate and language
    for row in pairs:
        question = scored[row["question_id"], row["language"]]
        assert row["chosen"] == question["texts"][question["right"]] != row["rejected"]
        assert row["target_margin"] is None


@pytest.mark.slow
def test_run_starts_from_an_earlier_policy(earlier: RunDirectory, recipe: Callable[..., Config]) -> None:
    """With bilingual DCO in three languages: each pair of candidates is compared in two of them."""
    run = align(
        recipe(
            "later", languages=LANGUAGES, init_from="earlier", candidates={"pairs": 2}, dco={"languages": "bilingual"}
        )
    )
    last = earlier.summary["rounds"][-1]
    start = run.start
    assert start is not None
    assert start.name != last["policy"]
    assert start.location == run.storage.uri("start")
    folder = Path(earlier.storage.path("rounds/1/train/policy"))
    assert all(run.storage.read(f"start/{file.name}") == file.read_bytes() for file in folder.iterdir())
    pairs = pairs_of(run, 1)
    assert {row["policy"] for row in pairs} == policies_in(run.stage(0, "evaluate")) == {start.name}
    assert first_loss(run, 1) > 0
    first = run.summary["rounds"][0]
    assert first["policy"] == start.name
    for name in ("accuracy", "rankc"):
        assert first[name] == pytest.approx(last[name])
    assert "optimal" not in first  # every two of the three languages have their own
    languages: dict[tuple[str, int], set[str]] = defaultdict(set)
    for row in pairs:
        languages[row["question_id"], row["pair"]].add(row["language"])
    assert len(pairs) == 2 * len(languages) == 2 * 8 * 2
    assert {len(codes) for codes in languages.values()} == {2}
    assert len({frozenset(codes) for codes in languages.values()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"lora": {"r": 16}}}, r"train.lora must match that of .*earlier: r=8"),
        ({"train": {"lora": None}, "engines": {"refresh": "merged"}}, r"train.lora must match that of .*earlier: r=8"),
        ({"model": "another"}, r"init_from: .*earlier trained .*/model, but model is .*/another here"),
        ({"init_from": "nowhere"}, r"init_from: .*nowhere: there is no run here"),
        ({"init_from": "probe/rounds"}, r"init_from: .*probe/rounds: there is no run here"),
    ],
)
def test_incompatible_init_from_is_refused_before_engines_start(
    earlier: RunDirectory, recipe: Callable[..., Config], folder: Path, changes: dict[str, Any], message: str
) -> None:
    if "model" in changes:
        changes = {"model": str(shutil.copytree(folder / "model", folder / changes["model"]))}
    config = recipe("refused", **{"languages": LANGUAGES, "init_from": earlier.uri, **changes})
    with pytest.raises(InputError, match=message):
        align(config)
    assert not Path(config.storage, "refused").exists()


@pytest.mark.slow
def test_run_cannot_start_from_itself(earlier: RunDirectory, recipe: Callable[..., Config]) -> None:
    with pytest.raises(InputError, match="is this run itself"):
        align(recipe("earlier", init_from="earlier"), overwrite=True)
    assert earlier.storage.exists("finished.json")
