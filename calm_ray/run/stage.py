"""A stage's folder: files written once and atomically, each listed in a manifest with its size and hash.

    manifest/CHUNK.json    the entry of one chunk, written after the chunk itself
    manifest.json          all entries, merged when the stage finishes
    stage.json             the stage's record; written last

A chunk without an entry does not count: it is corrupt or still being written.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from calm_ray.run.storage import Storage, parquet_of

STAGE_FILE = "stage.json"
MANIFEST = "manifest.json"
ENTRIES = "manifest"
COUNTS = b"calm_ray.counts"
"""Metadata key of a chunk's file, which repeats the counts of its entry."""
THREADS = 16
"""Number of files to read at once, to hide an object store's latency of milliseconds per file."""

Entry = dict[str, Any]
"""`rows` (of a chunk), `bytes`, `sha256`, and further counts from its writer."""


@dataclass(frozen=True)
class Stage:
    """One folder of a run, filled by one step of one round. Picklable, so that workers can write chunks."""

    storage: Storage
    """Rooted at this stage's folder."""

    @property
    def is_finished(self) -> bool:
        return self.storage.exists(STAGE_FILE)

    @property
    def record(self) -> dict[str, Any]:
        """The record saved when the stage finished."""
        return dict(self.storage.read_json(STAGE_FILE))

    def finish(self, record: dict[str, Any], files: Iterable[str] = ()) -> dict[str, Any]:
        """Writes the merged manifest and the record. `files` adds files that are not chunks (`policy/x.json`)."""
        entries = self.manifest()
        entries |= {name: entry for name in files if (entry := self._entry_of(name)) is not None}
        self.storage.write_json(MANIFEST, dict(sorted(entries.items())))
        self.storage.write_json(STAGE_FILE, record)
        self.storage.delete(ENTRIES)
        return record

    def chunks(self) -> set[str]:
        """Names of the completely written chunks."""
        return {name.removesuffix(".parquet") for name in self.names() if name.endswith(".parquet")}

    def has(self, chunk: str) -> bool:
        """Whether the chunk is completely written."""
        has_entry = self.storage.exists(f"{ENTRIES}/{chunk}.parquet.json")
        return has_entry or (self.is_finished and chunk in self.chunks())

    def names(self) -> set[str]:
        """Names of the files in the manifest."""
        merged = self.storage.read_json(MANIFEST) if self.storage.exists(MANIFEST) else {}
        return {*merged, *(name.removesuffix(".json") for name in self.storage.files(ENTRIES))}

    def manifest(self) -> dict[str, Entry]:
        """The entry of each file, by name."""
        entries: dict[str, Entry] = self.storage.read_json(MANIFEST) if self.storage.exists(MANIFEST) else {}
        names = self.storage.files(ENTRIES)
        entries |= zip(
            (name.removesuffix(".json") for name in names),
            _map(lambda name: self.storage.read_json(f"{ENTRIES}/{name}"), names),
            strict=True,
        )
        return entries

    def counts(self) -> Counter[str]:
        """Sums of the rows and further counts of all chunks."""
        total: Counter[str] = Counter()
        for entry in self.manifest().values():
            total.update({name: value for name, value in entry.items() if name not in ("bytes", "sha256")})
        return total

    def write(self, chunk: str, data: pa.Table, compression: str = "lz4", counts: dict[str, int] | None = None) -> None:
        """Writes a chunk, then its entry. Both contain `counts`, so that a lost entry can be recovered."""
        name = f"{chunk}.parquet"
        with_counts = data.replace_schema_metadata({COUNTS: json.dumps(counts or {})})
        written = self.storage.write_table(name, with_counts, compression)
        sha256 = hashlib.sha256(written).hexdigest()
        self._write_entry(name, {"rows": len(data), "bytes": len(written), "sha256": sha256} | (counts or {}))

    def _write_entry(self, name: str, entry: Entry) -> None:
        self.storage.write_json(f"{ENTRIES}/{name}.json", entry)

    def read_chunk(self, chunk: str, columns: list[str] | None = None) -> pa.Table:
        return self.storage.read_table(f"{chunk}.parquet", columns)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Reads all chunks, ordered by name."""
        return pa.concat_tables([self.read_chunk(chunk, columns) for chunk in sorted(self.chunks())])

    def recover(self) -> None:
        """Repairs the manifest: drops corrupt parts and adds intact chunks that lack an entry."""
        for name in [STAGE_FILE, MANIFEST, *(f"{ENTRIES}/{name}" for name in self.storage.files(ENTRIES))]:
            if _is_corrupt(self.storage, name):
                self.storage.delete(STAGE_FILE)
                self.storage.delete(name)
        if not self.storage.exists(MANIFEST):  # lost, if the stage has finished
            self.storage.delete(STAGE_FILE)
        if self.is_finished:  # any file missing from its manifest is not the run's
            return
        known = self.names()
        for name in self.storage.files():
            if name.endswith(".parquet") and name not in known and (entry := self._entry_of_chunk(name)) is not None:
                self._write_entry(name, entry)

    def flawed(self, on_file: Callable[[], None] = lambda: None) -> list[str]:
        """Returns the manifest's files that are missing or corrupt. Calls `on_file` after checking each file."""

        def is_flawed(item: tuple[str, Entry]) -> bool:
            name, entry = item
            found = self._entry_of(name)
            on_file()
            return found is None or found["sha256"] != entry["sha256"]

        entries = list(self.manifest().items())
        return [name for (name, _), flaw in zip(entries, _map(is_flawed, entries), strict=True) if flaw]

    def forget(self, names: Sequence[str]) -> None:
        """Deletes files and their entries, and marks the stage as unfinished."""
        self.storage.delete(STAGE_FILE)
        self.discard_keeping_finished(names)

    def discard_keeping_finished(self, names: Sequence[str]) -> None:
        """Deletes files and their entries. A finished stage stays finished."""
        entries = self.manifest()
        for name in names:
            self.storage.delete(f"{ENTRIES}/{name}.json")
            entries.pop(name, None)
        self.storage.write_json(MANIFEST, entries)
        for name in names:
            self.storage.delete(name)

    def _entry_of(self, name: str) -> Entry | None:
        """Computes the size and hash of a file; None if it is missing."""
        try:
            size, sha256 = self.storage.digest(name)
        except FileNotFoundError:
            return None
        return {"bytes": size, "sha256": sha256}

    def _entry_of_chunk(self, name: str) -> Entry | None:
        """Reconstructs an entry from its chunk; None if the chunk is corrupt or was not written by a stage."""
        content = self.storage.read(name)  # outside `try`: a failed read does not mean that the chunk is corrupt
        try:
            data = parquet_of(pa.BufferReader(content))
            counts = dict(json.loads(data.schema.metadata[COUNTS]))
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError):
            return None
        sha256 = hashlib.sha256(content).hexdigest()
        entry = {"rows": len(data), "bytes": len(content), "sha256": sha256} | counts
        return entry if _is_entry(entry) else None

    def copy(self, other: Stage, policy: str | None = None) -> dict[str, Any]:
        """Copies another run's finished stage into this one and records its origin as `copied_from`.

        `policy` renames the policy in rows and record, as the same weights have a different name in each run.
        """
        record = {"copied_from": other.storage.uri(), **other.record}
        entries = other.manifest()
        for name in [*other.storage.files(), *(name for name in entries if "/" in name)]:
            entry = entries.get(name, {})
            if policy is not None and name.endswith(".parquet") and entry:
                counts = {key: value for key, value in entry.items() if key not in ("rows", "bytes", "sha256")}
                chunk = name.removesuffix(".parquet")
                self.write(chunk, _renamed(other.read_chunk(chunk), policy), counts=counts)
            elif name not in (STAGE_FILE, MANIFEST):
                self.storage.write(name, other.storage.read(name))
                if entry:
                    self._write_entry(name, entry)
        return self.finish(record if policy is None else {**record, "policy": policy})


def _map(task: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Runs the task for each item, in THREADS threads."""
    if not items:
        return []
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(task, items))


def _is_corrupt(storage: Storage, name: str) -> bool:
    """Whether stage.json or a file of the manifest exists but is corrupt."""
    try:
        content = storage.read_json(name)
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError):
        return True
    if name == STAGE_FILE or not isinstance(content, dict):
        return not isinstance(content, dict)
    entries = content if name == MANIFEST else {name: content}
    return not all(_is_entry(entry) and ".." not in file.split("/") for file, entry in entries.items())


def _is_entry(value: Any) -> bool:
    """Whether it consists of a hash, a size and optional counts."""
    if not isinstance(value, dict) or not {"bytes", "sha256"} <= value.keys():
        return False
    return all(isinstance(item, str if key == "sha256" else int) for key, item in value.items())


def _renamed(rows: pa.Table, policy: str) -> pa.Table:
    """Returns the rows with their policy renamed."""
    field = rows.schema.field("policy")
    return rows.set_column(rows.schema.names.index("policy"), field, pa.array([policy] * len(rows), field.type))
