"""Methods from outside: `method: package.module:NAME` with `plugins: [package]` in the recipe."""

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


def method_named(name: str, plugins: Sequence[str]) -> Method[Any]:
    """One of `METHODS`, or the object that `package.module:NAME` names, whose code runs then.

    Raises ValueError, beginning with the key, for a name that is not known, a package that the recipe does not allow,
    and code that cannot be used.
    """
    if name in METHODS:
        return METHODS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"method: {unknown_name(name, list(METHODS))}; one of your own is named package.module:NAME")
    package = module.partition(".")[0]
    if package not in plugins:
        raise ValueError(
            f"method: {name} is code of the package {package}, which runs only where that is allowed: by "
            f"plugins: [{package}] in the recipe, or --plugins {package} where a run is opened"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ValueError(f"method: {name} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, Method):
        raise ValueError(f"method: {name} is not a calm_ray.methods.base.Method (it is {type(found).__name__})")
    return found


def identity_of(package: str) -> dict[str, str | None]:
    """The version of a package, where it was installed with one, and the hash of its Python files.

    Raises ValueError where there is no such package. Imports nothing.
    """
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.has_location:
        raise ValueError(f"plugins: there is no package {package} on this machine; install it, or set PYTHONPATH")
    found = Path(spec.origin)
    folder = found.parent
    files = sorted(folder.rglob("*.py")) if found.name == "__init__.py" else [found]
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    names = packages_distributions().get(package)
    return {"version": version(names[0]) if names else None, "sha256": digest.hexdigest()}
