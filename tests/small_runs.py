"""Fixtures, mostly for tests/cluster and tests/chaos: real Ray on this machine, small real models.

tests/unit loads this module too, so heavy imports stay inside the fixtures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from filelock import FileLock

from calm_ray.core.sections import Lora
from calm_ray.demo.generator import build_world, world_questions
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import Policy, publish
from calm_ray.run.storage import Storage

if TYPE_CHECKING:
    from calm_ray.engines.actor import EngineActor
    from calm_ray.engines.generator import Likelihoods
    from calm_ray.training.model import PolicyModel

LANGUAGES = ["en", "fr"]
MOMENTS = int(os.environ.get("MOMENTS", "1"))
"""How many seeded random moments to inject each fault at (tests/chaos)."""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A separate cache of models and policies, shared by all processes of the test session."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("CALM_RAY_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo model pretrained for seconds: its answers are well-formed but mostly wrong."""
    from calm_ray.demo.pretraining import pretrain

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # shared by the processes of pytest-xdist, so that one of them trains it for all
    folder /= "babbler"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            pretrain(build_world(100), folder.with_suffix(".new"), [(150, {"question": 24})])
            folder.with_suffix(".new").rename(folder)
    return folder


@pytest.fixture(scope="session")
def atlas_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct: chat template, tied embeddings, three key/value heads for nine heads."""
    from calm_ray.core.errors import InputError
    from calm_ray.demo.atlas.model import convert, gguf_file

    try:
        source = gguf_file()
    except InputError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "atlas"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            convert(source, folder.with_suffix(".new"))
            folder.with_suffix(".new").rename(folder)
    return folder


@pytest.fixture(scope="session")
def question_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Demo world questions as user files: 24 to align on and 12 held out, in two languages."""
    folder = tmp_path_factory.mktemp("questions")
    files = []
    for name, rows, count in zip(("align", "evaluate"), world_questions(build_world(100)), (24, 12), strict=True):
        ids = list(dict.fromkeys(row["question_id"] for row in rows))[:count]
        chosen = [row for row in rows if row["question_id"] in ids and row["language"] in LANGUAGES]
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("\n".join(json.dumps(row) for row in chosen))
    return files[0], files[1]


@pytest.fixture(scope="session")
def make_recipe(
    babbler: Path, question_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Writes a recipe for a run of one small round; keyword arguments override its keys."""

    def make(**changes: Any) -> Path:
        align, evaluate = (str(file) for file in question_files)
        recipe: dict[str, Any] = {
            "languages": LANGUAGES,
            "model": str(babbler),
            "device": "cpu",
            "questions": {"align": align, "evaluate": evaluate},
            "sampling": {"max_new_tokens": 40, "prompt": "choices", "prompts_per_chunk": 8},
            "engines": {
                "shared": 1, "cpus": 0.5, "dtype": "float32", "refresh": "merged",
                # Too few tokens for all prompts of a chunk, so they are prefilled in several steps.
                "args": {"max_num_seqs": 64, "max_num_batched_tokens": 256},
            },
            "train": {
                "learning_rate": 1e-3, "epochs": 1, "dtype": "float32", "workers": 2, "cpus_per_worker": 0.5,
            },
        }  # fmt: skip
        for key, value in changes.items():
            recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
        file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    return make


@pytest.fixture(scope="session")
def ray_8_cpus(cache: Path) -> Iterator[None]:
    """Ray with more logical CPUs than the machine may have, so that tests do not wait for each other's actors."""
    import ray

    os.environ.setdefault("RAY_AUTH_TOKEN", "a" * 64)  # otherwise Ray writes a token to the user's home
    paths = [str(Path(__file__).parent / "chaos"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # engines load a logits processor from tests/chaos
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def make_adapter(model: Path, folder: Path, run: RunDirectory, round_number: int, lora: Lora) -> Policy:
    """Publishes an adapter with weights large enough to change the model's output."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(round_number)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return publish(folder, run.storage, f"policies/{round_number}", round_number, "adapter")


def random_adapters(trainer: PolicyModel, folder: Path, std: float) -> list[Policy]:
    """The base model, and two adapters with weights large enough to change its output."""
    policies = [Policy()]
    for number in (1, 2):
        trainer.load(Policy(), seed=number)
        for name, parameter in trainer.adapter_parameters():
            if ".lora_B." in name:
                parameter.detach().to_local().normal_(std=std)  # type: ignore[attr-defined]
        trainer.save(folder / str(number))
        policies.append(publish(folder / str(number), Storage(str(folder)), f"published/{number}", number, "adapter"))
    return policies


def scoring_engine() -> type[EngineActor]:
    """An engine that scores given candidates. The class is local, so that Ray pickles it by value."""
    from calm_ray.engines.actor import EngineActor

    class ScoringEngine(EngineActor):
        def likelihoods(self, jobs: list[tuple[list[int], list[list[int]]]], with_prompt: bool) -> list[Likelihoods]:
            """`jobs` are token ids of prompts and of their candidates."""
            prompts, candidates = [prompt for prompt, _ in jobs], [sides for _, sides in jobs]
            assert self._generator is not None
            return self._generator.score(prompts, candidates, with_prompt=with_prompt)

    return ScoringEngine
