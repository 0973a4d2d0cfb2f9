"""Completions that a user points at: JSON of the CALM repository, a stage of a run, or Parquet; all become chunks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calm_ray.core.errors import BadRow, InputError
from calm_ray.core.languages import LANGUAGES, language_code
from calm_ray.core.rows import Question, rows_of
from calm_ray.methods.calm.recorded import ASKED, COMPLETIONS, RecordedChunks, asked_of
from calm_ray.prompts.questions import LETTERS
from calm_ray.questions.parallel import Index, Problem, Seen, refusal
from calm_ray.questions.reader import OnBadRow, check_characters, question_of, take_in
from calm_ray.questions.records import Record, read_records
from calm_ray.questions.sources import Part, matching, open_source
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage, storage_named

QUESTIONS_PER_CHUNK = 2_000
UNCOMPRESSED = "none"
"""For chunks that are read once and deleted."""
_CHUNK_FILE = re.compile(r"\d+-\w+\.parquet")


@dataclass(frozen=True)
class Imported:
    chunks: RecordedChunks
    left_out: list[Problem] = field(default_factory=list)
    """Rows that could not be used."""
    repaired: Counter[str] = field(default_factory=Counter)
    """How often rows were repaired, or kept in spite of something, and why."""


def open_completions(
    sources: Sequence[str], folder: Stage, *, questions: str | None, on_bad_row: OnBadRow, own_codes: bool
) -> Imported:
    """The completions at `sources`; `folder` takes chunks that must be written first.

    A source is a file, folder or pattern of the CALM repository's JSON; a stage `rounds/R/sample` of a run; or Parquet
    with the columns of `COMPLETIONS`, whose questions are read from `questions`. `own_codes` keeps the languages' names
    as the files have them (`cn`). Raises InputError where nothing of the kind is there.
    """
    if len(sources) == 1 and questions is None and (chunks := _of_run(sources[0])) is not None:
        return Imported(chunks)
    files = {source: [Path(name) for name in matching(source) if name.endswith(".parquet")] for source in sources}
    if not any(files.values()):
        if questions is not None:
            raise InputError("--questions: JSON of the CALM repository holds its questions itself; leave it out")
        imported = _import_json(sources, folder, on_bad_row, own_codes)
    elif other := [source for source, found in files.items() if not found]:
        raise InputError(f"{other[0]}: holds no Parquet, as the other completions do; name files of one kind")
    else:
        every = [file for found in files.values() for file in found]
        imported = _import_parquet(every, folder, questions, on_bad_row, own_codes)
    if not imported.chunks.chunks:
        raise InputError(f"{sources[0]}: holds no completions")
    return imported


def _of_run(source: str) -> RecordedChunks | None:
    """The completions of a run's stage as they lie there; None where the source is none."""
    storage = storage_named(source)
    run, in_run, _ = storage.root.rpartition("/rounds/")
    asked, sample = Stage(Storage(run).under("questions/align")) if in_run else None, Stage(storage)
    if asked is None or not asked.chunks() or not any(_CHUNK_FILE.fullmatch(name) for name in storage.files()):
        return None
    if not sample.is_finished:
        raise InputError(f"{source}: is not sampled to its end; the command that began the run goes on with it")
    chunks: dict[str, list[str]] = {}
    for chunk in sorted(asked.chunks()):
        languages = dict.fromkeys(row["language"] for row in rows_of(asked.read_chunk(chunk, ["language"])))
        chunks[chunk] = [f"{chunk}-{language}" for language in languages]
    return RecordedChunks(asked, sample, chunks)


def _import_json(sources: Sequence[str], folder: Stage, on_bad_row: OnBadRow, own_codes: bool) -> Imported:
    """Every file holds one language, a list of records with `input`, `output` and `pred`; all are parallel by index."""
    parts = [part for source in sources for part in open_source(source, format="calm")]
    files: dict[str | None, Part] = {}
    for part in parts:
        first = files.setdefault(part.language, part)
        if first is not part:
            raise InputError(
                f"{part.name} and {first.name} are both {part.language}: there must be one file for each language; "
                "name those of one model, by a pattern such as 'x_csqa_*_train_sampled.json'"
            )
    codes = {part.name: own_code(part) if own_codes else str(part.language) for part in parts}
    asked, completions = (Stage(folder.storage.under(name)) for name in ("asked", "completions"))
    imported = Imported(RecordedChunks(asked, completions, {}))
    questions = _parallel_questions(parts, codes, imported)
    while rows := list(islice(questions, QUESTIONS_PER_CHUNK)):
        name = f"{len(imported.chunks.chunks):05d}"
        asked_rows = [row for of_question, _ in rows for row in of_question]
        # Language by language, so that those of a language stand together.
        samples = sorted((row for _, of_question in rows for row in of_question), key=lambda row: row["language"])
        asked.write(name, pa.Table.from_pylist(asked_rows, ASKED), UNCOMPRESSED)
        completions.write(name, pa.Table.from_pylist(samples, COMPLETIONS), UNCOMPRESSED)
        imported.chunks.chunks[name] = [name]
    if imported.left_out and (on_bad_row == "refuse" or not imported.chunks.chunks):
        raise refusal(imported.left_out, len(imported.left_out))
    return imported


