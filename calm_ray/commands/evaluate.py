"""`calm-ray evaluate`: evaluates any policy of a run on any question file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from calm_ray.cluster.connection import cluster
from calm_ray.core.console import console, say
from calm_ray.core.errors import InputError
from calm_ray.engines.pool import EnginePool
from calm_ray.evaluation.tables import evaluation_table
from calm_ray.job.engines import engine_spec
from calm_ray.job.job import Job
from calm_ray.job.open_run import OpenedRun, open_run
from calm_ray.job.prompt_limits import candidate_check, check_lengths
from calm_ray.planning.needs import needs_of
from calm_ray.questions.reader import load_questions, write_chunks
from calm_ray.run.lock import locked
from calm_ray.run.stage import Stage


def evaluate_policy(
    location: str, questions: str | None, round_number: int | None, plugins: Sequence[str] = ()
) -> None:
    """Asks a run's policy (default: the last) a file's questions (default: the held-out ones) and prints a table.

    Keeps the answers in the run's `evaluations` folder.
    """
    opened = open_run(location, plugins)
    config, run = opened.config, opened.run
    answers, *_ = config.evaluation
    policy, model = opened.policy(round_number), opened.model()
    asked, label = _questions(opened, questions, is_written=answers.writes)
    output = Stage(run.storage.under(f"evaluations/{label}/{policy.name}"))
    if not output.is_finished:
        with locked(run.storage, say), cluster(needs_of(config, training=False)):
            output.recover()
            with EnginePool(engine_spec(config, model), config.languages, say) as engines:
                round = Job(config, run, model, engines).round(policy.round, policy, policy)
                answers.ask(round, policy, asked, output, f"evaluate {policy.name}")
    console.print(evaluation_table(f"policy {policy.name} on {label}, percent", output.record["report"]))


def _questions(opened: OpenedRun, source: str | None, *, is_written: bool) -> tuple[Stage, str]:
    """The questions to ask, in chunks, and their label."""
    config, run, model = opened.config, opened.run, opened.model()
    if source is None:
        asked = run.questions("held_out")
        if not asked.chunks():
            raise InputError(f"{run.uri} has no held-out questions; pass a file with --questions")
        return asked, "held-out"
    sources, folder = config.questions, model.local_folder(weights=False)
    rows = load_questions(
        source,
        config.evaluation_languages,
        needs_gold=True,
        on_bad_row=sources.on_bad_row,
        language=sources.language,
        check=candidate_check(folder, config),
    ).questions
    if is_written:
        check_lengths(folder, rows, config)
    content = json.dumps(rows, sort_keys=True).encode()
    label = f"{re.sub(r'[^A-Za-z0-9]+', '-', Path(source).stem)}-{hashlib.sha256(content).hexdigest()[:8]}"
    asked = Stage(run.storage.under(f"evaluations/{label}/questions"))
    write_chunks(rows, asked, config.sampling.prompts_per_chunk)
    return asked, label
