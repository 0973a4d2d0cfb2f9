"""Which engine gets which chunk, and what becomes of a chunk whose engine died. Knows nothing of Ray or vLLM.

An engine that dies under a chunk is an accident: the chunk goes to another engine. One that dies under it again makes
the chunk suspicious: halves of it are tried, without writing anything, until the prompt is found that ends every engine
it is given to, twice by itself. The chunk is then done without that prompt.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from calm_ray.core.errors import CalmRayError
from calm_ray.engines.tasks import ChunkTask
from calm_ray.run.bad_prompts import Blamed

ACCIDENTS = 2
"""Engines that may die under a chunk before its prompts are suspected."""
DEATHS_ALONE = 2
"""Engines that must die under a prompt by itself before it is blamed: one death may be an accident."""
FRUITLESS = 2
"""Searches of a chunk that may find nothing."""
BAD_IN_A_ROW = 3
"""Bad prompts that may be found without a single success between them. If engines then die under another one too, they
are blamed themselves."""


@dataclass
class _Suspicion:
    """What is known of a chunk under which engines have died."""

    accidents: int = 0
    searches: int = 0
    suspects: list[str] = field(default_factory=list)
    alone: int = 0
    """Engines that died under the prompt that is tried by itself."""


class Dispatcher:
    """Chunks that are to be done. `next` gives one out; say `finished`, `died` or `requeue` of each.

    `on_bad` is given all bad prompts whenever they change.
    """

    def __init__(
        self,
        tasks: Iterable[ChunkTask],
        most_bad: int,
        bad_before: int = 0,
        on_bad: Callable[[Sequence[Blamed]], None] = lambda bad: None,
    ) -> None:
        self.bad: list[Blamed] = []
        self._on_bad = on_bad
        self._queues: dict[str, deque[ChunkTask]] = {}
        self._first: deque[ChunkTask] = deque()
        self._open = 0
        self._of: defaultdict[str, _Suspicion] = defaultdict(_Suspicion)
        self._most_bad, self._bad_before = most_bad, bad_before
        self._bad_in_a_row = 0
        for task in tasks:
            self._queues.setdefault(task.language, deque()).append(task)
            self._open += 1

    @property
    def is_done(self) -> bool:
        return self._open == 0

    def next(self, home: str | None) -> ChunkTask | None:
        """What an engine shall do: a chunk that comes back, else one of its home language, else of the one with most.

        None where all is given out.
        """
        if self._first:
            return self._first.popleft()
        if home is not None and self._queues.get(home):
            return self._queues[home].popleft()
        longest = max(self._queues.values(), key=len, default=None)
        return longest.popleft() if longest else None

    def finished(self, task: ChunkTask) -> bool:
        """Takes note of a success; returns whether a chunk is done, and not just a trial."""
        self._bad_in_a_row = 0
        if task.only is None:
            self._open -= 1
            return True
        suspicion = self._of[task.name]
        suspicion.alone = 0
        innocent = set(task.only)
        suspicion.suspects = [one for one in suspicion.suspects if one not in innocent]
        self._search_on(task)
        return False

    def requeue(self, task: ChunkTask) -> None:
        """A task that never reached its engine, or whose machine was lost, is given out again."""
        self._first.append(task)

    def died(self, task: ChunkTask, error: str) -> bool:
        """Takes note that an engine died under a task; returns whether the task is to blame rather than the engine.

        Raises CalmRayError where there are too many bad prompts, or where no prompt is to blame.
        """
        suspicion = self._of[task.name]
        if task.only is None:
            suspicion.accidents += 1
            if suspicion.accidents < ACCIDENTS:
                self._first.append(task)
            else:
                self._begin_search(task, error)
            return False
        suspicion.suspects = list(task.only)
        suspicion.alone += len(task.only) == 1
        if suspicion.alone < DEATHS_ALONE:
            self._search_on(task)
        else:
            self._blame(task, error)
        return True

    def _begin_search(self, task: ChunkTask, error: str) -> None:
        suspicion = self._of[task.name]
        suspicion.searches += 1
        if suspicion.searches > FRUITLESS:
            raise CalmRayError(
                f"{task.output.storage.uri(task.name)}: ends every engine, though none of its prompts does by itself "
                f"({error}). Engines that run out of memory do so: lower engines.args.max_num_seqs or "
                "engines.args.gpu_memory_utilization."
            )
        suspicion.suspects = [row["question_id"] for row in task.read()]
        self._search_on(task)

    def _search_on(self, task: ChunkTask) -> None:
        """Tries the first half of the suspects; without suspects, the whole chunk is given out again."""
        suspicion = self._of[task.name]
        suspects = suspicion.suspects
        if suspects:
            self._first.append(replace(task, only=tuple(suspects[: max(1, len(suspects) // 2)])))
        else:
            suspicion.accidents = 0
            self._first.append(replace(task, only=None))

    def _blame(self, task: ChunkTask, error: str) -> None:
        assert task.only is not None
        (question_id,) = task.only
        self.bad.append(Blamed(question_id, task.language, task.chunk, error))
        self._on_bad(self.bad)  # before its chunk is done without it
        self._bad_in_a_row += 1
        if self._bad_in_a_row > BAD_IN_A_ROW:
            del self.bad[-self._bad_in_a_row :]
            self._on_bad(self.bad)
            raise CalmRayError(
                f"engines end whatever they are given: {self._bad_in_a_row} prompts in a row, and nothing was done "
                f"in between. The last one: {error}"
            )
        if self._bad_before + len(self.bad) > self._most_bad:
            raise CalmRayError(
                f"{self._bad_before + len(self.bad)} prompts end every engine they are given to, more than "
                f"engines.max_bad_prompts ({self._most_bad}); they are listed in bad_prompts.parquet. "
                f"The last one: {question_id} in {task.language}: {error}"
            )
        self._of[task.name] = _Suspicion(accidents=ACCIDENTS - 1)
        rest = replace(task, only=None, without=task.without | {question_id})
        # Bad prompts may stand side by side: before the engines are blamed, one from the chunk's other end is tried.
        others = [row["question_id"] for row in rest.read()] if self._bad_in_a_row == BAD_IN_A_ROW else []
        self._first.append(replace(rest, only=(others[-1],)) if others else rest)


def without_bad(tasks: Sequence[ChunkTask], bad: Iterable[tuple[str, str]]) -> list[ChunkTask]:
    """The tasks, each without the prompts (question, language) that are known to be bad."""
    by_language: defaultdict[str, set[str]] = defaultdict(set)
    for question_id, language in bad:
        by_language[language].add(question_id)
    return [replace(task, without=task.without | by_language[task.language]) for task in tasks]
