"""`calm-ray pairs` and `calm-ray stats`: votes and pairs from completions on disk, on Ray Data, without engines."""

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
from calm_ray.methods.calm.settings import OPTION_TEXT, Preferences
from calm_ray.methods.calm.vote_report import sample_report
from calm_ray.questions.parallel import BAD_ROWS, as_lines
from calm_ray.questions.reader import OnBadRow
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

PAIRS_FILE = "pairs.parquet"
TASKS_PER_CPU = 3


@dataclass(frozen=True)
class RecordedJob:
    """Everything a task needs to pair the completions of some chunks."""

    chunks: RecordedChunks
    preferences: Preferences
    seed: int
    keeps_pairs: bool = True
    """Whether to return the pairs; if False, only the counts."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Yields one row per chunk: the pairs as an Arrow IPC stream, the counts as JSON."""
        for chunk in batch["chunk"].to_pylist():
            pairs, counts = make_pairs(self.chunks.read(chunk), self.preferences, self.seed)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, pairs.schema) as stream:
                if self.keeps_pairs:
                    stream.write_table(pairs)
            row = {"chunk": [chunk], "counts": [json.dumps(counts)], "pairs": _binary_column(sink.getvalue())}
            yield pa.table(row, schema=_RESULT)


def _binary_column(content: pa.Buffer) -> pa.Array:
    """Wraps a buffer as a one-row column without copying it."""
    offsets = pa.array([0, content.size], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content])


_RESULT = pa.schema([("chunk", pa.string()), ("counts", pa.string()), ("pairs", pa.large_binary())])


def pairs_of_chunks(job: RecordedJob) -> Iterator[tuple[pa.Table, Counter[str]]]:
    """The pairs and counts of every chunk, in order."""
    names = [{"chunk": name} for name in job.chunks.chunks]
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    # Several tasks per core balance the load; several chunks per task amortize its overhead.
    tasks = min(len(names), TASKS_PER_CPU * int(ray.cluster_resources()["CPU"]))
    dataset = ray.data.from_items(names, override_num_blocks=tasks)
    results = dataset.map_batches(job, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in range(len(batch)):
            pairs = pa.ipc.open_stream(batch["pairs"][row].as_buffer()).read_all()
            yield pairs, Counter(json.loads(batch["counts"][row].as_py()))


def _with_progress(job: RecordedJob, total: Counter[str]) -> Iterator[pa.Table]:
    """Yields the pairs of every chunk, shows progress, and adds the counts to `total`."""
    with progress_bar("vote and pair", len(job.chunks.chunks)) as progress:
        for pairs, counts in pairs_of_chunks(job):
            yield pairs
            total.update(counts)
            progress.advance(note=f"{total['pairs']} pairs")


@contextmanager
def _open(
    sources: Sequence[str], folder: Path, preferences: Preferences, questions: str | None, on_bad_row: OnBadRow
) -> Iterator[Imported]:
    """Opens the sources as chunks and connects to Ray; chunks written to `folder` are deleted on exit."""
    with tempfile.TemporaryDirectory(prefix=".chunks-", dir=folder) as temporary:
        imported = open_completions(
            sources,
            Stage(Storage(str(Path(temporary).absolute()))),
            questions=questions,
            on_bad_row=on_bad_row,
            own_codes=preferences.preset == "released",
        )
        for reason, count in imported.repaired.most_common():
            say(f"{count} x {reason}")
        if imported.skipped:
            say(f"skipped {len(imported.skipped)} bad rows; first: {imported.skipped[0]}")
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
    """Writes `pairs.parquet` and `stats.json` into the folder `out`; returns the content of stats.json.

    Rows skipped with `on_bad_row="skip"` are listed in `bad_rows.jsonl`. See `open_completions` for `sources` and
    `questions`. Raises InputError for bad input, or if `out` already holds pairs.
    """
    if preferences.extraction == OPTION_TEXT:
        raise InputError("extraction: option_text is for runs and `calm-ray stats`; pairs on disk end with a letter")
    folder = Path(out).expanduser()
    if (folder / PAIRS_FILE).exists():
        raise InputError(f"{folder / PAIRS_FILE} already exists; delete it or choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    with _remove_if_empty(folder), _open(sources, folder, preferences, questions, on_bad_row) as imported:
        job = RecordedJob(imported.chunks, preferences, seed)
        total: Counter[str] = Counter()
        unfinished = folder / f".{PAIRS_FILE}.tmp-{os.getpid()}"
        try:
            with pq.ParquetWriter(unfinished, PAIRS) as writer:
                for pairs in _with_progress(job, total):
                    writer.write_table(pairs.cast(PAIRS))
            stats = _statistics(total, imported)
            storage = Storage(str(folder.absolute()))
            storage.write_json("stats.json", stats)
            if imported.skipped:
                storage.write(BAD_ROWS, as_lines(imported.skipped))
            unfinished.rename(folder / PAIRS_FILE)
        finally:
            unfinished.unlink(missing_ok=True)
    return stats


@contextmanager
def _remove_if_empty(folder: Path) -> Iterator[None]:
    """Removes the folder on exit if it is empty, as after a failure."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def _statistics(counts: Counter[str], imported: Imported) -> dict[str, Any]:
    """The content of stats.json: the report and the numbers of skipped and repaired rows."""
    return {**sample_report(counts), "skipped": len(imported.skipped), "repaired": dict(imported.repaired)}


def count_recorded(
    sources: Sequence[str],
    preferences: Preferences,
    *,
    seed: int = 0,
    questions: str | None = None,
    on_bad_row: OnBadRow = "refuse",
) -> dict[str, Any]:
    """Returns what `write_pairs` would write into stats.json, without writing pairs."""
    with (
        tempfile.TemporaryDirectory(prefix="calm_ray-") as folder,
        _open(sources, Path(folder), preferences, questions, on_bad_row) as imported,
    ):
        job = RecordedJob(imported.chunks, preferences, seed, keeps_pairs=False)
        total: Counter[str] = Counter()
        for _ in _with_progress(job, total):
            pass
    return _statistics(total, imported)
