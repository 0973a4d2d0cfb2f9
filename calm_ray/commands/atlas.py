"""`calm-ray atlas`: the atlas's questions as files, for other models and other tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from calm_ray.core.console import say
from calm_ray.core.rows import Question
from calm_ray.core.safety import new_folder
from calm_ray.demo.atlas.questions import atlas_languages, build_atlas

LICENSE = """\
Names of territories, currencies, languages and cities: Unicode CLDR, (c) Unicode, Inc., Unicode License v3
(https://www.unicode.org/license.txt), as packaged by Babel.
Which territories have over a million people, and their capitals: GeoNames (https://www.geonames.org), CC BY 4.0.
"""


def write_atlas(out: str, seed: int, languages: Sequence[str] | None) -> None:
    """Writes align.jsonl, held_out.jsonl and LICENSE.txt into a new folder. Raises InputError."""
    folder = new_folder(out, "--out")
    chosen = list(languages or atlas_languages())
    atlas = build_atlas(seed, chosen)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("align", atlas.align), ("held_out", atlas.held_out)):
        _write(folder / f"{name}.jsonl", rows)
        say(f"{folder / name}.jsonl: {len(rows) // len(chosen)} questions in {len(chosen)} languages")
    (folder / "LICENSE.txt").write_text(LICENSE)
    for reason, count in atlas.dropped.items():
        say(f"  dropped {count}: {reason}")


def _write(file: Path, rows: Sequence[Question]) -> None:
    with open(file, "w", encoding="utf-8") as output:
        output.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