def own_code(part: Part) -> str:
    """The language of a file as its name writes it: `cn` of `x_csqa_cn_train_sampled.json`."""
    path = Path(part.name)
    words = [word for name in (path.parent.name, path.stem) for word in re.findall(r"[a-z]+", name.lower())]
    return next((word for word in reversed(words) if language_code(word) == part.language), str(part.language))


_Rows = list[dict[str, Any]]


def _parallel_questions(
    parts: Sequence[Part], codes: dict[str, str], imported: Imported
) -> Iterator[tuple[_Rows, _Rows]]:
    """Question by question its rows of `ASKED` and `COMPLETIONS`; what cannot be used is noted in `imported`."""
    for number, records in enumerate(zip_longest(*(read_records(part.name) for part in parts))):
        index, asked, completions = Index(), list[dict[str, Any]](), list[dict[str, Any]]()
        bad: list[Problem] = []
        for part, record in zip(parts, records, strict=True):
            if record is None:
                row = next(other.row for other in records if other is not None)
                bad.append(Problem(part.name, row, "is not there, but other languages have it"))
                continue
            notes: list[str] = []
            try:
                question, texts = _asked_and_written(part, record, number, notes)
            except BadRow as error:
                bad.append(Problem(part.name, record.row, str(error)))
                continue
            imported.repaired.update(notes)
            key = {"question_id": question["question_id"], "language": codes[part.name]}
            asked.append({**question, **key, "prompt": record.value["input"]})
            completions += [{**key, "sample": sample, "text": text} for sample, text in enumerate(texts)]
            seen = Seen(part.name, record.row, len(question["choices"]), question["gold"])
            index.add(question["question_id"], key["language"], seen)
        bad += [flaw.problem for flaw in index.conflicts()]
        imported.left_out.extend(bad)
        if not bad:
            yield asked, completions


def _asked_and_written(part: Part, record: Record, number: int, notes: list[str]) -> tuple[Question, list[str]]:
    question = question_of(part, record, number, notes)
    written = record.value.get("pred")
    written = [written] if isinstance(written, str) else written
    if not isinstance(written, list) or not all(isinstance(text, str | None) for text in written) or not written:
        raise BadRow("field 'pred' must be a list of completions")
    texts = [text or "" for text in written]
    check_characters([record.value["input"], *texts])
    return question, texts


def _import_parquet(
    files: Sequence[Path], folder: Stage, questions: str | None, on_bad_row: OnBadRow, own_codes: bool
) -> Imported:
    """Completions in any order."""
    tables = {file: _read(file) for file in files}
    names = _names_of_languages(tables)
    stages = [Stage(folder.storage.under(name)) for name in ("asked", "completions")]
    imported = Imported(RecordedChunks(stages[0], stages[1], {}))
    asked: pa.Table | None = None
    if questions is not None:
        intake = take_in(questions, list(names), on_bad_row=on_bad_row)
        asked = asked_of(intake.questions)
        imported.left_out.extend(intake.left_out)
        imported.repaired.update(intake.repaired)
        tables = {file: _of_known_questions(data, asked, file, imported) for file, data in tables.items()}
    if imported.left_out and on_bad_row == "refuse":
        raise refusal(imported.left_out, len(imported.left_out))
    completions = pa.concat_tables(tables.values())
    _refuse_doubles(completions, files)
    if asked is None:
        asked = _unknown_questions(completions)
    if own_codes:
        asked, completions = (_renamed(data, names) for data in (asked, completions))
    ids = pc.unique(completions["question_id"])
    parts = zip(_in_chunks(asked, ids, []), _in_chunks(completions, ids, ["language", "sample"]), strict=True)
    for number, both in enumerate(parts):
        name = f"{number:05d}"
        for stage, data in zip(stages, both, strict=True):
            stage.write(name, data, UNCOMPRESSED)
        imported.chunks.chunks[name] = [name]
    return imported


