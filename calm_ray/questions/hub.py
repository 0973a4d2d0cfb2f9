"""Datasets on the Hugging Face Hub, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from calm_ray.core.errors import InputError
from calm_ray.core.safety import redact

HUB = "hub:"
"""Prefix of a Hub dataset: `hub:owner/name:config:split`."""

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # rejects ../name, a local folder


def hub_names(part: str) -> tuple[str, str | None, str | None]:
    """The dataset, configuration and split of `hub:owner/name[:config[:split]]`. Raises InputError."""
    names: Sequence[str | None] = [name or None for name in part.removeprefix(HUB).split(":")]
    if len(names) > 3 or not names[0] or not _NAME.fullmatch(names[0]):
        raise InputError(f"{part}: is not a Hub dataset; write hub:owner/name[:config[:split]]")
    return names[0], *(*names[1:], None, None)[:2]  # type: ignore[return-value]


def hub_rows(part: str) -> Iterator[Any]:
    """Streams the rows of a split. Raises InputError if the Hub does not provide them."""
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
    except Exception as error:  # the Hub client raises errors of several libraries
        raise InputError(
            f"{part}: cannot be loaded from the Hub: {type(error).__name__}: {redact(str(error))}"
        ) from None
