"""`calm-ray pairs` and `calm-ray stats`: votes and pairs from completions that lie on disk, on Ray Data, no engine."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from calm_ray.cluster.connection import cluster
from calm_ray.cluster.resources import Group, Needs
from calm_ray.core.console import progress_bar, say
from calm_ray.core.errors import InputError
from calm_ray.methods.calm.from_columns import PAIRS, make_pairs
from calm_ray.methods.calm.import_completions import Imported, open_completions
from calm_ray.methods.calm.recorded import RecordedChunks
from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.vote_report import sample_report
from calm_ray.questions.parallel import BAD_ROWS, as_lines
from calm_ray.questions.reader import OnBadRow
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

PAIRS_FILE = "pairs.parquet"
TASKS_PER_CPU = 3


@dataclass(frozen=True)
class RecordedJob:
    """All that a task needs to make the pairs of some chunks."""

    chunks: RecordedChunks
    preferences: Preferences
    seed: int
    keeps_pairs: bool = True
    """Whether the pairs themselves are wanted, not their counts alone."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """For each row's `chunk` one row: its pairs as Arrow's stream format, its counts as JSON."""
        for chunk in batch["chunk"].to_pylist():
            pairs, counts = make_pairs(self.chunks.read(chunk), self.preferences, self.seed)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, pairs.schema) as stream:
                if self.keeps_pairs:
                    stream.write_table(pairs)
            row = {"chunk": [chunk], "counts": [json.dumps(counts)], "pairs": _one_binary(sink.getvalue())}
            yield pa.table(row, schema=_MADE)


def _one_binary(content: pa.Buffer) -> pa.Array:
    """A column of one row that holds the buffer itself, not a copy."""
    ends = pa.array([0, content.size], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, content])


_MADE = pa.schema([("chunk", pa.string()), ("counts", pa.string()), ("pairs", pa.large_binary())])


def pairs_of_chunks(job: RecordedJob) -> Iterator[tuple[pa.Table, Counter[str]]]:
    """The pairs and the counts of every chunk, in the order of the chunks."""
    names = [{"chunk": name} for name in job.chunks.chunks]
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    # Several tasks for each core, so that none waits long for the last one; several chunks for each task.
    tasks = min(len(names), TASKS_PER_CPU * int(ray.cluster_resources()["CPU"]))
    dataset = ray.data.from_items(names, override_num_blocks=tasks)
    made = dataset.map_batches(job, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    for batch in made.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in range(len(batch)):
            pairs = pa.ipc.open_stream(batch["pairs"][row].as_buffer()).read_all()
            yield pairs, Counter(json.loads(batch["counts"][row].as_py()))


def _counted(job: RecordedJob, total: Counter[str]) -> Iterator[pa.Table]:
    """The pairs of every chunk, with progress; their counts are added to `total`."""
    with progress_bar("vote and pair", len(job.chunks.chunks)) as progress:
        for pairs, counts in pairs_of_chunks(job):
            yield pairs
            total.update(counts)
            progress.advance(note=f"{total['pairs']} pairs")


@contextmanager
def _opened(
    sources: Sequence[str], folder: Path, preferences: Preferences, questions: str | None, on_bad_row: OnBadRow
) -> Iterator[Imported]:
    """The chunks of some sources, and Ray to go through them; chunks that had to be written are deleted after it."""
    with tempfile.TemporaryDirectory(prefix=".chunks-", dir=folder) as written:
        imported = open_completions(
            sources,
            Stage(Storage(str(Path(written).absolute()))),
            questions=questions,
            on_bad_row=on_bad_row,
            own_codes=preferences.preset == "released",
        )
        for reason, count in imported.repaired.most_common():
            say(f"{count} x {reason}")
        if imported.left_out:
            say(f"{len(imported.left_out)} bad rows were left out, the first being {imported.left_out[0]}")
        with cluster(Needs([Group("data task", 1, {"CPU": 1.0})]), local_cpus=os.cpu_count() or 1):
            yield imported


def write_pairs(
    sources: Sequence[str],
    out: str,
    preferences: Preferences,
    *,
    seed: int = 0,
    questions: str | None = None,
    on_bad_row: OnBadRow = "refuse",
) -> dict[str, Any]:
    """Writes `pairs.parquet` and `stats.json` into the folder `out`; returns what stats.json holds.

    What was left out with `skip` is listed in `bad_rows.jsonl`. See `open_completions` for `sources` and `questions`.
    Raises InputError for bad input, and where `out` holds pairs already.
    """
    folder = Path(out).expanduser()
    if (folder / PAIRS_FILE).exists():
        raise InputError(f"{folder / PAIRS_FILE} is there already; name another folder with --out, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    with _gone_if_empty(folder), _opened(sources, folder, preferences, questions, on_bad_row) as imported:
        job = RecordedJob(imported.chunks, preferences, seed)
        total: Counter[str] = Counter()
        unfinished = folder / f".{PAIRS_FILE}.tmp-{os.getpid()}"
        try:
            with pq.ParquetWriter(unfinished, PAIRS) as writer:
                for pairs in _counted(job, total):
                    writer.write_table(pairs.cast(PAIRS))
            stats = _statistics(total, imported)
            storage = Storage(str(folder.absolute()))
            storage.write_json("stats.json", stats)
            if imported.left_out:
                storage.write(BAD_ROWS, as_lines(imported.left_out))
            unfinished.rename(folder / PAIRS_FILE)
        finally:
            unfinished.unlink(missing_ok=True)
    return stats


@contextmanager
def _gone_if_empty(folder: Path) -> Iterator[None]:
    """A folder in which nothing was written to its end is not left behind."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def _statistics(counts: Counter[str], imported: Imported) -> dict[str, Any]:
    """stats.json: the report, and how many rows were left out or repaired."""
    return {**sample_report(counts), "left_out": len(imported.left_out), "repaired": dict(imported.repaired)}


def count_recorded(
    sources: Sequence[str],
    preferences: Preferences,
    *,
    seed: int = 0,
    questions: str | None = None,
    on_bad_row: OnBadRow = "refuse",
) -> dict[str, Any]:
    """What `write_pairs` would write into stats.json, without the pairs."""
    with (
        tempfile.TemporaryDirectory(prefix="calm_ray-") as folder,
        _opened(sources, Path(folder), preferences, questions, on_bad_row) as imported,
    ):
        job = RecordedJob(imported.chunks, preferences, seed, keeps_pairs=False)
        total: Counter[str] = Counter()
        for _ in _counted(job, total):
            pass
    return _statistics(total, imported)
