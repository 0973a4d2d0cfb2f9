"""YAML as plain data: texts as keys, and texts, finite numbers, true, false, null, lists and mappings as values.

Aliases are refused (nine lines of them hold a billion values), and so are tags, keys that stand twice, and whatever no
file of ours could hold. A recipe that is shared needs none of it: it extends another one.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

LARGEST = 1_000_000
"""Characters."""
DEEPEST = 20
"""Lists and mappings in one another."""
_WIDEST = 2**63
_PREFIX = "tag:yaml.org,2002:"
_PLAIN = [_PREFIX + name for name in ("null", "bool", "int", "float", "str", "seq", "map")]


def load(text: str) -> Any:
    """The value of a YAML document. Raises yaml.YAMLError, which names the line."""
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"is longer than {LARGEST:,} characters")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _PLAIN}  # noqa: RUF012
    # Dates stay texts.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if tag in _PLAIN]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(event, f"*{event.anchor}: aliases are not allowed; write the value out, or extend a recipe")
        if self._depth == DEEPEST:
            raise _refusal(event, f"more than {DEEPEST} lists and mappings in one another")
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
                raise _refusal(key, f"a key must be a text, and {hint} not; put it into quotes")
            if key.value in keys:
                raise _refusal(key, f"{key.value[:80]} is there twice")
            keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _PLAIN:
            raise _refusal(node, f"tags such as {node.tag.replace(_PREFIX, '!!')[:80]} are not allowed")
        try:
            value = super().construct_object(node, deep)
        except (KeyError, OverflowError, ValueError):  # `!!bool x`, an integer of thousands of digits
            raise _refusal(node, f"{str(node.value)[:80]} is no {node.tag.removeprefix(_PREFIX)}") from None
        if isinstance(value, int) and abs(value) >= _WIDEST:
            raise _refusal(node, "the number does not fit into 64 bits")
        if isinstance(value, float) and not math.isfinite(value):
            raise _refusal(node, f"{node.value[:80]} is not a finite number")
        if isinstance(value, str) and not is_plain_text(value):
            raise _refusal(node, f"{value[:80]!r} holds characters that no file of ours can")
        return value


def is_plain_text(text: str) -> bool:
    """Whether a text is without control characters (tabs and line ends aside) and half characters."""
    return not any((char < " " and char not in "\t\n\r") or "\ud800" <= char <= "\udfff" for char in text)


def _refusal(at: yaml.Node | yaml.Event, message: str) -> yaml.YAMLError:
    where = f"line {at.start_mark.line + 1}: " if at.start_mark is not None else ""
    return yaml.YAMLError(where + message)
