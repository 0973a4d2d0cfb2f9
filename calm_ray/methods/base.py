"""Building blocks of a method: steps, an objective, an evaluation and settings.

A `Step` fills one folder of a round and resumes by chunk. It declares what it reads and which configuration keys affect
it; invalidation, repair, the plan, the summary and `calm-ray show` follow from that.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from calm_ray.core.sections import Section
from calm_ray.core.settings import RunSettings
from calm_ray.methods.work import Sizes, Work

if TYPE_CHECKING:
    from calm_ray.engines.requests import ChunkRequest
    from calm_ray.methods.round import Asks, QuestionView, Round
    from calm_ray.run.policies import Policy
    from calm_ray.run.stage import Stage
    from calm_ray.training.objectives import Objective

Entry = dict[str, Any]
"""One round in summary.json, or the record of one folder."""


@dataclass(frozen=True)
class Column:
    """A column of the table printed at the end of a run."""

    title: str
    cell: Callable[[Entry], str]
    note: str = ""
    """Printed below the table."""


class Step(ABC):
    """One folder of a round, `rounds/R/NAME`."""

    name: ClassVar[str]
    title: ClassVar[str] = ""
    """Label of the progress bar; defaults to `name`."""
    also_fills: tuple[str, ...] = ()
    """Other folders it fills at the same time, chunk by chunk."""
    waits_for_inputs: ClassVar[bool] = True
    """Whether its inputs must be finished before it starts. If False, it can process them chunk by chunk."""
    trained_keys: tuple[str, ...] = ()
    """Like `keys`, but these only matter if the policy is not the base model."""
    writes: ClassVar[bool] = False
    """Whether the policy generates completions, which must fit into the engines' context."""
    columns: ClassVar[tuple[Column, ...]] = ()

    @property
    def kind(self) -> tuple[Any, ...]:
        """Its class and constructor arguments. A change of kind invalidates the step's output.

        Excludes settings, which `keys` covers.
        """
        arguments: list[Any] = [getattr(self, field.name) for field in fields(self)] if is_dataclass(self) else []
        return (type(self), *map(_kind_of, arguments))

    @property
    def asks(self) -> Asks | None:
        """The policy that answers; None if the step uses none."""
        return None

    @property
    def first_round(self) -> int:
        """The first round that has this step."""
        return 0

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """The steps it depends on; `questions` and `held_out` refer to the run's questions."""

    @property
    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """Configuration keys, or whole sections, whose change invalidates it."""

    def output(self, round: Round) -> Stage:
        """The stage that holds, or will hold, its rows."""
        return round.stage(self.name)

    def run(self, round: Round, inputs: Sequence[Stage]) -> Stage:
        """Fills the folder unless it is finished; `inputs` are the stages of `reads`, in that order."""
        output = self.output(round)
        if not all(stage.is_finished for stage in (output, *map(round.stage, self.also_fills))):
            self.make(round, output, inputs)
        return output

    @abstractmethod
    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        """Fills and finishes the folder."""

    def heading(self, round: Round) -> str:
        """Heading of the progress bar."""
        return f"round {round.number}: {self.title or self.name}"

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        """Upper bound of its work in one round; `before` holds the work of the steps it reads."""
        return Work()

    def summary(self, record: Entry) -> Entry:
        """Fields that its record adds to the round's entry in summary.json."""
        return {}

    def summary_of_start(self, record: Entry) -> Entry:
        """Fields about the policy the round starts from; added to the previous round's entry."""
        return {}

    def empty_reason(self, record: Entry) -> str:
        """Why a step that produces training examples produced none."""
        return "no question produced an example"

    def show(self, view: QuestionView) -> None:
        """Prints its rows for one question, if there is anything to show."""
        return


def _kind_of(value: Any) -> Any:
    if isinstance(value, Step):
        return value.kind
    if isinstance(value, Section):
        return Section
    if isinstance(value, tuple):
        return tuple(map(_kind_of, value))
    return value if isinstance(value, str | int | float | None) else type(value)


