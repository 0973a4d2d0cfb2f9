"""Import layers, the pure core, and how rarely code outside `methods` distinguishes methods."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from calm_ray.methods import METHODS
from calm_ray.recipes.load import load_config

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "calm_ray"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
"""Every module of the package by name."""
HEAVY = {"ray", "vllm"}


def block(kind: str) -> list[str]:
    """Lines of a fenced block in docs/architecture.md."""
    found = re.search(rf"^```{kind}\n(.*?)^```$", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].strip().splitlines()


LAYERS = [line.split(", ") for line in block("layers")]
"""From top to bottom."""


def component_of(module: str) -> str:
    """The top-level folder or file of calm_ray that contains a module."""
    return module.removeprefix("calm_ray").lstrip(".").partition(".")[0].removesuffix(".__init__")


def imports_of(module: str) -> Iterator[tuple[str, int]]:
    """Yields everything a module imports, in functions and for type hints too, with line numbers."""
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "calm_ray"
            yield from ((f"calm_ray.{alias.name}" if whole else node.module, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)


def test_every_module_is_in_a_layer() -> None:
    components = {component_of(module) for module in FILES} - {"__init__"}
    assert sorted(components) == sorted(component for layer in LAYERS for component in layer)
    assert len(components) <= 24
    assert len([component for component in components if (PACKAGE / f"{component}.py").exists()]) <= 8


def test_every_import_points_down() -> None:
    height = {component: -number for number, layer in enumerate(LAYERS) for component in layer}
    upward = [
        f"{module}, line {line}: imports {name}"
        for module in FILES
        if component_of(module) != "__init__"
        for name, line in imports_of(module)
        if name.startswith("calm_ray.")
        and component_of(name) != component_of(module)
        and height[component_of(name)] >= height[component_of(module)]
    ]
    assert upward == []


def pure_modules() -> list[str]:
    found = []
    for line in block("pure"):
        component, _, rest = line.partition(", but for ")
        exceptions = {f"calm_ray.{name}" for name in rest.split(", ") if name}
        found += [module for module in FILES if component_of(module) == component and module not in exceptions]
    return found


def test_pure_core_does_not_import_ray_or_vllm() -> None:
    heavy = [
        f"{module}, line {line}: imports {name}"
        for module in pure_modules()
        for name, line in imports_of(module)
        if name.partition(".")[0] in HEAVY
    ]
    assert heavy == []


def loaded_modules(code: str) -> set[str]:
    """Top-level modules loaded after running the code in a new process."""
    script = f"{code}\nimport sys\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_pure_core_does_not_load_ray_or_vllm() -> None:
    names = [name.removesuffix(".__init__") for name in pure_modules()]
    assert not loaded_modules("\n".join(f"import {name}" for name in names)) & HEAVY


@pytest.mark.parametrize("arguments", [["align", "--help"], ["align", "--dry-run"], ["--help"]])
def test_parsing_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"from calm_ray.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass"
    assert not loaded_modules(code) & {"torch", "ray", "vllm", "transformers", "numpy", "pyarrow"}


def outside_methods() -> Iterator[tuple[str, ast.AST]]:
    """Syntax nodes of every module outside `methods`, except docstrings."""
    for module, file in FILES.items():
        if component_of(module) == "methods":
            continue
        tree = ast.parse(file.read_text("utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        yield from ((module, node) for node in ast.walk(tree) if id(node) not in docs)


def literals(names: set[str]) -> set[str]:
    """Where a string literal is one of these names: in a comparison, a `match`, a dictionary, a list."""
    return {
        f"{module}:{node.lineno} {node.value}"
        for module, node in outside_methods()
        if isinstance(node, ast.Constant) and node.value in names
    }


def constants(names: set[str]) -> set[str]:
    """Where a constant, or the `name` of a step class, stands for one of these names."""
    trees = [ast.parse(file.read_text("utf-8")) for file in FILES.values()]
    assigned = [node for tree in trees for node in tree.body if isinstance(node, ast.Assign)]
    aliases = {
        ast.unparse(target)
        for node in assigned
        if isinstance(node.value, ast.Constant) and node.value.value in names
        for target in node.targets
    }
    aliases |= {f"{kind}.name" for kind in method_classes()}
    return {
        f"{module}:{node.lineno} {ast.unparse(node)}"
        for module, node in outside_methods()
        if isinstance(node, ast.Name | ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and ast.unparse(node) in aliases
    }


def step_names() -> set[str]:
    recipes = [
        [f"method={method}", "train.sft_weight=0", f"candidates={form}"]
        for method in METHODS
        for form in ("null", "{form: world}", "{form: samples}")
        if form != "{form: samples}" or method == "dco"
    ]
    configs = [load_config("demo", overrides) for overrides in recipes]
    return {name for config in configs for name in config.graph.owners}


def test_steps_are_rarely_named_outside_methods() -> None:
    """This also counts words that do not mean steps: the command `evaluate`, the section `train` of a recipe."""
    names = step_names()
    assert {"sample", "votes", "pairs", "train", "evaluate", "score", "optimal", "candidates"} <= names
    found = literals(names) | constants(names)
    assert len(found) <= 20, sorted(found)


def boolean_flags() -> set[str]:
    """Boolean attributes and methods of methods, steps, objectives and configurations."""
    found = set()
    for module, file in FILES.items():
        if component_of(module) not in ("methods", "config") and module not in (
            "calm_ray.core.settings", "calm_ray.training.objectives",
        ):  # fmt: skip
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) == "bool":
                found.add(node.name)
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) in ("bool", "ClassVar[bool]"):
                found.add(ast.unparse(node.target))
    return {name for name in found if not name.startswith("_")}


def method_classes() -> set[str]:
    """Classes of methods, steps and objectives."""
    return {
        node.name
        for module, file in FILES.items()
        if component_of(module) == "methods" or module == "calm_ray.training.objectives"
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    }


def method_checks() -> set[str]:
    """Where code reads a flag of a method, step or objective, in a condition or not, or checks its class."""
    names, classes, found = boolean_flags(), method_classes(), set()
    for module, node in outside_methods():
        if module == "calm_ray.training.objectives":
            continue  # defines the objectives
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in names:
            found.add(f"{module}:{node.lineno}")
        compared = None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass", "type"):
            compared = node.args[-1]
        elif isinstance(node, ast.MatchClass):
            compared = node.cls
        if compared is not None and classes & set(re.findall(r"\w+", ast.unparse(compared))):
            found.add(f"{module}:{compared.lineno}")
    return found


def test_methods_are_rarely_distinguished_outside_methods() -> None:
    """By the name of a method or objective, by class, or by flag."""
    places = {place.rpartition(" ")[0] for place in literals({*METHODS, "dpo"})} | method_checks()
    assert len(places) <= 10, sorted(places)


def test_main_loop_fits_on_one_screen() -> None:
    assert len((PACKAGE / "rounds.py").read_text("utf-8").splitlines()) < 60
