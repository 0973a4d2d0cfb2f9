"""The shell commands that the documentation shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every command that works without a cluster, as words: the lines of all blocks marked `bash` and nothing more."""
    lines = [line for page in PAGES for block in _BLOCK.findall(page.read_text()) for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return sorted({tuple(each): each for each in words if each}.values())


def recipes() -> list[str]:
    """The complete recipes: all blocks marked `yaml` and nothing more."""
    return [
        block
        for page in PAGES
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]


def calm_ray_commands() -> list[list[str]]:
    """The arguments of every `calm-ray` command, whether or not it is called by its path."""
    return [words[1:] for words in commands() if words[0].rsplit("/", 1)[-1] == "calm-ray"]


def reads_a_run(arguments: list[str]) -> bool:
    """Whether a command needs the run of a demo."""
    return any("~/calm_ray/runs/" in word for word in arguments)


def starts_a_run(arguments: list[str]) -> bool:
    return arguments[0] == "align" and "--dry-run" not in arguments
