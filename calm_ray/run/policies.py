"""Policies by name: the base model, or an immutable adapter or set of weights that a round wrote.

Names contain the round and a hash of the weights, so no cache can serve an older policy under a newer name. Each node
loads policies from copies on its own disk, in the cache folder `CALM_RAY_CACHE` (default `~/.cache/calm_ray`).
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from calm_ray.core.errors import CalmRayError, InputError
from calm_ray.core.rows import BASE_POLICY
from calm_ray.core.safety import local_path, redact
from calm_ray.run.model_files import SUFFIXES
from calm_ray.run.model_files import require_safetensors as require_safetensors
from calm_ray.run.storage import Storage, hash_folder

LOAD_TIMEOUT = 3600.0
"""Seconds after which a process that fetched a policy has loaded it."""
STALE_AFTER = 86400.0
"""Seconds without a new file after which the process filling a temporary folder must be dead."""


def cache_folder() -> Path:
    """The node's local cache."""
    return Path(os.environ.get("CALM_RAY_CACHE", "~/.cache/calm_ray")).expanduser()


@dataclass(frozen=True)
class Policy:
    """A policy to load. `base` has neither a location nor a hash: its weights are the run's model."""

    name: str = BASE_POLICY
    round: int = 0
    kind: Literal["base", "adapter", "weights"] = "base"
    location: str = ""
    """URI of the folder in the run's storage."""
    sha256: str = ""

    def __post_init__(self) -> None:
        _check_cached(self.name, self.sha256)

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def local_folder(self) -> Path:
        """Returns the policy's folder on this node, fetched once and checked against its hash."""
        return fetch(self.location, self.sha256, cache_folder() / "policies" / self.name)


@dataclass(frozen=True)
class RunModel:
    """A run's model. A folder or hub name is used as is; the demo's model is shared through the run's storage."""

    name: str
    """A folder visible to every node, a name on the Hugging Face hub, or the demo model's cache key."""
    location: str = ""
    """URI in the run's storage, for the demo's model only."""
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.location:
            _check_cached(self.name, self.sha256)

    @property
    def is_folder(self) -> bool:
        """Whether `name` is a path; a name on the hub is `owner/name`."""
        return self.name.startswith(("/", ".", "~")) or local_path(self.name, "model").is_dir()

    def local_folder(self, *, weights: bool = True) -> Path:
        """Returns the model's folder on this node; downloads hub models, safetensors only.

        Pass `weights=False` if only the config and tokenizer are needed.
        """
        if self.location:
            return fetch(self.location, self.sha256, cache_folder() / "models" / f"{self.name}-{self.sha256[:8]}")
        if self.is_folder:
            folder = local_path(self.name, "model")
            if not folder.is_dir():
                raise InputError(f"model: there is no folder {folder} on this node; every node must see it")
            return folder.absolute()
        from huggingface_hub import snapshot_download

        patterns = [f"*{suffix}" for suffix in SUFFIXES if weights or suffix != ".safetensors"]
        try:
            return Path(snapshot_download(self.name, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            reason = redact(str(error).strip().splitlines()[0])
            raise InputError(
                f"model: there is no folder {self.name} here, and downloading it from the hub failed ({reason}); "
                "private and gated models need HF_TOKEN"
            ) from None


def _check_cached(name: str, sha256: str) -> None:
    """Raises InputError for a name that would point outside the cache, as a run's files are untrusted."""
    if not re.fullmatch(r"[\w-][\w.-]*", name) or not re.fullmatch(r"\w*", sha256):
        raise InputError(f"invalid policy or model {name[:200]!r}; the run's files are corrupt")


def fetch(location: str, sha256: str, folder: Path) -> Path:
    """Copies a folder from the run's storage to this node's disk, once for all processes of the node."""
    with node_lock(folder):
        if not folder.is_dir():
            storage = Storage(location)
            if not storage.files():
                raise CalmRayError(f"{location} does not exist: its run was moved or deleted; restore it")
            storage.download("", folder)
            if hash_folder(folder) != sha256:
                shutil.rmtree(folder)
                raise CalmRayError(f"{location} has changed since it was written; restore or regenerate it")
        os.utime(folder)  # marks the last use for `evict_policies`
    if hash_folder(folder) != sha256:
        raise CalmRayError(f"{folder}, a copy of {location}, has changed; delete it and start again")
    return folder


def evict_policies(keep: Collection[str]) -> None:
    """Deletes this node's copies of policies, which can be as large as the model, except those named in `keep`.

    Copies used within the last hour, by any run, stay because they may be loading. Deleted ones can be fetched again.
    """
    for folder in (cache_folder() / "policies").glob("[!.]*"):
        if folder.name in keep or ".tmp-" in folder.name:
            continue
        with node_lock(folder), suppress(FileNotFoundError):  # another process may have deleted it
            if time.time() - folder.stat().st_mtime > LOAD_TIMEOUT:
                # Renamed first, so that an interrupted deletion never leaves a partial policy.
                trash = folder.rename(folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}"))
                shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def node_lock(folder: Path) -> Iterator[None]:
    """Lets one process of the node at a time fill a folder of the cache.

    Also deletes temporary folders next to it that were left by killed processes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        for unfinished in folder.parent.glob("*.tmp-*"):
            with suppress(FileNotFoundError):  # renamed or deleted in the meantime
                if time.time() - unfinished.stat().st_mtime > STALE_AFTER:
                    shutil.rmtree(unfinished, ignore_errors=True)
        yield


def publish(
    folder: Path, storage: Storage, relative: str, round_number: int, kind: Literal["adapter", "weights"]
) -> Policy:
    """Copies a policy's folder into the run's storage and names the policy after its round and hash."""
    sha256 = hash_folder(folder)
    storage.upload(folder, relative)
    return Policy(f"r{round_number:04d}-{sha256[:8]}", round_number, kind, storage.uri(relative), sha256)