class EngineStep(Step):
    """Sends every chunk to the engines, once per language."""

    waits_for_inputs = False
    engine_keys: ClassVar[tuple[str, ...]] = ("device", "engines.dtype", "engines.args")
    trained_keys = ("engines.refresh",)

    @property
    def asks(self) -> Asks:
        return "start"

    @property
    @abstractmethod
    def languages(self) -> list[str]:
        """The languages to send."""

    @abstractmethod
    def request(self, round_number: int) -> ChunkRequest[Any, Any]:
        """The request sent to the engines."""

    def report(self, output: Stage, questions: Stage) -> Entry:
        """Fields added to the folder's record once all rows are there."""
        return {}

    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        self.ask(round, round.answering(self.asks), inputs[0], output, self.heading(round))

    def ask(self, round: Round, policy: Policy, questions: Stage, output: Stage, heading: str) -> None:
        """Has `policy` answer the questions chunk by chunk, then finishes `output`."""
        from calm_ray.engines.stage_runner import over_chunks_and_languages

        started = time.monotonic()
        round.engines.refresh(policy)
        counts = over_chunks_and_languages(
            round.engines, round.run.bad_prompts, self.request(round.number), heading, questions, output, self.languages
        )
        output.finish(
            {
                **counts,
                "policy": policy.name,
                **self.report(output, questions),
                "refresh_seconds": round.engines.refresh_seconds,
                "seconds": time.monotonic() - started,
            }
        )


class ChunkJob(ABC):
    """The work of one task on one chunk. Must be picklable."""

    @abstractmethod
    def make(self, chunk: str) -> Counter[str]:
        """Writes the chunk; returns counts for the progress bar."""

    @abstractmethod
    def count(self, chunk: str) -> Counter[str]:
        """Counts over a chunk that has been written."""


class DataStep(Step):
    """Processes each chunk of its first input, in all languages, in a Ray Data task."""

    waits_for_inputs = False

    @abstractmethod
    def job(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> ChunkJob:
        """The job that processes a chunk."""

    def note(self, made: Counter[str]) -> str:
        """Note on the progress bar, from the counts of the chunks made so far."""
        return ""

    @abstractmethod
    def record(self, counts: Counter[str]) -> Entry:
        """The folder's record, from the counts over all chunks."""

    def announce(self, record: Entry) -> None:
        """Prints what to know about the record before the run goes on."""

    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        from calm_ray.cluster.over_chunks import over_chunks, sum_over_chunks
        from calm_ray.core.console import progress_bar

        started = time.monotonic()
        job, chunks = self.job(round, output, inputs), inputs[0].chunks()
        others = [round.stage(name) for name in self.also_fills]
        todo = sorted(chunks - output.chunks().intersection(*(stage.chunks() for stage in others)))
        with progress_bar(self.heading(round), len(chunks)) as progress:
            progress.advance(len(chunks) - len(todo))
            made: Counter[str] = Counter()
            for counts in over_chunks(job.make, todo):
                made.update(counts)
                progress.advance(note=self.note(made))
            record = self.record(sum_over_chunks(job.count, sorted(chunks)))
        self.announce(record)
        for stage in others:
            stage.finish({})
        output.finish({**record, "seconds": time.monotonic() - started})


Evaluation = tuple[EngineStep, *tuple[Step, ...]]
"""The step in which a policy answers the held-out questions, then any steps that process the answers."""
S = TypeVar("S", bound=Section)


class Method(ABC, Generic[S]):
    """An alignment method. `run` holds the settings common to all runs, `own` the method's own section."""

    section: ClassVar[str]
    """Recipe section that holds its settings. Several methods may share one."""
    settings: type[S]
    train_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of the section `train`."""

    def defaults(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults by recipe section."""
        return {"train": dict(self.train_defaults)}

    def check(self, run: RunSettings, own: S) -> None:
        """Raises ValueError if the settings are incompatible; the message starts with the key."""
        if run.samples_candidates:
            raise ValueError("candidates.form: this method does not draw its candidates from samples")

    def needs_gold(self, own: S) -> bool:
        """Whether gold answers select the training examples. True only for methods with gold in their name."""
        return False

    @abstractmethod
    def steps(self, run: RunSettings, own: S) -> tuple[Step, ...]:
        """The steps from questions to training examples; the last one writes the examples."""

    @abstractmethod
    def objective(self, run: RunSettings, own: S) -> Objective:
        """The training objective."""

    @abstractmethod
    def evaluation(self, run: RunSettings, own: S) -> Evaluation:
        """The evaluation of each policy; the first step's folder holds the answers.

        Most methods use `calm_ray.methods.shared.evaluation.evaluation_steps`.
        """

    def notice(self, run: RunSettings, own: S) -> str | None:
        """A notice to print when a run starts."""
        return None
