"""`calm-ray keys`: every key of a recipe as Markdown, from the docstrings of the sections.

docs/configuration.md is its output.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from calm_ray.config import DEFAULT_METHOD, config_class
from calm_ray.methods import METHODS

INTRODUCTION = """\
# Configuration

Every key of a recipe, as printed by `calm-ray keys`. On the command line, a key of a section is written with a dot:
`train.learning_rate=5e-6`. Unknown keys and wrong types are refused before anything starts.
"""


def keys_as_markdown() -> str:
    """The reference of all keys: first those at the top of a recipe, then one heading per section."""
    config = config_class({"method": DEFAULT_METHOD})
    return "\n".join([INTRODUCTION, *_section("Top level", "", config)])


def _section(title: str, prefix: str, section: type[BaseModel]) -> Iterator[str]:
    yield f"## {title}\n"
    if prefix:
        yield f"{inspect.cleandoc(section.__doc__ or '')}\n"
    schemas = section.model_json_schema()["properties"]
    below = {name: kind for name, field in section.model_fields.items() if (kind := _section_in(field.annotation))}
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        is_whole_section = name in below and field.default is not None and not _may_be_null(schemas[name])
        if not (is_whole_section or (name in below and field.is_required())):
            cells = (f"`{name}`", _values(schemas[name], f"{prefix}{name}" if name in below else ""),
                     _default(f"{prefix}{name}", field), field.description or "")  # fmt: skip
            yield "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for name, kind in below.items():
        yield from _section(f"{prefix}{name}", f"{prefix}{name}.", kind)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _may_be_null(schema: Mapping[str, Any]) -> bool:
    return {"type": "null"} in schema.get("anyOf", [])


def _values(schema: Mapping[str, Any], section: str) -> str:
    """What a key may be, from its JSON schema."""
    if section:
        return "section" + (" or null" if _may_be_null(schema) else "")
    if "anyOf" in schema:
        return " or ".join(_values(each, "") for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}.get(
        schema.get("type", ""), "mapping"
    )
    if schema.get("type") == "array":
        items = schema.get("items") or schema.get("prefixItems", [{}])[0]
        return f"list of {_values(items, '')}s" if "prefixItems" not in schema else "[min, max]"
    bounds = [f"{word} {schema[key]:g}" for key, word in _BOUNDS.items() if key in schema and abs(schema[key]) < 1e5]
    return " ".join([kind, *bounds])


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _default(key: str, field: Any) -> str:
    """A default as a recipe would write it; for keys of `train` that methods set, one for each method."""
    by_method = {
        name: method.train_defaults[key.removeprefix("train.")]
        for name, method in METHODS.items()
        if key.startswith("train.") and key.removeprefix("train.") in method.train_defaults
    }
    if field.is_required() and not by_method:
        return "required"
    if field.default_factory is not None:
        return "`~/calm_ray/runs`, or `$CALM_RAY_STORAGE`"
    methods = ", ".join(f"`{name}`: {_yaml(value)}" for name, value in by_method.items())
    if field.default is PydanticUndefined:
        return methods
    return _yaml(field.default) + (f" ({methods})" if methods else "")


def _yaml(value: Any) -> str:
    plain = value.model_dump() if isinstance(value, BaseModel) else value
    return f"`{yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix('...' + chr(10)).strip()}`"
