"""Fuzzes recipes and overrides: each is valid or rejected with a message."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import table_rows
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from calm_ray.cli import main
from calm_ray.config import Config
from calm_ray.core.errors import InputError, ResourceError
from calm_ray.core.sections import Section
from calm_ray.planning.hardware import identical_nodes
from calm_ray.planning.model_shape import shape_of
from calm_ray.planning.plan import make_plan
from calm_ray.recipes.load import load_config, read_recipes

SHIPPED = ["demo", "llama3_8b", "dco/demo", "dco/compare_demo", *table_rows("calm"), *table_rows("dco")]
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def keys_of(section: type[Section]) -> Iterator[str]:
    """Dotted keys of a section and its subsections."""
    for name, field in section.model_fields.items():
        yield name
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from (f"{name}.{below}" for below in keys_of(kind))


KEYS = [*keys_of(Config), *(f"{section}.{name}" for section in ("engines.args", "train.trl") for name in "abcd")]
KEYS += [f"engines.args.{name}" for name in ("max_model_len", "max_num_seqs", "gpu_memory_utilization")]
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        None, True, False, 0, -1, 1, 2**63, -(2**63), 10**400, 0.5, float("nan"), float("inf"), 1e308, "", " ", "\0",
        "a\nb", "..", "../x", "~nobody-at-all/x", "x" * 5_000, "en", "fr", "world", "s3://a:b@c/d", "hub:../x",
        "hf_" + "a" * 34, [], [[]], ["en", "en"], {}, {"a": {}}, b"\xff", "9" * 5_000, "1e999", "nan", "日本", "\ud800",
    ]
)  # fmt: skip
LEAVES = ODD | st.integers() | st.floats() | st.text(max_size=8)
NESTED = st.recursive(
    LEAVES,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), below),
    max_leaves=12,
)
PATHS = st.sampled_from(KEYS) | st.lists(st.sampled_from([*"ab", "", "train", "0", "é"]), max_size=25).map(".".join)
SNIPPETS = [
    "[[[[",
    "[" * 2_000,
    "*a",
    "&a [*a]",
    "{a: 1, a: 2}",
    "!!x",
    "!!bool x",
    "!!binary gA==",
    "9" * 5_000,
    "'",
    "\0",
]
OVERRIDES = st.lists(
    st.tuples(PATHS, (ODD | NESTED).map(lambda value: dump(value).strip()) | st.sampled_from(SNIPPETS))
    .map("=".join)
    .filter(lambda word: not word.startswith("-")),
    max_size=2,
)


def dump(value: Any) -> str:
    return yaml.dump(value, allow_unicode=True, default_flow_style=True, width=10**9)


@cache
def shipped(recipe: str) -> dict[str, Any]:
    return read_recipes(recipe)


def section_of(raw: dict[str, Any], key: str) -> tuple[dict[Any, Any], str]:
    """The section that holds a key, created if missing, and the last part of the key."""
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(raw.get(section), dict):
            raw[section] = {}
        raw = raw[section]
    return raw, last


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A shipped recipe with some values replaced by another recipe's or by odd ones."""
    raw, other = (copy.deepcopy(shipped(draw(st.sampled_from(SHIPPED)))) for _ in range(2))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        own, last = section_of(raw, key)
        theirs, _ = section_of(other, key)
        mutation = draw(st.sampled_from("aaaabcd"))
        if mutation == "a" and last in theirs:
            own[last] = theirs[last]
        elif mutation == "b":
            own.pop(last, None)
        elif mutation == "c":
            own[draw(st.sampled_from(["extends", 1, None]))] = draw(ODD)
        else:
            own[last] = draw(ODD | NESTED)
    return raw


def is_valid(path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether the command accepts a recipe. Fails unless a rejection has exit code 2 and a message."""
    code = main(["align", "--dry-run", str(path), *overrides])
    captured = capsys.readouterr()
    assert code in (0, 2)
    assert bool(captured.err) == (code == 2)
    if code == 0:
        again = path.with_name("again.yaml")
        again.write_text(captured.out, encoding="utf-8")
        assert load_config(again) == load_config(path, overrides)
    else:
        assert captured.err.startswith("error: ")
        with pytest.raises(InputError):
            load_config(path, overrides)
    event(f"exit code {code}")
    return code == 0


@FUZZ
@given(raw=mutated(), overrides=st.just([]) | OVERRIDES)
def test_mutated_recipes_are_accepted_or_rejected(
    raw: Any, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mutated.yaml"
    path.write_bytes(dump(raw).encode("utf-8", "surrogatepass"))
    is_valid(path, overrides, capsys)


@FUZZ
@given(raw=mutated())
def test_valid_recipes_can_be_planned_or_do_not_fit(raw: Any, tmp_path: Path) -> None:
    path = tmp_path / "mutated.yaml"
    path.write_bytes(dump(raw).encode("utf-8", "surrogatepass"))
    with suppress(InputError, ResourceError):
        config = load_config(path)
        plan = make_plan(config, shape_of("world"), identical_nodes(2))
        event("planned")
        assert json.dumps(plan.as_json())


@FUZZ
@given(raw=NESTED, overrides=OVERRIDES)
@example(raw={}, overrides=["a.b.c=[[[["])
@example(raw={}, overrides=["=1"])
@example(raw={}, overrides=["..=1"])
@example(raw={}, overrides=["=".join([".".join("a" * 2_000), "1"])])
def test_random_data_is_rejected(
    raw: Any, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "random.yaml"
    path.write_bytes(dump(raw).encode("utf-8", "surrogatepass"))
    assert not is_valid(path, overrides, capsys)


@FUZZ
@given(content=st.binary(max_size=200) | st.text("{}[]&*!|>-:?,#'\"%@` \n\tab1").map(str.encode))
def test_random_bytes_are_rejected(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(content)
    assert not is_valid(path, [], capsys)


@FUZZ
@given(seed=st.integers(0, 2**32), path=st.sampled_from(SHIPPED))
def test_recipes_with_corrupt_bytes_are_accepted_or_rejected(
    seed: int, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, content = random.Random(seed), bytearray(dump(shipped(path)).encode())
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content))
        content[start : start + rng.randint(0, 3)] = rng.choice(
            [b"", b"\0", b"\xff", b"[", b"}", b": ", b"*a", b"\n  "]
        )
    corrupt = tmp_path / "corrupt.yaml"
    corrupt.write_bytes(content)
    is_valid(corrupt, [], capsys)
