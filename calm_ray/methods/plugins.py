"""Plug-in methods: `method: package.module:NAME` with `plugins: [package]` in the recipe."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from calm_ray.core.sections import unknown_name
from calm_ray.methods import METHODS
from calm_ray.methods.base import Method


def load_method(name: str, plugins: Sequence[str]) -> Method[Any]:
    """Returns one of `METHODS`, or imports `package.module:NAME`, which runs the package's code.

    Raises ValueError, starting with the key, if the name is unknown, the package is not in `plugins`, the import fails,
    or the object is not a `Method`.
    """
    if name in METHODS:
        return METHODS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"method: {unknown_name(name, list(METHODS))}; a plug-in is named package.module:NAME")
    package = module.partition(".")[0]
    if package not in plugins:
        raise ValueError(
            f"method: {name} would run code of the package {package}; allow it with plugins: [{package}] in the "
            f"recipe, or with --plugins {package} when opening a run"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ValueError(f"method: {name} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, Method):
        raise ValueError(f"method: {name} is not a calm_ray.methods.base.Method (it is {type(found).__name__})")
    return found


def package_fingerprint(package: str) -> dict[str, str | None]:
    """The version of an installed package (None if unknown) and the hash of its Python files. Does not import it.

    Raises ValueError if the package is not found.
    """
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.has_location:
        raise ValueError(f"plugins: package {package} not found; install it or set PYTHONPATH")
    found = Path(spec.origin)
    folder = found.parent
    files = sorted(folder.rglob("*.py")) if found.name == "__init__.py" else [found]
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    names = packages_distributions().get(package)
    return {"version": version(names[0]) if names else None, "sha256": digest.hexdigest()}
