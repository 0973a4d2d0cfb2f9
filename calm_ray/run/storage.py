"""Files under one root: a disk that every node sees, or an object store. Everything is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from calm_ray.core.console import say
from calm_ray.core.errors import InputError, StorageError
from calm_ray.core.safety import local_problem, redact, refuse_secrets

T = TypeVar("T")
BLOCK_BYTES = 16 << 20
"""What is read of a file at a time."""
WAITS = (1, 2, 4, 8, 16, 32, 60)
"""Seconds between the attempts at an object store that does not answer."""
_FOR_GOOD = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_|MISSING_|NO_SUCH_BUCKET|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT)"
    r"|HTTP status (3\d\d|40[0-7])|Bucket '[^']*' not found|PERMISSION_DENIED|UNAUTHENTICATED"
)
"""How pyarrow words what no waiting mends: a bucket that is not there, credentials that are wrong or forbidden."""


class Storage:
    """A folder, by absolute path or URI (`s3://bucket/runs`). Small and picklable: workers get it as it is.

    Whatever looks, reads or writes raises StorageError where the disk or the object store does not let it; an object
    store that does not answer is first asked again for two minutes.
    """

    def __init__(self, root: str) -> None:
        try:
            refuse_secrets(root, "storage")
        except ValueError as error:
            raise InputError(str(error)) from None
        if problem := local_problem(root):
            raise InputError(f"storage: {problem}")
        if "://" not in root:
            path = Path(root).expanduser()
            if not path.is_absolute():
                raise InputError(f"storage: {root!r} is neither an absolute path nor a URI; every node must find it")
            root = str(path)
        if "://" in root and "?" in root:
            raise InputError(
                f"storage: {root!r}: options after a ? are not kept; set AWS_REGION and AWS_ENDPOINT_URL instead"
            )
        self.root = root.rstrip("/")

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root}

    @cached_property
    def _resolved(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.root:
            return fs.LocalFileSystem(), self.root
        # Without that option, S3 is asked three times for each file: to begin an upload, for its part, and to end it.
        uri = f"{self.root}?allow_delayed_open=true" if self.root.startswith("s3://") else self.root
        try:
            return self._try("reached", "", lambda: fs.FileSystem.from_uri(uri))
        except (pa.ArrowException, ValueError) as error:
            raise InputError(f"storage: {self.root} cannot be used: {error}") from None

    def _try(self, done: str, relative: str, action: Callable[[], T]) -> T:
        """What the action returns; tries it again where that may help.

        Raises StorageError, and FileNotFoundError where there is nothing to be read.
        """
        waits = list(WAITS)
        while True:
            try:
                return action()
            except OSError as error:
                if done == "read" and isinstance(error, FileNotFoundError):
                    raise
                failure = f"storage: {self.uri(relative)} could not be {done}: {_reason(error)}"
                if not waits or not self._may_pass(error):
                    raise StorageError(
                        f"{failure}. What was written before is kept; the same command goes on."
                    ) from error
            if len(waits) == len(WAITS):
                say(f"{failure}; trying again")
            time.sleep(waits.pop(0))

    def _may_pass(self, error: OSError) -> bool:
        """Whether the storage may well answer a moment later; what a disk refuses, it refuses for good."""
        is_remote = "://" in self.root and not self.root.startswith("file:")
        is_final = isinstance(error, FileNotFoundError | PermissionError) or _FOR_GOOD.search(str(error))
        return is_remote and not is_final

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._resolved[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, relative: str = "") -> str:
        """The path inside `filesystem`, as pyarrow and Ray Data want it."""
        return f"{self._resolved[1]}/{relative}".rstrip("/")

    def uri(self, relative: str = "") -> str:
        """What a person or another node would call it."""
        return f"{self.root}/{relative}" if relative else self.root

    def under(self, relative: str) -> Storage:
        return Storage(self.uri(relative))

    def exists(self, relative: str) -> bool:
        path = self.path(relative)
        found = self._try("looked for", relative, lambda: self.filesystem.get_file_info(path))
        return found.type != fs.FileType.NotFound

    def files(self, relative: str = "") -> list[str]:
        """Names of the files directly in a folder, sorted; none where there is no such folder."""
        return sorted(info.base_name for info in self._children(relative) if info.is_file)

    def names(self, relative: str = "") -> list[str]:
        """Names of all files and folders directly in a folder, sorted; none where there is no such folder."""
        return sorted(info.base_name for info in self._children(relative))

    def _children(self, relative: str) -> list[fs.FileInfo]:
        """What lies directly in a folder, but for files that were never written to their end."""
        folder = fs.FileSelector(self.path(relative), allow_not_found=True)
        found = self._try("listed", relative, lambda: self.filesystem.get_file_info(folder))
        return [info for info in found if ".tmp-" not in info.base_name]

    def delete(self, relative: str) -> None:
        """Deletes a file, or a folder with all that is in it."""
        path = self.path(relative)
        self._try("deleted", relative, lambda: self._delete(path))

    def _delete(self, path: str) -> None:
        kind = self.filesystem.get_file_info(path).type
        if kind == fs.FileType.File:
            self.filesystem.delete_file(path)
        elif kind == fs.FileType.Directory:
            self.filesystem.delete_dir(path)

    def write(self, relative: str, data: bytes | pa.Buffer) -> None:
        """Writes a file so that it is there whole or not at all: renamed into place, or one put on object stores.

        Raises StorageError where that fails; what was there before is then still there.
        """
        if self.is_local:
            self._try("written", relative, lambda: _write_whole(Path(self.path(relative)), data))
            return
        # In a thread, where no signal arrives: one that came before the data was in would put an empty object.
        with ThreadPoolExecutor(1) as thread:
            put = partial(thread.submit, self._put, self.path(relative), pa.py_buffer(data))
            self._try("written", relative, lambda: put().result())

    def _put(self, target: str, data: pa.Buffer) -> None:
        with self.filesystem.open_output_stream(target) as stream:
            stream.write(data)

    def digest(self, relative: str) -> tuple[int, str]:
        """Size in bytes and SHA-256 of a file; FileNotFoundError where there is none."""
        digest, size = hashlib.sha256(), 0
        for block in self._blocks(relative):
            digest.update(block)
            size += len(block)
        return size, digest.hexdigest()

    def read(self, relative: str) -> bytes:
        """The content of a file; FileNotFoundError where there is none."""
        return b"".join(self._blocks(relative))

    def _blocks(self, relative: str) -> Iterator[bytes]:
        path = self.path(relative)
        with self._try("read", relative, lambda: self.filesystem.open_input_file(path)) as file:
            size = file.size()
            for start in range(0, size, BLOCK_BYTES):
                length = min(BLOCK_BYTES, size - start)
                yield self._try("read", relative, partial(file.read_at, length, start))

    def write_json(self, relative: str, value: Any) -> None:
        self.write(relative, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, relative: str) -> Any:
        return json.loads(self.read(relative))

    def write_table(self, relative: str, data: pa.Table, compression: str = "lz4") -> pa.Buffer:
        """Writes Parquet, and returns its bytes. LZ4 makes texts as small as Snappy, and is read much faster."""
        sink = pa.BufferOutputStream()
        pq.write_table(data, sink, compression=compression, write_page_checksum=True)
        content = sink.getvalue()
        self.write(relative, content)
        return content

    def read_table(self, relative: str, columns: list[str] | None = None) -> pa.Table:
        """One Parquet file; FileNotFoundError where there is none, OSError or ArrowException where it is damaged."""
        if not self.is_local:
            return parquet_of(pa.BufferReader(self.read(relative)), columns)
        with self.filesystem.open_input_file(self.path(relative)) as file:  # of which only these columns are read
            return parquet_of(file, columns)

    def hash_folder(self, relative: str) -> str:
        """SHA-256 over the names and contents of the files directly in a folder, as `hash_folder` has it on a disk."""
        return _hash_of(self.files(relative), lambda name: self.digest(f"{relative}/{name}")[1])

    def upload(self, folder: Path, relative: str) -> None:
        """Copies the files directly in a local folder."""
        for file in sorted(folder.iterdir()):
            self.write(f"{relative}/{file.name}", pa.memory_map(str(file)).read_buffer())

    def download(self, relative: str, folder: Path) -> None:
        """Copies the files directly in `relative` to a local folder, which is there whole or not at all."""
        temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        prefix = f"{relative}/" if relative else ""  # object stores know no empty names
        try:
            temporary.mkdir(parents=True)
            for name in self.files(relative):
                with open(temporary / name, "wb") as target:
                    target.writelines(self._blocks(f"{prefix}{name}"))
            temporary.rename(folder)
        except OSError as error:
            raise StorageError(
                f"storage: {self.uri(relative)} could not be copied to {folder}: {_reason(error)}; "
                "the same command goes on"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, room for others


def _reason(error: OSError) -> str:
    return redact(error.strerror or str(error)).strip().removesuffix(".")


def parquet_of(file: pa.NativeFile, columns: list[str] | None = None) -> pa.Table:
    """The table that a Parquet file is; OSError or ArrowException where that is damaged."""
    return pq.ParquetFile(file, page_checksum_verification=True).read(columns=columns)


def _write_whole(target: Path, data: bytes | pa.Buffer) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk, room for others
        raise


def _hash_of(names: Iterable[str], digest_of: Callable[[str], str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + b"\0" + bytes.fromhex(digest_of(name)))
    return digest.hexdigest()


def storage_named(location: str) -> Storage:
    """The folder that a person names: a URI, or a path, which may be relative to where they are."""
    if "://" in location or local_problem(location):
        return Storage(location)
    return Storage(str(Path(location).expanduser().absolute()))


def hash_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of the files directly in a folder, in hexadecimal."""

    def digest_of(name: str) -> str:
        with open(folder / name, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    return _hash_of([file.name for file in folder.iterdir()], digest_of)
