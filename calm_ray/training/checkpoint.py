"""Training checkpoints in the stage's storage: safetensors and JSON, readable by any number of workers.

    checkpoints/00000200/shard-*.safetensors   trainable parameters and Adam's moments, one file per worker
    checkpoints/00000200/state.json            position in the data, metrics so far, and other trainer state
    checkpoints/00000200/checkpoint.json       step, workers, size and hash of every file; written last

A checkpoint is valid if checkpoint.json exists and lists exactly the files present, with matching hashes.

Files in transit are staged in the node's cache. A killed worker leaves its files there; the next attempt starts with
`newest_valid`, which deletes them on every node it runs on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_slices
from torch.distributed.checkpoint.state_dict_saver import save as save_slices

from calm_ray.run.policies import cache_folder, node_lock
from calm_ray.run.storage import Storage

FOLDER = "checkpoints"
MANIFEST_FILE = "checkpoint.json"
STATE_FILE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")

Parameters = Mapping[str, nn.Parameter]
Entry = dict[str, Any]
"""`bytes` and `sha256` of a file."""


@dataclass(frozen=True)
class Position:
    """Position in the data: total steps so far, `batches` of them in `epoch`."""

    step: int = 0
    epoch: int = 0
    batches: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint."""

    storage: Storage
    step: int
    files: dict[str, Entry]

    @cached_property
    def state(self) -> dict[str, Any]:
        return dict(self.storage.read_json(f"{_folder(self.step)}/{STATE_FILE}"))

    def restore(self, parameters: Parameters, optimizer: torch.optim.Optimizer) -> None:
        """Restores the parameters and their Adam state in place. Collective: call on all ranks."""
        for name, steps in self.state["adam_steps"].items():
            parameter = parameters[name]
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}
        with self._local_folder() as folder:
            load_slices(_tensors(parameters, optimizer), storage_reader=HuggingFaceStorageReader(str(folder)))

    @contextmanager
    def _local_folder(self) -> Iterator[Path]:
        """The checkpoint's own folder if the storage is a shared disk, else a copy shared by the node's workers."""
        relative = _folder(self.step)
        if self.storage.is_local:
            yield Path(self.storage.path(relative))
            return
        digest = hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()
        copy = cache_folder() / FOLDER / f"{_prefix(self.storage)}{digest}"
        with node_lock(copy):
            if not copy.is_dir():
                self.storage.download(relative, copy)
        yield copy
        dist.barrier()
        shutil.rmtree(copy, ignore_errors=True)


def save(
    storage: Storage, step: int, parameters: Parameters, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Writes a checkpoint, then deletes all but the previous one. Collective: call on all ranks.

    `state` must be JSON; only rank 0's is used. Raises StorageError if the files cannot be written.
    """
    is_first = dist.get_rank() == 0
    if is_first:
        storage.delete(_folder(step))  # left by an incomplete save
    with scratch_folder(storage) as folder:
        # Also a barrier: no rank uploads before rank 0 has deleted the old folder.
        save_slices(
            _tensors(parameters, optimizer),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        )
        if is_first:
            steps = {name: int(optimizer.state[p]["step"]) for name, p in parameters.items() if p in optimizer.state}
            (folder / STATE_FILE).write_text(json.dumps({**state, "adam_steps": steps}))
        storage.upload(folder, _folder(step))
        written = {file.name: _entry(file) for file in folder.iterdir()}
    files: list[dict[str, Entry]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(files, written)
    if is_first:
        record = {"step": step, "workers": len(files), "files": {k: v for part in files for k, v in part.items()}}
        storage.write_json(f"{_folder(step)}/{MANIFEST_FILE}", record)
        _delete_old(storage, step)


def newest_valid(storage: Storage) -> Checkpoint | None:
    """The newest valid checkpoint, if any. Collective: call on all ranks, before the first save.

    Each worker checks the hashes of its share of the files.
    """
    for left in (cache_folder() / FOLDER).glob(f"{_prefix(storage)}*"):
        shutil.rmtree(left, ignore_errors=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    found: list[Any] = [_complete(storage) if rank == 0 else None]
    dist.broadcast_object_list(found)
    for step, files in found[0]:
        share = sorted(files)[rank::world]
        is_intact = all(_is_intact(storage, f"{_folder(step)}/{name}", files[name]) for name in share)
        verdicts = [False] * world
        dist.all_gather_object(verdicts, is_intact)
        if all(verdicts):
            return Checkpoint(storage, step, files)
    return None


def newest_step(storage: Storage) -> int | None:
    """Step of the newest checkpoint with all its files; does not check hashes. Callable from any process."""
    return next((step for step, _ in _complete(storage)), None)


@contextmanager
def scratch_folder(storage: Storage) -> Iterator[Path]:
    """A temporary folder on this node's disk for files to be uploaded."""
    home = cache_folder() / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_prefix(storage), dir=home) as scratch:
        yield Path(scratch)


def delete_all(storage: Storage) -> None:
    """Deletes all checkpoints, once the resulting policy is published."""
    storage.delete(FOLDER)


def _tensors(parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and Adam's moments by flat name. A parameter that never had a gradient has no moments."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[name] = parameter.detach()
        if parameter in optimizer.state:
            tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
    return tensors


def _prefix(storage: Storage) -> str:
    """Prefix of this storage's files in the node's cache."""
    return f"{hashlib.sha256(storage.root.encode()).hexdigest()[:16]}."


def _folder(step: int) -> str:
    return f"{FOLDER}/{step:08d}"


def _steps(storage: Storage) -> list[int]:
    """Steps with any files, newest first."""
    return sorted((int(name) for name in storage.names(FOLDER) if name.isdecimal()), reverse=True)


def _complete(storage: Storage) -> list[tuple[int, dict[str, Entry]]]:
    """Steps and files of the checkpoints that have exactly the files they list, newest first."""
    found = []
    for step in _steps(storage):
        present = set(storage.files(_folder(step)))
        if MANIFEST_FILE not in present:
            continue
        try:
            files = storage.read_json(f"{_folder(step)}/{MANIFEST_FILE}")["files"]
        except (ValueError, LookupError, TypeError):  # corrupt
            continue
        if present == {*files, MANIFEST_FILE}:
            found.append((step, files))
    return found


def _is_intact(storage: Storage, relative: str, entry: Entry) -> bool:
    try:
        return storage.digest(relative) == (entry["bytes"], entry["sha256"])
    except FileNotFoundError:
        return False


def _entry(file: Path) -> Entry:
    with open(file, "rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _delete_old(storage: Storage, newest: int) -> None:
    """Keeps the newest checkpoint and the last complete one before it."""
    before = [step for step, _ in _complete(storage) if step < newest]
    for step in _steps(storage):
        if step not in (newest, *before[:1]):
            storage.delete(_folder(step))
