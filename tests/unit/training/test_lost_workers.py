"""Lost training workers: when training is retried, and which margins are kept."""

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
from calm_ray.training.workers import fit_with_retries

LOST = WorkerGroupError("a node was lost", {0: RuntimeError("lost")})


def make_fit(storage: Storage, steps: Sequence[int], error: Exception) -> Callable[[], None]:
    """Returns a `fit` whose attempts reach these steps; all but the last raise `error`."""
    left = list(steps)

    def fit() -> None:
        step = left.pop(0)
        storage.write_json(f"checkpoints/{step:08d}/checkpoint.json", {"files": {}})
        if left:
            raise error

    return fit


def test_training_is_retried_while_checkpoints_advance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Storage(str(tmp_path))
    fit_with_retries(make_fit(storage, [4, 6, 120], LOST), storage)
    assert "training reached step 4; restarting" in capsys.readouterr().out
    assert storage.exists("checkpoints/00000120")


@pytest.mark.parametrize(
    ("steps", "error"),
    [([4, 4, 120], LOST), ([4, 120], ControllerError(StorageError("the disk is full")))],
    ids=["no progress", "our own error"],
)
def test_training_fails_without_progress_or_on_our_own_errors(
    tmp_path: Path, steps: list[int], error: Exception
) -> None:
    storage = Storage(str(tmp_path))
    with pytest.raises(TrainingFailedError) as raised:
        fit_with_retries(make_fit(storage, steps, error), storage)
    assert raised.value is error
    assert not storage.exists("checkpoints/00000120")


def test_training_without_a_checkpoint_is_not_retried(tmp_path: Path) -> None:
    calls: list[int] = []

    def fit() -> None:
        calls.append(len(calls))
        raise LOST

    with pytest.raises(WorkerGroupError):
        fit_with_retries(fit, Storage(str(tmp_path)))
    assert calls == [0]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reference, "PART_TREES", 4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


EXAMPLES = [tree([5], [6, 1], [7, 1], question_id=f"q{number}") for number in range(10)]


class MarginWorker:
    """Computes margins, and is lost after `portions` portions; `computed` lists its questions."""

    def __init__(self, portions: int = 100, reference: Policy | None = None) -> None:
        self._portions, self._reference = portions, reference or Policy()
        self.computed: list[str] = []

    def __call__(self, portions: Sequence[Portion]) -> Iterable[list[ReferenceLogps]]:
        for number, portion in enumerate(portions):
            if number == self._portions:
                raise ConnectionError
            self.computed += [one.question_id for one in portion]
            yield [self._row(one) for one in portion]

    def _row(self, one: Tree) -> ReferenceLogps:
        return ReferenceLogps(
            question_id=one.question_id, language=one.language, number=one.number, reference=self._reference.name,
            logps=[-float(one.question_id[1:]), -1.0],
        )  # fmt: skip


def compute_until_lost(stage: Stage, portions: int, **how: Any) -> None:
    worker = MarginWorker(portions, **how)
    with pytest.raises(ConnectionError):
        reference_once(stage, how.get("reference", Policy()), EXAMPLES, worker)
    assert len(worker.computed) == 4 * portions


@pytest.mark.usefixtures("one_process")
def test_margins_of_a_lost_worker_are_kept(tmp_path: Path) -> None:
    stage, worker = Stage(Storage(str(tmp_path))), MarginWorker()
    compute_until_lost(stage, 2)
    found = reference_once(stage, Policy(), EXAMPLES, worker)
    assert worker.computed == ["q8", "q9"]
    assert {key: chosen for key, (chosen, _) in found.items()} == {
        one.key: -float(number) for number, one in enumerate(EXAMPLES)
    }
    assert not (tmp_path / "reference").exists()
    assert reference_once(stage, Policy(), EXAMPLES, MarginWorker(0)) == found
    assert stage.read_chunk("reference")["question_id"].to_pylist() == [one.question_id for one in EXAMPLES]


@pytest.mark.usefixtures("one_process")
def test_margins_of_another_reference_or_corrupt_parts_are_recomputed(tmp_path: Path) -> None:
    stage, worker = Stage(Storage(str(tmp_path))), MarginWorker()
    compute_until_lost(stage, 1, reference=Policy("r0001-12345678", 1, "adapter"))
    compute_until_lost(stage, 1)
    for part in (tmp_path / "reference").iterdir():
        part.write_bytes(part.read_bytes()[:-7])
    reference_once(stage, Policy(), EXAMPLES, worker)
    assert worker.computed == [one.question_id for one in EXAMPLES]
