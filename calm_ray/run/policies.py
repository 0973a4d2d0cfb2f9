"""Policies by name: the base model, or an immutable adapter or set of weights that a round wrote.

Names change with every round and carry a hash of the weights, so no cache can serve an older policy under a newer name.
A node reads a policy from its own disk: the cache folder `CALM_RAY_CACHE` (default `~/.cache/calm_ray`) holds copies,
keyed by hash.
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

LOADED_WITHIN = 3600.0
"""Seconds after which whoever fetched a policy has loaded it."""
KILLED_BEFORE = 86400.0
"""Seconds without a new file after which nobody is making a folder any more."""


def cache_folder() -> Path:
    """The node-local cache."""
    return Path(os.environ.get("CALM_RAY_CACHE", "~/.cache/calm_ray")).expanduser()


@dataclass(frozen=True)
class Policy:
    """What to load. `base` has neither a location nor a hash; its weights are the run's model."""

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
        """The policy's folder on this node, fetched once and checked against its hash."""
        return fetch(self.location, self.sha256, cache_folder() / "policies" / self.name)


@dataclass(frozen=True)
class RunModel:
    """The model of a run. A folder or hub name is used as it is; the demo's model travels through the run's storage."""

    name: str
    """A folder that every node sees, a name on the Hugging Face hub, or the demo model's cache key."""
    location: str = ""
    """URI in the run's storage, for the demo's model."""
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.location:
            _check_cached(self.name, self.sha256)

    @property
    def is_folder(self) -> bool:
        """Whether `name` is a path; a name on the hub is `owner/name`."""
        return self.name.startswith(("/", ".", "~")) or local_path(self.name, "model").is_dir()

    def local_folder(self, *, weights: bool = True) -> Path:
        """The model's folder on this node; downloads it from the hub, safetensors only, where it is a name there.

        `weights=False` is for who only needs the configuration and the tokenizer.
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
                f"model: there is no folder {self.name} here, and the hub did not give it ({reason}); "
                "models that need a login need HF_TOKEN"
            ) from None


def _check_cached(name: str, sha256: str) -> None:
    """Raises InputError for a name that would lead out of the cache: a run's records may come from anywhere."""
    if not re.fullmatch(r"[\w-][\w.-]*", name) or not re.fullmatch(r"\w*", sha256):
        raise InputError(f"a policy or model of a run cannot be called {name[:200]!r}; its records are damaged")


def fetch(location: str, sha256: str, folder: Path) -> Path:
    """A copy of a folder of the run's storage on this node's disk; the same copy for all processes of the node."""
    with node_lock(folder):
        if not folder.is_dir():
            storage = Storage(location)
            if not storage.files():
                raise CalmRayError(f"{location} is not there: its run was moved or deleted; put it back")
            storage.download("", folder)
            if hash_folder(folder) != sha256:
                shutil.rmtree(folder)
                raise CalmRayError(f"{location} is not what was written there: put it back, or make it again")
        os.utime(folder)  # the last use, for `forget_policies`
    if hash_folder(folder) != sha256:
        raise CalmRayError(
            f"{folder} is not what {location} held when it was written; delete the folder and start again"
        )
    return folder


def forget_policies(keep: Collection[str]) -> None:
    """Deletes this node's copies of policies but those named in `keep`: weights are as large as the model.

    What any run fetched here within the hour stays, as it may be loading; the rest is fetched again at need.
    """
    for folder in (cache_folder() / "policies").glob("[!.]*"):
        if folder.name in keep or ".tmp-" in folder.name:
            continue
        with node_lock(folder), suppress(FileNotFoundError):  # another process may have been first
            if time.time() - folder.stat().st_mtime > LOADED_WITHIN:
                # Renamed first: a deletion that is interrupted leaves no part of a policy under its name.
                going = folder.rename(folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}"))
                shutil.rmtree(going, ignore_errors=True)


@contextmanager
def node_lock(folder: Path) -> Iterator[None]:
    """Held by the one process of a node that makes a folder of the cache, while the others wait for it.

    Deletes what processes that were killed left of other folders beside it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        for unfinished in folder.parent.glob("*.tmp-*"):
            with suppress(FileNotFoundError):  # its maker, or another process, was first
                if time.time() - unfinished.stat().st_mtime > KILLED_BEFORE:
                    shutil.rmtree(unfinished, ignore_errors=True)
        yield


def publish(
    folder: Path, storage: Storage, relative: str, round_number: int, kind: Literal["adapter", "weights"]
) -> Policy:
    """Copies a policy's folder into the run's storage and names it after its round and its hash."""
    sha256 = hash_folder(folder)
    storage.upload(folder, relative)
    return Policy(f"r{round_number:04d}-{sha256[:8]}", round_number, kind, storage.uri(relative), sha256)
