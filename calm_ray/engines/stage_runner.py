"""Runs the engines on a stage: every missing chunk in every language, with progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from calm_ray.core.console import progress_bar
from calm_ray.engines.dispatcher import Dispatcher, skip_bad_prompts
from calm_ray.engines.pool import EnginePool
from calm_ray.engines.requests import ChunkRequest
from calm_ray.engines.tasks import ChunkTask
from calm_ray.run.bad_prompts import BadPrompts
from calm_ray.run.stage import Stage


def over_chunks_and_languages(
    pool: EnginePool,
    bad_prompts: BadPrompts,
    request: ChunkRequest[Any, Any],
    title: str,
    questions: Stage,
    output: Stage,
    languages: Sequence[str],
) -> Counter[str]:
    """Serves the request for each chunk and language that `output` lacks, under the pool's policy.

    Returns the counts summed over all chunks.
    """
    tasks = [
        ChunkTask(questions, output, chunk, language, pool.policy)
        for chunk in sorted(questions.chunks())
        for language in languages
    ]
    existing = output.chunks()
    todo = [task for task in tasks if task.name not in existing]
    by_language: Counter[str] = Counter()
    known = bad_prompts.known(questions)
    max_bad, on_bad = pool.spec.engines.max_bad_prompts, bad_prompts.noting(questions, output)
    work = Dispatcher(skip_bad_prompts(todo, known), max_bad, len(known), on_bad)
    with progress_bar(title, len(tasks)) as progress:
        progress.advance(len(tasks) - len(todo))
        for task, counts in pool.run(request, work):
            by_language[task.language] += counts["rows"]
            progress.advance(note=" ".join(f"{code} {by_language[code]}" for code in languages))
    return output.counts()
