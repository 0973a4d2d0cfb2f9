"""The engines at work on a stage: every chunk in every language that is not there yet, with progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from calm_ray.core.console import progress_bar
from calm_ray.engines.dispatcher import Dispatcher, without_bad
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
    """Asks the pool's policy for each chunk and language that `output` lacks.

    Returns the sum of all chunks' counts.
    """
    tasks = [
        ChunkTask(questions, output, chunk, language, pool.policy)
        for chunk in sorted(questions.chunks())
        for language in languages
    ]
    there = output.chunks()
    todo = [task for task in tasks if task.name not in there]
    by_language: Counter[str] = Counter()
    known = bad_prompts.known(questions)
    most_bad, noting = pool.spec.engines.max_bad_prompts, bad_prompts.noting(questions, output)
    work = Dispatcher(without_bad(todo, known), most_bad, len(known), noting)
    with progress_bar(title, len(tasks)) as progress:
        progress.advance(len(tasks) - len(todo))
        for task, counts in pool.run(request, work):
            by_language[task.language] += counts["rows"]
            progress.advance(note=" ".join(f"{code} {by_language[code]}" for code in languages))
    return output.counts()
