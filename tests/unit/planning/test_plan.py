"""`calm-ray plan`: counts, time estimates and output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from factories import table_rows

from calm_ray.commands.plan import duration, show_plan
from calm_ray.config import Config
from calm_ray.core.errors import InputError, ResourceError
from calm_ray.planning.durations import BANDWIDTH_FRACTION, FLOPS_FRACTION, train_flops
from calm_ray.planning.hardware import identical_nodes
from calm_ray.planning.model_shape import shape_of
from calm_ray.planning.plan import Plan, make_plan
from calm_ray.planning.work import Counts, count_questions, work_of
from calm_ray.recipes.load import load_config

RECIPES = ["demo", "llama3_8b", "dco/demo", "dco/compare_demo", *table_rows("calm"), *table_rows("dco")]
LLAMA = "llama3_8b"


@pytest.fixture
def questions(tmp_path: Path) -> list[str]:
    """Overrides for two questions to align on and one held out, each in six languages."""
    for name, count in (("align", 2), ("evaluate", 1)):
        rows = [
            {"question_id": f"{name}{i}", "language": code, "text": "t" * 32, "choices": ["aaaa", "bbbb"], "gold": "A"}
            for i in range(count)
            for code in ("en", "zh", "fr", "de", "it", "ja")
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [f"questions.{name}={tmp_path}/{name}.jsonl" for name in ("align", "evaluate")]


def plan_for(config: Config, nodes: int = 2) -> Plan:
    return make_plan(config, shape_of(config.model), identical_nodes(nodes))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_on_two_nodes_of_eight_gpus(recipe: str) -> None:
    config = load_config(recipe)
    plan = make_plan(config, shape_of(config.model), identical_nodes(2))
    assert sum(place.engines for place in plan.layout.places) == len(config.engines.homes(config.languages))
    workers = config.train.max_workers if config.rounds else 0
    assert sum(place.workers for place in plan.layout.places) == workers
    assert ("train" in plan.seconds) == (config.device == "gpu" and config.rounds > 0)
    assert json.dumps(plan.as_json())


def test_completions_and_pairs_are_counted(questions: list[str]) -> None:
    config = load_config(LLAMA, questions)
    counts = count_questions(config)
    assert counts == Counts(align=2, evaluate=1, is_counted=True, prompt_tokens=10, choices=2)  # 40 bytes, 4 per token
    work = work_of(config, shape_of(config.model), counts)
    assert list(work.steps) == ["sample", "pairs", "train", "evaluate", "changed"]
    sample, pairs, train, evaluate, _ = work.steps.values()
    assert (sample.rows, sample.read, sample.written) == (2 * 6 * 3, 2 * 6 * 10, 36 * 512)
    assert (pairs.rows, pairs.written) == (36, 36 * 512)  # as if every chosen side had to be translated
    assert (train.rows, train.trained) == (36, 36 * 2 * (10 + 512))
    assert (evaluate.read, evaluate.written) == (6 * 10, 6 * 512)
    assert work.disk["sample"] == 36 * 522 * 12
    assert work.disk["adapter"] == 4 * 3_407_872
    assert work.disk["checkpoints"] == 2 * 3 * 4 * 3_407_872


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ([], {"model": 16e9, "2 policies": 2 * 13_631_488, "checkpoint": 3 * 13_631_488}),
        (["model=/shared/llama-8b"], {"2 policies": 2 * 13_631_488, "checkpoint": 3 * 13_631_488}),
        (["engines.refresh=merged"],
         {"model": 16e9, "2 policies": 2 * 13_631_488, "2 merged models": 32e9, "checkpoint": 3 * 13_631_488}),
        (["engines.refresh=merged", "train.lora=null"], {"model": 16e9, "2 policies": 32e9, "checkpoint": 96e9}),
    ],
)  # fmt: skip
def test_node_cache_is_counted(overrides: list[str], sizes: dict[str, float]) -> None:
    config = load_config(LLAMA, overrides)
    cache = work_of(config, shape_of(config.model), count_questions(config)).cache
    assert {name: size for name, size in cache.items() if size} == sizes


def test_split_divides_the_questions(questions: list[str]) -> None:
    config = load_config(LLAMA, [questions[0], "questions.evaluate=null", "questions.split={train: 1}"])
    counts = count_questions(config)
    assert (counts.align, counts.evaluate) == (1, 1)


def test_dco_scores_candidates_and_draws_pairs() -> None:
    config = load_config("dco/tables:table2_xcsqa[qwen2.5,fr]")
    work = work_of(config, shape_of(config.model), Counts(800, 200, True, prompt_tokens=100, choices=5))
    assert "sample" not in work.steps
    assert not any(step.written for step in work.steps.values())
    assert work.steps["score"].read == 800 * 2 * 100  # one request for all letters
    assert work.steps["reference_score"].read == 0  # known from the previous round
    train = work.steps["train"]
    assert (train.rows, train.trained) == (800 * 2 * 7, 800 * 2 * 7 * 2 * 101)
    assert work.steps["evaluate"].read == 200 * 2 * 100
    assert work.disk["weights"] == 2 * 14 * 10**9


def test_missing_question_files_are_not_counted() -> None:
    assert not count_questions(load_config(LLAMA)).is_counted


def test_demo_counts_its_own_questions() -> None:
    counts = count_questions(load_config())
    assert counts.is_counted
    assert counts.align > counts.evaluate > 0


def test_durations_follow_from_the_data_sheet(questions: list[str]) -> None:
    """A100 with 80 GB: 312 TFLOP/s, 2,039 GB/s."""
    plan = plan_for(load_config(LLAMA, questions))
    training = 8 * 312e12 * FLOPS_FRACTION  # FLOP/s of eight workers
    tokens = 36 * 2 * 522
    assert plan.seconds["train"] == pytest.approx(3 * 6 * 8e9 * tokens / training)  # 3 epochs; 2 + 2 + 2 FLOPs
    assert plan.seconds["reference"] == pytest.approx(2 * 8e9 * tokens / training)
    sequences, length = 36 / 6, 10 + 512 / 2  # per engine
    step = (2 * 8e9 + sequences * length * 131072) / (2.039e12 * BANDWIDTH_FRACTION)
    reading = 2 * 6 * 10 * 2 * 8e9 / (6 * 312e12 * FLOPS_FRACTION)
    assert plan.seconds["sample"] == pytest.approx(36 * 512 * step / sequences / 6 + reading)


@pytest.mark.parametrize(
    ("overrides", "flops"),
    [
        (["train.activation_checkpointing=false"], 4),
        ([], 6),
        (["train.lora=null", "engines.refresh=merged"], 8),
    ],
)
def test_flops_of_a_training_step(overrides: list[str], flops: int) -> None:
    assert train_flops(load_config(LLAMA, overrides)) == flops


def test_extra_workers_need_larger_batches(questions: list[str]) -> None:
    """A step of eight pairs keeps at most eight workers busy."""
    seconds = [
        plan_for(load_config(LLAMA, [*questions, *more]), nodes=4).seconds["train"]
        for more in ([], ["train.workers=16"], ["train.workers=16", "train.batch_pairs=16"])
    ]
    assert seconds[0] == seconds[1] == pytest.approx(2 * seconds[2])


def test_plan_is_printed(questions: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(LLAMA, ["engines.tensor_parallel_size=2", *questions], nodes=3, gpus_per_node=8, gpu_memory=80)
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "STRICT_PACK, 2",
        "node 1",
        "36 completions, tokens: 120 read,",
        "A100-80, 312 TFLOP/s",
        "8B from its name",
        "disk in the run's storage, per round: at most 96.1 MB (sample",
        "disk in the cache of each node: at most 16.1 GB (model 16.0 GB, 2 policies 27.3 MB, checkpoint 40.9 MB)",
    ):
        assert words in printed


def test_plan_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(LLAMA, as_json=True)
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [place["engines"] for place in plan["nodes"]] == [6, 0]  # the fewest nodes with eight GPUs each
    assert plan["engine"]["kv_per_token"] == 131072
    show_plan(None, as_json=True)
    demo: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [node["node"]["name"] for node in demo["nodes"]] == ["this machine"]
    assert demo["seconds"] == {}


def test_model_config_gives_the_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    show_plan(LLAMA, ["model=openai/gpt"], nodes=2, as_json=True, model_config=tmp_path / "config.json")
    assert json.loads(capsys.readouterr().out)["model"]["hidden"] == 64
    with pytest.raises(InputError, match="--model-config"):
        show_plan(LLAMA, ["model=openai/gpt"], nodes=2)


def test_impossible_plans_and_bad_options_are_rejected() -> None:
    with pytest.raises(ResourceError, match="no room for 6 of 8 training workers"):
        show_plan(LLAMA, nodes=1)
    with pytest.raises(InputError, match="drop it or the other options"):
        show_plan(LLAMA, cluster="cluster.yaml", nodes=2)
    with pytest.raises(InputError, match="nodes: must be an integer"):
        show_plan(LLAMA, nodes=0)
    for option in ("model_config", "cluster"):
        with pytest.raises(InputError, match="cannot be used: File name too long"):
            show_plan(LLAMA, **{option: "x" * 300})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"model: xxx.*cannot be used: File name too long"):
        show_plan(LLAMA, [f"model={'x' * 300}-8b"])


def test_durations_are_human_readable() -> None:
    assert [duration(value) for value in (0.46, 59, 1000, 10_000)] == ["0.46 s", "59 s", "17 min", "2.8 h"]


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom calm_ray.commands.plan import show_plan\n"
        f"show_plan({str(LLAMA)!r}, nodes=2, as_json=True)\nshow_plan(None, as_json=True)\n"
        "print('LOADED', sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split("LOADED")[1]
    for name in ("vllm", "ray", "torch", "transformers"):
        assert f"'{name}'" not in loaded
