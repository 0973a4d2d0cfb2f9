"""A stage's folder: files that are written once and whole, each entered in a manifest with its size and hash.

    manifest/CHUNK.json    the entry of one chunk, written after the chunk itself
    manifest.json          all entries, gathered when the stage is finished
    stage.json             what was noted then; written last

A chunk without an entry is not there: it was torn, or is being written.
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
"""The key of a chunk's own metadata that repeats the counts of its entry."""
THREADS = 16
"""Files that are read at the same time: an object store answers each in milliseconds."""

Entry = dict[str, Any]
"""`rows` (of a chunk), `bytes`, `sha256`, and what its writer counted in it."""


@dataclass(frozen=True)
class Stage:
    """One folder of a run, filled by one step of one round. Picklable: workers write their chunks into it."""

    storage: Storage
    """Rooted at this stage's folder."""

    @property
    def is_finished(self) -> bool:
        return self.storage.exists(STAGE_FILE)

    @property
    def record(self) -> dict[str, Any]:
        """What was noted when the stage was finished."""
        return dict(self.storage.read_json(STAGE_FILE))

    def finish(self, record: dict[str, Any], files: Iterable[str] = ()) -> dict[str, Any]:
        """Gathers the manifest and notes the record; `files` are entered that are not chunks (`policy/x.json`)."""
        entries = self.manifest()
        entries |= {name: entry for name in files if (entry := self._entry_of(name)) is not None}
        self.storage.write_json(MANIFEST, dict(sorted(entries.items())))
        self.storage.write_json(STAGE_FILE, record)
        self.storage.delete(ENTRIES)
        return record

    def chunks(self) -> set[str]:
        """Names of the chunks that are there, each written whole."""
        return {name.removesuffix(".parquet") for name in self.names() if name.endswith(".parquet")}

    def has(self, chunk: str) -> bool:
        """Whether one chunk is there."""
        is_entered = self.storage.exists(f"{ENTRIES}/{chunk}.parquet.json")
        return is_entered or (self.is_finished and chunk in self.chunks())

    def names(self) -> set[str]:
        """Names of the files in the manifest."""
        gathered = self.storage.read_json(MANIFEST) if self.storage.exists(MANIFEST) else {}
        return {*gathered, *(name.removesuffix(".json") for name in self.storage.files(ENTRIES))}

    def manifest(self) -> dict[str, Entry]:
        """The entry of each file, by its name."""
        entries: dict[str, Entry] = self.storage.read_json(MANIFEST) if self.storage.exists(MANIFEST) else {}
        names = self.storage.files(ENTRIES)
        entries |= zip(
            (name.removesuffix(".json") for name in names),
            _all(lambda name: self.storage.read_json(f"{ENTRIES}/{name}"), names),
            strict=True,
        )
        return entries

    def counts(self) -> Counter[str]:
        """The sums of what the writers of the chunks counted in them, and of their rows."""
        total: Counter[str] = Counter()
        for entry in self.manifest().values():
            total.update({name: value for name, value in entry.items() if name not in ("bytes", "sha256")})
        return total

    def write(self, chunk: str, data: pa.Table, compression: str = "lz4", counts: dict[str, int] | None = None) -> None:
        """Writes a chunk and then its entry, which also holds `counts`; so does the chunk, should the entry be lost."""
        name = f"{chunk}.parquet"
        noted = data.replace_schema_metadata({COUNTS: json.dumps(counts or {})})
        written = self.storage.write_table(name, noted, compression)
        sha256 = hashlib.sha256(written).hexdigest()
        self._enter(name, {"rows": len(data), "bytes": len(written), "sha256": sha256} | (counts or {}))

    def _enter(self, name: str, entry: Entry) -> None:
        self.storage.write_json(f"{ENTRIES}/{name}.json", entry)

    def read_chunk(self, chunk: str, columns: list[str] | None = None) -> pa.Table:
        return self.storage.read_table(f"{chunk}.parquet", columns)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All chunks, in the order of their names."""
        return pa.concat_tables([self.read_chunk(chunk, columns) for chunk in sorted(self.chunks())])

    def recover(self) -> None:
        """Leaves a readable manifest: without what is torn of it, and with the whole chunks that lack an entry."""
        for name in [STAGE_FILE, MANIFEST, *(f"{ENTRIES}/{name}" for name in self.storage.files(ENTRIES))]:
            if _is_torn(self.storage, name):
                self.storage.delete(STAGE_FILE)
                self.storage.delete(name)
        if not self.storage.exists(MANIFEST):  # it was lost, as it is written before the stage is finished
            self.storage.delete(STAGE_FILE)
        if self.is_finished:  # a file that its manifest does not name is somebody's copy
            return
        known = self.names()
        for name in self.storage.files():
            if name.endswith(".parquet") and name not in known and (entry := self._entry_of_chunk(name)) is not None:
                self._enter(name, entry)

    def flawed(self, on_file: Callable[[], None] = lambda: None) -> list[str]:
        """The files of the manifest that are gone, or are not what was written; `on_file` is called after each."""

        def is_flawed(item: tuple[str, Entry]) -> bool:
            name, entry = item
            found = self._entry_of(name)
            on_file()
            return found is None or found["sha256"] != entry["sha256"]

        entries = list(self.manifest().items())
        return [name for (name, _), flaw in zip(entries, _all(is_flawed, entries), strict=True) if flaw]

    def forget(self, names: Sequence[str]) -> None:
        """Takes files out of the manifest, and deletes them: the stage is not finished any more."""
        self.storage.delete(STAGE_FILE)
        self.do_without(names)

    def do_without(self, names: Sequence[str]) -> None:
        """Takes files out of the manifest, and deletes them; a stage that is finished stays so."""
        entries = self.manifest()
        for name in names:
            self.storage.delete(f"{ENTRIES}/{name}.json")
            entries.pop(name, None)
        self.storage.write_json(MANIFEST, entries)
        for name in names:
            self.storage.delete(name)

    def _entry_of(self, name: str) -> Entry | None:
        """Size and hash of a file as it lies there; None where it is gone."""
        try:
            size, sha256 = self.storage.digest(name)
        except FileNotFoundError:
            return None
        return {"bytes": size, "sha256": sha256}

    def _entry_of_chunk(self, name: str) -> Entry | None:
        """The entry of a chunk, made from itself; None where it is torn or was not written here."""
        content = self.storage.read(name)  # by itself: that this fails does not say that the chunk is torn
        try:
            data = parquet_of(pa.BufferReader(content))
            counts = dict(json.loads(data.schema.metadata[COUNTS]))
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError):
            return None
        sha256 = hashlib.sha256(content).hexdigest()
        entry = {"rows": len(data), "bytes": len(content), "sha256": sha256} | counts
        return entry if _is_entry(entry) else None

    def copy(self, other: Stage, policy: str | None = None) -> dict[str, Any]:
        """Becomes what another run's finished stage is; its record says where that is from (`copied_from`).

        With `policy`, that is what rows and record call the policy here: the same weights have their name in each run.
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
                    self._enter(name, entry)
        return self.finish(record if policy is None else {**record, "policy": policy})


def _all(task: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """The task's result for each item, several at a time."""
    if not items:
        return []
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(task, items))


def _is_torn(storage: Storage, name: str) -> bool:
    """Whether a file of the manifest, or stage.json, is there and is not what is written there."""
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
    """Whether it holds a hash, a size, and besides only counts."""
    if not isinstance(value, dict) or not {"bytes", "sha256"} <= value.keys():
        return False
    return all(isinstance(of, str if key == "sha256" else int) for key, of in value.items())


def _renamed(rows: pa.Table, policy: str) -> pa.Table:
    """Rows with another name for the policy that made them."""
    field = rows.schema.field("policy")
    return rows.set_column(rows.schema.names.index("policy"), field, pa.array([policy] * len(rows), field.type))
