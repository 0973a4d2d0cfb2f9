"""The pure core imports neither Ray nor vLLM, and parsing a command line imports nothing heavy."""

import subprocess
import sys

import pytest

CORE = [
    "calm_ray.core.rows",
    "calm_ray.core.languages",
    "calm_ray.core.seeds",
    "calm_ray.run.storage",
    "calm_ray.run.directory",
    "calm_ray.run.policies",
    "calm_ray.recipes",
    "calm_ray.questions.formats",
    "calm_ray.questions.reader",
    "calm_ray.questions.splits",
    "calm_ray.questions.survey",
    "calm_ray.questions.translation",
    "calm_ray.prompts.questions",
    "calm_ray.prompts.answers",
    "calm_ray.prompts.candidates",
    "calm_ray.engines.completion",
    "calm_ray.prompts.extraction",
    "calm_ray.methods.calm.recorded",
    "calm_ray.prompts.released",
    "calm_ray.methods.calm.voting",
    "calm_ray.methods.calm.pairing",
    "calm_ray.methods.calm.pairs",
    "calm_ray.methods.calm.from_columns",
    "calm_ray.methods.dco.gamma",
    "calm_ray.methods.dco.pairs",
    "calm_ray.methods.translation",
    "calm_ray.questions.subjects",
    "calm_ray.methods.dco.sampled_candidates",
    "calm_ray.evaluation.metrics",
    "calm_ray.evaluation.ranking",
    "calm_ray.evaluation.report",
    "calm_ray.methods.calm.vote_report",
    "calm_ray.evaluation.score_report",
    "calm_ray.evaluation.scores",
    "calm_ray.training.objectives",
    "calm_ray.training.batches",
    "calm_ray.training.loop",
    "calm_ray.training.model",
    "calm_ray.demo.generator",
    "calm_ray.demo.translator",
    "calm_ray.testing",
]


def loaded(code: str) -> set[str]:
    """The top-level modules that are there after running the code in a fresh process."""
    script = f"{code}\nimport sys\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_core_knows_neither_ray_nor_vllm() -> None:
    modules = loaded("\n".join(f"import {name}" for name in CORE))
    assert not modules & {"ray", "vllm"}


@pytest.mark.parametrize("arguments", [["align", "--help"], ["align", "--dry-run"], ["--help"]])
def test_parsing_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"from calm_ray.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass"
    assert not loaded(code) & {"torch", "ray", "vllm", "transformers", "numpy", "pyarrow"}
