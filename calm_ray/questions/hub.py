"""Data sets of the Hugging Face hub, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from calm_ray.core.errors import InputError
from calm_ray.core.safety import redact

HUB = "hub:"
"""What a part of a hub data set starts with: `hub:owner/name:config:split`."""

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # ../name would be a folder of this machine


def hub_names(part: str) -> tuple[str, str | None, str | None]:
    """Data set, configuration and split of `hub:owner/name[:config[:split]]`. Raises InputError."""
    names: Sequence[str | None] = [name or None for name in part.removeprefix(HUB).split(":")]
    if len(names) > 3 or not names[0] or not _NAME.fullmatch(names[0]):
        raise InputError(f"{part}: a data set of the hub is named hub:owner/name, :config and :split may follow")
    return names[0], *(*names[1:], None, None)[:2]  # type: ignore[return-value]


def hub_rows(part: str) -> Iterator[Any]:
    """The rows of a split, as they come. Raises InputError where the hub does not give them."""
    name, config, split = hub_names(part)
    try:
        from datasets import IterableDatasetDict, load_dataset

        data = load_dataset(name, config, split=split, streaming=True)
        if isinstance(data, IterableDatasetDict):
            if len(data) > 1:
                raise InputError(f"{part}: has the splits {', '.join(data)}; name one: hub:owner/name:config:split")
            (data,) = data.values()
        yield from data
    except InputError:
        raise
    except Exception as error:  # The hub's client raises the errors of several libraries; all mean: not to be had.
        raise InputError(f"{part}: not to be had from the hub: {type(error).__name__}: {redact(str(error))}") from None
