"""YAML restricted to plain data: string keys; strings, finite numbers, booleans, null, lists and mappings as values.

Rejects aliases (nine lines of them can expand to a billion values), tags, duplicate keys, and values that Parquet or
JSON cannot store. Recipes do not need aliases to share settings: they can extend each other.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

LARGEST = 1_000_000
"""Maximum length of a document in characters."""
MAX_DEPTH = 20
"""Maximum nesting depth of lists and mappings."""
_INT_LIMIT = 2**63
_PREFIX = "tag:yaml.org,2002:"
_PLAIN = [_PREFIX + name for name in ("null", "bool", "int", "float", "str", "seq", "map")]


def load(text: str) -> Any:
    """Parses a YAML document. Raises yaml.YAMLError, which names the line."""
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"is longer than {LARGEST:,} characters")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _PLAIN}  # noqa: RUF012
    # Dates stay strings.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if tag in _PLAIN]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(event, f"*{event.anchor}: aliases are not allowed; write the value out, or extend a recipe")
        if self._depth == MAX_DEPTH:
            raise _refusal(event, f"lists and mappings are nested more than {MAX_DEPTH} levels deep")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if key.tag != _PREFIX + "str":
                shown = getattr(key, "value", "")
                hint = f"{shown[:80]} is" if isinstance(shown, str) and shown else "it is"
                raise _refusal(key, f"a key must be a string, and {hint} not; put it in quotes")
            if key.value in keys:
                raise _refusal(key, f"duplicate key {key.value[:80]}")
            keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _PLAIN:
            raise _refusal(node, f"tags such as {node.tag.replace(_PREFIX, '!!')[:80]} are not allowed")
        try:
            value = super().construct_object(node, deep)
        except (KeyError, OverflowError, ValueError):  # `!!bool x`, an integer with thousands of digits
            raise _refusal(node, f"{str(node.value)[:80]} is not a valid {node.tag.removeprefix(_PREFIX)}") from None
        if isinstance(value, int) and abs(value) >= _INT_LIMIT:
            raise _refusal(node, "the number does not fit in 64 bits")
        if isinstance(value, float) and not math.isfinite(value):
            raise _refusal(node, f"{node.value[:80]} is not a finite number")
        if isinstance(value, str) and not is_plain_text(value):
            raise _refusal(node, f"{value[:80]!r} contains control characters or lone surrogates")
        return value


def is_plain_text(text: str) -> bool:
    """Whether a text is free of control characters (except tabs and line breaks) and lone surrogates."""
    return not any((char < " " and char not in "\t\n\r") or "\ud800" <= char <= "\udfff" for char in text)


def _refusal(at: yaml.Node | yaml.Event, message: str) -> yaml.YAMLError:
    where = f"line {at.start_mark.line + 1}: " if at.start_mark is not None else ""
    return yaml.YAMLError(where + message)
