"""Assigns chunks to engines and decides what happens to a chunk whose engine died. Independent of Ray and vLLM.

The first death under a chunk counts as an accident, and another engine gets the chunk. A second death makes the chunk
suspicious: it is bisected in trials that write nothing, until a single prompt has crashed two engines on its own. The
chunk is then served without that prompt.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from calm_ray.core.errors import CalmRayError
from calm_ray.engines.tasks import ChunkTask
from calm_ray.run.bad_prompts import FoundBadPrompt

DEATHS_UNTIL_SEARCH = 2
"""Engine deaths under a chunk before its prompts are suspected."""
DEATHS_UNTIL_BLAME = 2
"""Engine deaths under a single prompt before it is blamed: the first may be an accident."""
MAX_FRUITLESS_SEARCHES = 2
"""Searches of one chunk that may find nothing before the run stops."""
MAX_BAD_IN_A_ROW = 3
"""Bad prompts that may be found without a success in between. One more, and the engines themselves are blamed."""


@dataclass
class _Suspicion:
    """State of the search in a chunk under which engines have died."""

    deaths: int = 0
    searches: int = 0
    suspects: list[str] = field(default_factory=list)
    deaths_alone: int = 0
    """Deaths under the single prompt on trial."""


class Dispatcher:
    """Queue of unfinished chunks. Report each task from `next` as `finished`, `died` or `requeue`.

    `on_bad` receives all bad prompts whenever they change.
    """

    def __init__(
        self,
        tasks: Iterable[ChunkTask],
        max_bad: int,
        known_bad: int = 0,
        on_bad: Callable[[Sequence[FoundBadPrompt]], None] = lambda bad: None,
    ) -> None:
        self.bad: list[FoundBadPrompt] = []
        self._on_bad = on_bad
        self._queues: dict[str, deque[ChunkTask]] = {}
        self._requeued: deque[ChunkTask] = deque()
        self._unfinished = 0
        self._suspicions: defaultdict[str, _Suspicion] = defaultdict(_Suspicion)
        self._max_bad, self._bad_before = max_bad, known_bad
        self._bad_in_a_row = 0
        for task in tasks:
            self._queues.setdefault(task.language, deque()).append(task)
            self._unfinished += 1

    @property
    def is_done(self) -> bool:
        return self._unfinished == 0

    def next(self, home: str | None) -> ChunkTask | None:
        """Next chunk for an engine: requeued first, then its home language, then the longest queue.

        None if nothing is queued.
        """
        if self._requeued:
            return self._requeued.popleft()
        if home is not None and self._queues.get(home):
            return self._queues[home].popleft()
        longest = max(self._queues.values(), key=len, default=None)
        return longest.popleft() if longest else None

    def finished(self, task: ChunkTask) -> bool:
        """Records a success; returns whether it finished a chunk rather than a trial."""
        self._bad_in_a_row = 0
        if task.only is None:
            self._unfinished -= 1
            return True
        suspicion = self._suspicions[task.name]
        suspicion.deaths_alone = 0
        innocent = set(task.only)
        suspicion.suspects = [one for one in suspicion.suspects if one not in innocent]
        self._continue_search(task)
        return False

    def requeue(self, task: ChunkTask) -> None:
        """Queues a task again that never reached its engine, or whose node was lost."""
        self._requeued.append(task)

    def died(self, task: ChunkTask, error: str) -> bool:
        """Records an engine's death under a task; returns whether to blame the task rather than the engine.

        Raises CalmRayError if there are too many bad prompts, or if no prompt is to blame.
        """
        suspicion = self._suspicions[task.name]
        if task.only is None:
            suspicion.deaths += 1
            if suspicion.deaths < DEATHS_UNTIL_SEARCH:
                self._requeued.append(task)
            else:
                self._start_search(task, error)
            return False
        suspicion.suspects = list(task.only)
        suspicion.deaths_alone += len(task.only) == 1
        if suspicion.deaths_alone < DEATHS_UNTIL_BLAME:
            self._continue_search(task)
        else:
            self._blame(task, error)
        return True

    def _start_search(self, task: ChunkTask, error: str) -> None:
        suspicion = self._suspicions[task.name]
        suspicion.searches += 1
        if suspicion.searches > MAX_FRUITLESS_SEARCHES:
            raise CalmRayError(
                f"{task.output.storage.uri(task.name)}: crashes every engine although no single prompt does "
                f"({error}). The engines may be running out of memory: lower engines.args.max_num_seqs or "
                "engines.args.gpu_memory_utilization."
            )
        suspicion.suspects = [row["question_id"] for row in task.read()]
        self._continue_search(task)

    def _continue_search(self, task: ChunkTask) -> None:
        """Tries the first half of the suspects, or the whole chunk again if none are left."""
        suspicion = self._suspicions[task.name]
        suspects = suspicion.suspects
        if suspects:
            self._requeued.append(replace(task, only=tuple(suspects[: max(1, len(suspects) // 2)])))
        else:
            suspicion.deaths = 0
            self._requeued.append(replace(task, only=None))

    def _blame(self, task: ChunkTask, error: str) -> None:
        assert task.only is not None
        (question_id,) = task.only
        self.bad.append(FoundBadPrompt(question_id, task.language, task.chunk, error))
        self._on_bad(self.bad)  # listed before its chunk can be finished without it
        self._bad_in_a_row += 1
        if self._bad_in_a_row > MAX_BAD_IN_A_ROW:
            del self.bad[-self._bad_in_a_row :]
            self._on_bad(self.bad)
            raise CalmRayError(
                f"engines crash on every prompt: {self._bad_in_a_row} bad prompts in a row without a success in "
                f"between. Last error: {error}"
            )
        if self._bad_before + len(self.bad) > self._max_bad:
            raise CalmRayError(
                f"{self._bad_before + len(self.bad)} prompts crash every engine, more than engines.max_bad_prompts "
                f"({self._max_bad}); see bad_prompts.parquet. The last one: {question_id} in {task.language}: {error}"
            )
        self._suspicions[task.name] = _Suspicion(deaths=DEATHS_UNTIL_SEARCH - 1)
        rest = replace(task, only=None, without=task.without | {question_id})
        # Bad prompts may be adjacent: before blaming the engines, try one from the other end of the chunk.
        others = [row["question_id"] for row in rest.read()] if self._bad_in_a_row == MAX_BAD_IN_A_ROW else []
        self._requeued.append(replace(rest, only=(others[-1],)) if others else rest)


def skip_bad_prompts(tasks: Sequence[ChunkTask], bad: Iterable[tuple[str, str]]) -> list[ChunkTask]:
    """The tasks, each without the known bad prompts (question, language)."""
    by_language: defaultdict[str, set[str]] = defaultdict(set)
    for question_id, language in bad:
        by_language[language].add(question_id)
    return [replace(task, without=task.without | by_language[task.language]) for task in tasks]