def _in_chunks(data: pa.Table, ids: pa.Array, order: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of `QUESTIONS_PER_CHUNK` questions after the other, in the order of `ids`; each chunk sorted."""
    chunk = pc.divide(pc.index_in(data["question_id"], ids), QUESTIONS_PER_CHUNK)
    data = data.append_column("chunk", chunk).filter(chunk.is_valid())
    data = data.sort_by([(name, "ascending") for name in ("chunk", *order)]).combine_chunks()
    count = -(-len(ids) // QUESTIONS_PER_CHUNK)
    ends = np.searchsorted(data["chunk"].to_numpy(), np.arange(count + 1))
    for first, end in pairwise(ends.tolist()):
        yield data.slice(first, end - first).drop_columns("chunk")


def _read(file: Path) -> pa.Table:
    """A file of completions, checked."""
    try:
        data = pq.ParquetFile(file)
        if lacking := [name for name in COMPLETIONS.names if name not in data.schema_arrow.names]:
            raise InputError(
                f"{file}: field {lacking[0]!r} is missing; completions have {', '.join(COMPLETIONS.names)}"
            )
        rows = data.read(columns=COMPLETIONS.names).cast(COMPLETIONS)
        rows.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not readable as a Parquet file of completions: {error}") from None
    for name in ("question_id", "language", "sample"):
        if empty := pc.indices_nonzero(rows[name].is_null()).to_pylist():
            raise InputError(f"{file}, row {empty[0] + 1}: field {name!r} is missing or empty")
    for name in pc.unique(rows["language"]).to_pylist():
        if language_code(name) is None:
            row = pc.index(rows["language"], name).as_py() + 1
            raise InputError(f"{file}, row {row}: {name!r} is no known language; known are {', '.join(LANGUAGES)}")
    return rows


def _names_of_languages(tables: dict[Path, pa.Table]) -> dict[str, str]:
    """The table's code of each language -> what the files call it; renames the tables' languages to their codes."""
    names: dict[str, str] = {}
    for file, data in tables.items():
        codes = {name: str(language_code(name)) for name in pc.unique(data["language"]).to_pylist()}
        for name, code in codes.items():
            if names.setdefault(code, name) != name:
                raise InputError(f"{file}: calls one language {name!r} and {names[code]!r}; call it by one name")
        tables[file] = _renamed(data, codes)
    return names


def _renamed(data: pa.Table, names: dict[str, str]) -> pa.Table:
    """The same rows with other names of languages."""
    column = pa.array([names[name] for name in data["language"].to_pylist()], pa.string())
    return data.set_column(data.column_names.index("language"), "language", column)


def _refuse_doubles(completions: pa.Table, files: Sequence[Path]) -> None:
    """Raises InputError where a sample is there twice, as when two models lie in one folder: it would vote twice."""
    keys = ["question_id", "language", "sample"]
    counts = completions.group_by(keys).aggregate([("text", "count")])
    doubles = counts.filter(pc.greater(counts["text_count"], 1))
    if len(doubles):
        one = ", ".join(f"{name} {doubles[name][0].as_py()}" for name in keys)
        raise InputError(f"{', '.join(map(str, files[:2]))}: hold {one} twice; name the completions of one model")


def _unknown_questions(completions: pa.Table) -> pa.Table:
    """`ASKED` for questions of which only the id is known: no prompt, no gold, and letters without their options."""
    keys = completions.group_by(["question_id", "language"], use_threads=False).aggregate([])
    count = len(keys)
    return pa.table(
        {
            "question_id": keys["question_id"],
            "language": keys["language"],
            "prompt": pa.nulls(count, pa.string()),
            "choices": pa.array([[""] * len(LETTERS)] * count, pa.list_(pa.string())),
            "gold": pa.nulls(count, pa.string()),
        },
        schema=ASKED,
    )


def _of_known_questions(completions: pa.Table, asked: pa.Table, file: Path, imported: Imported) -> pa.Table:
    """The completions whose question is known in their language; the others are noted as left out."""
    known, given = (
        pc.binary_join_element_wise(data["question_id"], data["language"], "\x1f") for data in (asked, completions)
    )
    is_known = pc.is_in(given, value_set=pc.unique(known))
    for row in pc.indices_nonzero(pc.invert(is_known)).to_pylist():
        question, language = (completions[name][row].as_py() for name in ("question_id", "language"))
        reason = f"question {question} in {language} is not among --questions"
        imported.left_out.append(Problem(str(file), row + 1, reason))
    return completions.filter(is_known)
