"""What a method is made of: steps, an objective, an evaluation, settings.

A `Step` is one folder of a round, made once and resumed by chunk. It says what it reads and which configuration keys
change it; invalidation, repair, the plan, the summary and `calm-ray show` are derived from that.
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
"""A round in summary.json."""


@dataclass(frozen=True)
class Column:
    """A column of the closing table."""

    title: str
    cell: Callable[[Entry], str]
    note: str = ""
    """Stands below the table."""


class Step(ABC):
    """One folder of a round, `rounds/R/NAME`."""

    name: ClassVar[str]
    title: ClassVar[str] = ""
    """What its line of progress is called; its name where this is empty."""
    beside: tuple[str, ...] = ()
    """Further folders that are filled along with it, chunk by chunk."""
    needs_all: ClassVar[bool] = True
    """Whether it can begin only when the steps it reads are finished; others can follow them chunk by chunk."""
    trained_keys: tuple[str, ...] = ()
    """Like `keys`, but only where a policy answers that is not the base model."""
    writes: ClassVar[bool] = False
    """Whether the policy writes completions, which must fit into the engines' context."""
    columns: ClassVar[tuple[Column, ...]] = ()
    why_empty: ClassVar[str] = "no question gave an example"
    """Why a step whose rows are trained on may have none."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """What it is, settings aside: its class, and what its method made it with. A step of another kind makes others.

        Settings count by the keys that the step declares.
        """
        made_with: list[Any] = [getattr(self, field.name) for field in fields(self)] if is_dataclass(self) else []
        return (type(self), *map(_kind_of, made_with))

    @property
    def asks(self) -> Asks | None:
        """Which policy answers; None where the step asks none."""
        return None

    @property
    def first_round(self) -> int:
        """The first round that has this step."""
        return 0

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """The steps of the round that it depends on; `questions` and `held_out` are the run's questions."""

    @property
    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """The configuration keys whose change invalidates it, each a key or a whole section."""

    def output(self, round: Round) -> Stage:
        """Where its rows are, or will be."""
        return round.stage(self.name)

    def run(self, round: Round, inputs: Sequence[Stage]) -> Stage:
        """Makes what is not there yet; `inputs` are the stages that it reads, in that order."""
        output = self.output(round)
        if not all(stage.is_finished for stage in (output, *map(round.stage, self.beside))):
            self.make(round, output, inputs)
        return output

    @abstractmethod
    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        """Fills and finishes the folder."""

    def heading(self, round: Round) -> str:
        """The head of its line of progress."""
        return f"round {round.number}: {self.title or self.name}"

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        """What it takes in one round; `before` holds the work of the steps it reads."""
        return Work()

    def summary(self, record: Entry) -> Entry:
        """What its record adds to its round's entry in summary.json."""
        return {}

    def summary_of_start(self, record: Entry) -> Entry:
        """What its record says of the policy that the round starts from: it stands in the entry of the round before."""
        return {}

    def show(self, view: QuestionView) -> None:
        """Prints what became of one question; nothing where there is nothing to see."""
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
    """Asks the engines about each chunk in each language."""

    needs_all = False
    keys_of_engines: ClassVar[tuple[str, ...]] = ("device", "engines.dtype", "engines.args")
    trained_keys = ("engines.refresh",)

    @property
    def asks(self) -> Asks:
        return "start"

    @property
    @abstractmethod
    def languages(self) -> list[str]:
        """The languages that are asked in."""

    @abstractmethod
    def request(self, round_number: int) -> ChunkRequest[Any, Any]:
        """What the engines are asked."""

    def report(self, output: Stage, questions: Stage) -> Entry:
        """What the folder's record says of its rows, when all are there."""
        return {}

    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        self.ask(round, round.answering(self.asks), inputs[0], output, self.heading(round))

    def ask(self, round: Round, policy: Policy, questions: Stage, output: Stage, heading: str) -> None:
        """Asks a policy these questions, in chunks, and finishes the folder of its answers."""
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
    """What a task does with a chunk. Picklable."""

    @abstractmethod
    def make(self, chunk: str) -> Counter[str]:
        """Writes the chunk; returns what is to be said of it while others are made."""

    @abstractmethod
    def count(self, chunk: str) -> Counter[str]:
        """What is counted in a chunk that is there."""


class DataStep(Step):
    """Makes each chunk of its first input, in all languages, in a task of Ray Data."""

    needs_all = False

    @abstractmethod
    def job(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> ChunkJob:
        """What a task does with a chunk."""

    def note(self, made: Counter[str]) -> str:
        """What stands beside its bar: from what the chunks made so far were counted."""
        return ""

    @abstractmethod
    def record(self, counts: Counter[str]) -> Entry:
        """What the folder's record says, from the job's counts of all chunks."""

    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        from calm_ray.cluster.over_chunks import count_over, over_chunks
        from calm_ray.core.console import progress_bar

        started = time.monotonic()
        job, chunks = self.job(round, output, inputs), inputs[0].chunks()
        beside = [round.stage(name) for name in self.beside]
        todo = sorted(chunks - output.chunks().intersection(*(stage.chunks() for stage in beside)))
        with progress_bar(self.heading(round), len(chunks)) as progress:
            progress.advance(len(chunks) - len(todo))
            made: Counter[str] = Counter()
            for counts in over_chunks(job.make, todo):
                made.update(counts)
                progress.advance(note=self.note(made))
            record = self.record(count_over(job.count, sorted(chunks)))
        for stage in beside:
            stage.finish({})
        output.finish({**record, "seconds": time.monotonic() - started})


Evaluation = tuple[EngineStep, *tuple[Step, ...]]
"""The step by which a policy answers the held-out questions, and whatever is made of its answers."""
S = TypeVar("S", bound=Section)


class Method(ABC, Generic[S]):
    """A way from questions to a better policy. `run` is what all runs have, `own` the method's own section."""

    section: ClassVar[str]
    """The section of a recipe that holds its settings; methods may share one."""
    settings: type[S]
    train_defaults: ClassVar[Mapping[str, Any]] = {}
    """Of the section `train`, where a recipe does not say otherwise."""

    def defaults(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """What a recipe that does not say otherwise holds, section by section."""
        return {"train": dict(self.train_defaults)}

    def check(self, run: RunSettings, own: S) -> None:
        """Raises ValueError, beginning with the key, where the settings do not go together."""
        if run.draws_candidates:
            raise ValueError("candidates.form: this method does not draw its candidates from samples")

    def needs_gold(self, own: S) -> bool:
        """Whether gold answers choose what is trained on. No method's do but those that are named for it."""
        return False

    @abstractmethod
    def steps(self, run: RunSettings, own: S) -> tuple[Step, ...]:
        """From questions to training examples, which the last one writes."""

    @abstractmethod
    def objective(self, run: RunSettings, own: S) -> Objective:
        """What training minimises."""

    @abstractmethod
    def evaluation(self, run: RunSettings, own: S) -> Evaluation:
        """What each policy is asked; the first step's folder is the policy's evaluation.

        `calm_ray.methods.shared.evaluation.evaluation_steps` is that of most methods.
        """

    def remark(self, run: RunSettings, own: S) -> str | None:
        """What a person should know when a run starts."""
        return None
