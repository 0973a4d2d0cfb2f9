"""Files under one root, on a disk shared by all nodes or in an object store. All writes are atomic."""

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
from calm_ray.core.safety import path_problem, redact, refuse_secrets

T = TypeVar("T")
BLOCK_BYTES = 16 << 20
"""Read files in blocks of this size."""
WAITS = (1, 2, 4, 8, 16, 32, 60)
"""Seconds to wait between attempts when an object store does not respond."""
_PERMANENT = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_|MISSING_|NO_SUCH_BUCKET|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT)"
    r"|HTTP status (3\d\d|40[0-7])|Bucket '[^']*' not found|PERMISSION_DENIED|UNAUTHENTICATED"
)
"""pyarrow's error texts that are not worth retrying: missing buckets, wrong or insufficient credentials."""


class Storage:
    """A folder, by absolute path or URI (`s3://bucket/runs`). Small and picklable, so it can be passed to workers.

    All access raises StorageError if the disk or object store fails. An object store that does not respond is retried
    for two minutes first.
    """

    def __init__(self, root: str) -> None:
        try:
            refuse_secrets(root, "storage")
        except ValueError as error:
            raise InputError(str(error)) from None
        if problem := path_problem(root):
            raise InputError(f"storage: {problem}")
        if "://" not in root:
            path = Path(root).expanduser()
            if not path.is_absolute():
                raise InputError(f"storage: {root!r} is neither an absolute path nor a URI; every node must reach it")
            root = str(path)
        if "://" in root and "?" in root:
            raise InputError(
                f"storage: {root!r}: options after a ? are not supported; set AWS_REGION and AWS_ENDPOINT_URL instead"
            )
        self.root = root.rstrip("/")

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root}

    @cached_property
    def _resolved(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.root:
            return fs.LocalFileSystem(), self.root
        # Without this option, S3 needs three requests per file: start a multipart upload, send the part, complete it.
        uri = f"{self.root}?allow_delayed_open=true" if self.root.startswith("s3://") else self.root
        try:
            return self._try("reached", "", lambda: fs.FileSystem.from_uri(uri))
        except (pa.ArrowException, ValueError) as error:
            raise InputError(f"storage: {self.root} cannot be used: {error}") from None

    def _try(self, done: str, relative: str, action: Callable[[], T]) -> T:
        """Returns the action's result, after retries if they may help.

        Raises StorageError, and FileNotFoundError if a file to be read does not exist.
        """
        waits = list(WAITS)
        while True:
            try:
                return action()
            except OSError as error:
                if done == "read" and isinstance(error, FileNotFoundError):
                    raise
                failure = f"storage: {self.uri(relative)} could not be {done}: {_reason(error)}"
                if not waits or not self._is_transient(error):
                    raise StorageError(
                        f"{failure}. Everything written so far is kept; rerun the same command to resume."
                    ) from error
            if len(waits) == len(WAITS):
                say(f"{failure}; retrying")
            time.sleep(waits.pop(0))

    def _is_transient(self, error: OSError) -> bool:
        """Whether a retry may help. Errors of a local disk are treated as permanent."""
        is_remote = "://" in self.root and not self.root.startswith("file:")
        is_permanent = isinstance(error, FileNotFoundError | PermissionError) or _PERMANENT.search(str(error))
        return is_remote and not is_permanent

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._resolved[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, relative: str = "") -> str:
        """The path within `filesystem`, as pyarrow and Ray Data expect it."""
        return f"{self._resolved[1]}/{relative}".rstrip("/")

    def uri(self, relative: str = "") -> str:
        """The location to show to the user or send to other nodes."""
        return f"{self.root}/{relative}" if relative else self.root

    def under(self, relative: str) -> Storage:
        return Storage(self.uri(relative))

    def exists(self, relative: str) -> bool:
        path = self.path(relative)
        info = self._try("checked", relative, lambda: self.filesystem.get_file_info(path))
        return info.type != fs.FileType.NotFound

    def files(self, relative: str = "") -> list[str]:
        """Sorted names of the files directly in a folder; empty if there is no such folder."""
        return sorted(info.base_name for info in self._children(relative) if info.is_file)

    def names(self, relative: str = "") -> list[str]:
        """Sorted names of the files and folders directly in a folder; empty if there is no such folder."""
        return sorted(info.base_name for info in self._children(relative))

    def _children(self, relative: str) -> list[fs.FileInfo]:
        """Lists the direct children of a folder, except temporary files left by interrupted writes."""
        folder = fs.FileSelector(self.path(relative), allow_not_found=True)
        infos = self._try("listed", relative, lambda: self.filesystem.get_file_info(folder))
        return [info for info in infos if ".tmp-" not in info.base_name]

    def delete(self, relative: str) -> None:
        """Deletes a file, or a folder and its contents, if it exists."""
        path = self.path(relative)
        self._try("deleted", relative, lambda: self._delete(path))

    def _delete(self, path: str) -> None:
        kind = self.filesystem.get_file_info(path).type
        if kind == fs.FileType.File:
            self.filesystem.delete_file(path)
        elif kind == fs.FileType.Directory:
            self.filesystem.delete_dir(path)

    def write(self, relative: str, data: bytes | pa.Buffer) -> None:
        """Writes a file atomically: renames it into place on disk, uses a single put on object stores.

        Raises StorageError if that fails; any earlier content is then unchanged.
        """
        if self.is_local:
            self._try("written", relative, lambda: _write_atomically(Path(self.path(relative)), data))
            return
        # In a thread, where no signal can interrupt it: closing the stream before the data is in puts an empty object.
        with ThreadPoolExecutor(1) as thread:
            put = partial(thread.submit, self._put, self.path(relative), pa.py_buffer(data))
            self._try("written", relative, lambda: put().result())

    def _put(self, target: str, data: pa.Buffer) -> None:
        with self.filesystem.open_output_stream(target) as stream:
            stream.write(data)

    def digest(self, relative: str) -> tuple[int, str]:
        """Returns a file's size in bytes and its SHA-256. Raises FileNotFoundError."""
        digest, size = hashlib.sha256(), 0
        for block in self._blocks(relative):
            digest.update(block)
            size += len(block)
        return size, digest.hexdigest()

    def read(self, relative: str) -> bytes:
        """Returns a file's content. Raises FileNotFoundError."""
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
        """Writes a Parquet file and returns its bytes. LZ4 compresses text as well as Snappy and reads much faster."""
        sink = pa.BufferOutputStream()
        pq.write_table(data, sink, compression=compression, write_page_checksum=True)
        content = sink.getvalue()
        self.write(relative, content)
        return content

    def read_table(self, relative: str, columns: list[str] | None = None) -> pa.Table:
        """Reads a Parquet file. Raises FileNotFoundError; OSError or ArrowException if the file is corrupt."""
        if not self.is_local:
            return parquet_of(pa.BufferReader(self.read(relative)), columns)
        with self.filesystem.open_input_file(self.path(relative)) as file:  # reads only these columns
            return parquet_of(file, columns)

    def hash_folder(self, relative: str) -> str:
        """SHA-256 over the names and contents of the files directly in a folder; equals `hash_folder` on a disk."""
        return _hash_of(self.files(relative), lambda name: self.digest(f"{relative}/{name}")[1])

    def upload(self, folder: Path, relative: str) -> None:
        """Copies the files directly in a local folder to `relative`."""
        for file in sorted(folder.iterdir()):
            self.write(f"{relative}/{file.name}", pa.memory_map(str(file)).read_buffer())

    def download(self, relative: str, folder: Path) -> None:
        """Copies the files directly in `relative` to a new local folder, atomically."""
        temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        prefix = f"{relative}/" if relative else ""  # object stores do not allow empty path segments
        try:
            temporary.mkdir(parents=True)
            for name in self.files(relative):
                with open(temporary / name, "wb") as target:
                    target.writelines(self._blocks(f"{prefix}{name}"))
            temporary.rename(folder)
        except OSError as error:
            raise StorageError(
                f"storage: {self.uri(relative)} could not be copied to {folder}: {_reason(error)}; "
                "rerun the same command to resume"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # frees space if the disk is full


def _reason(error: OSError) -> str:
    return redact(error.strerror or str(error)).strip().removesuffix(".")


def parquet_of(file: pa.NativeFile, columns: list[str] | None = None) -> pa.Table:
    """Reads a Parquet file and verifies its checksums. Raises OSError or ArrowException if it is corrupt."""
    return pq.ParquetFile(file, page_checksum_verification=True).read(columns=columns)


def _write_atomically(target: Path, data: bytes | pa.Buffer) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)  # frees space if the disk is full
        raise


def _hash_of(names: Iterable[str], digest_of: Callable[[str], str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + b"\0" + bytes.fromhex(digest_of(name)))
    return digest.hexdigest()


def storage_at(location: str) -> Storage:
    """The storage at a URI or path that the user gave. Paths may be relative to the working directory."""
    if "://" in location or path_problem(location):
        return Storage(location)
    return Storage(str(Path(location).expanduser().absolute()))


def hash_folder(folder: Path) -> str:
    """Hexadecimal SHA-256 over the names and contents of the files directly in a folder."""

    def digest_of(name: str) -> str:
        with open(folder / name, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    return _hash_of([file.name for file in folder.iterdir()], digest_of)
