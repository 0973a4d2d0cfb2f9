"""What is kept when training workers are lost: their number, and the margins they had computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from factories import tree
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError

from calm_ray.core.errors import StorageError
from calm_ray.core.rows import ReferenceLogps
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.training import reference
from calm_ray.training.reference import Portion, reference_once
from calm_ray.training.trees import Tree
from calm_ray.training.workers import fit_while_it_gets_on

LOST = WorkerGroupError("a node is gone", {0: RuntimeError("gone")})


def fits(storage: Storage, steps: Sequence[int], error: Exception) -> Callable[[], None]:
    """Fits that come to these steps; all but the last one end with an error."""
    left = list(steps)

    def fit() -> None:
        step = left.pop(0)
        storage.write_json(f"checkpoints/{step:08d}/checkpoint.json", {"files": {}})
        if left:
            raise error

    return fit


def test_lost_workers_count_from_the_last_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Storage(str(tmp_path))
    fit_while_it_gets_on(fits(storage, [4, 6, 120], LOST), storage)
    assert "came to step 4 in between" in capsys.readouterr().out
    assert storage.exists("checkpoints/00000120")


@pytest.mark.parametrize(
    ("steps", "error"),
    [([4, 4, 120], LOST), ([4, 120], ControllerError(StorageError("the disk is full")))],
    ids=["no progress", "an error of our own"],
)
def test_training_ends_where_it_comes_no_further(tmp_path: Path, steps: list[int], error: Exception) -> None:
    storage = Storage(str(tmp_path))
    with pytest.raises(TrainingFailedError) as raised:
        fit_while_it_gets_on(fits(storage, steps, error), storage)
    assert raised.value is error
    assert not storage.exists("checkpoints/00000120")


def test_without_any_checkpoint_training_is_not_begun_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def fit() -> None:
        calls.append(len(calls))
        raise LOST

    with pytest.raises(WorkerGroupError):
        fit_while_it_gets_on(fit, Storage(str(tmp_path)))
    assert calls == [0]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reference, "PART_TREES", 4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


EXAMPLES = [tree([5], [6, 1], [7, 1], question_id=f"q{number}") for number in range(10)]


class Worker:
    """Computes margins, and is lost after some portions; `asked` are the questions it computed."""

    def __init__(self, portions: int = 100, reference: Policy | None = None) -> None:
        self._portions, self._reference = portions, reference or Policy()
        self.asked: list[str] = []

    def __call__(self, portions: Sequence[Portion]) -> Iterable[list[ReferenceLogps]]:
        for number, portion in enumerate(portions):
            if number == self._portions:
                raise ConnectionError
            self.asked += [one.question_id for one in portion]
            yield [self._row(one) for one in portion]

    def _row(self, one: Tree) -> ReferenceLogps:
        return ReferenceLogps(
            question_id=one.question_id, language=one.language, number=one.number, reference=self._reference.name,
            logps=[-float(one.question_id[1:]), -1.0],
        )  # fmt: skip


def lose_one_after(stage: Stage, portions: int, **how: Any) -> None:
    worker = Worker(portions, **how)
    with pytest.raises(ConnectionError):
        reference_once(stage, how.get("reference", Policy()), EXAMPLES, worker)
    assert len(worker.asked) == 4 * portions


@pytest.mark.usefixtures("one_process")
def test_margins_that_a_lost_worker_computed_are_kept(tmp_path: Path) -> None:
    stage, worker = Stage(Storage(str(tmp_path))), Worker()
    lose_one_after(stage, 2)
    found = reference_once(stage, Policy(), EXAMPLES, worker)
    assert worker.asked == ["q8", "q9"]
    assert {key: chosen for key, (chosen, _) in found.items()} == {
        one.key: -float(number) for number, one in enumerate(EXAMPLES)
    }
    assert not (tmp_path / "reference").exists()
    assert reference_once(stage, Policy(), EXAMPLES, Worker(0)) == found
    assert stage.read_chunk("reference")["question_id"].to_pylist() == [one.question_id for one in EXAMPLES]


@pytest.mark.usefixtures("one_process")
def test_margins_of_another_reference_or_in_torn_parts_are_computed_again(tmp_path: Path) -> None:
    stage, worker = Stage(Storage(str(tmp_path))), Worker()
    lose_one_after(stage, 1, reference=Policy("r0001-12345678", 1, "adapter"))
    lose_one_after(stage, 1)
    for part in (tmp_path / "reference").iterdir():
        part.write_bytes(part.read_bytes()[:-7])
    reference_once(stage, Policy(), EXAMPLES, worker)
    assert worker.asked == [one.question_id for one in EXAMPLES]
