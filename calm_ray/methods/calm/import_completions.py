"""Imports completions as chunks, from JSON of the CALM repository, a stage of a run, or Parquet."""

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
from calm_ray.questions.reader import OnBadRow, check_characters, load_questions, question_of
from calm_ray.questions.records import Record, read_records
from calm_ray.questions.sources import Part, matching, open_source
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage, storage_at

QUESTIONS_PER_CHUNK = 2_000
UNCOMPRESSED = "none"
"""Compression of temporary chunks, which are read once."""
_CHUNK_FILE = re.compile(r"\d+-\w+\.parquet")


@dataclass(frozen=True)
class Imported:
    chunks: RecordedChunks
    skipped: list[Problem] = field(default_factory=list)
    """Skipped rows."""
    repaired: Counter[str] = field(default_factory=Counter)
    """Reason -> number of rows repaired, or kept despite a flaw."""


def open_completions(
    sources: Sequence[str], folder: Stage, *, questions: str | None, on_bad_row: OnBadRow, own_codes: bool
) -> Imported:
    """Opens the completions at `sources`, converting them to chunks in `folder` unless they come from a run.

    A source is a file, folder or glob pattern of the CALM repository's JSON; a stage `rounds/R/sample` of a run; or
    Parquet with the columns of `COMPLETIONS`, whose questions are read from `questions`. `own_codes` keeps the language
    codes of the files (`cn`). Raises InputError if the sources hold no completions or are invalid.
    """
    if len(sources) == 1 and questions is None and (chunks := _from_run(sources[0])) is not None:
        return Imported(chunks)
    files = {source: [Path(name) for name in matching(source) if name.endswith(".parquet")] for source in sources}
    if not any(files.values()):
        if questions is not None:
            raise InputError("--questions: omit it, since JSON of the CALM repository includes the questions")
        imported = _import_json(sources, folder, on_bad_row, own_codes)
    elif other := [source for source, found in files.items() if not found]:
        raise InputError(f"{other[0]}: no Parquet files found, unlike in the other sources; use a single format")
    else:
        parquet = [file for found in files.values() for file in found]
        imported = _import_parquet(parquet, folder, questions, on_bad_row, own_codes)
    if not imported.chunks.chunks:
        raise InputError(f"{sources[0]}: contains no completions")
    return imported


def _from_run(source: str) -> RecordedChunks | None:
    """The completions of a run's stage, read in place; None if the source is not one."""
    storage = storage_at(source)
    run, in_run, _ = storage.root.rpartition("/rounds/")
    asked, sample = Stage(Storage(run).under("questions/align")) if in_run else None, Stage(storage)
    if asked is None or not asked.chunks() or not any(_CHUNK_FILE.fullmatch(name) for name in storage.files()):
        return None
    if not sample.is_finished:
        raise InputError(f"{source}: sampling is not finished; rerun the command that started the run to resume it")
    chunks: dict[str, list[str]] = {}
    for chunk in sorted(asked.chunks()):
        languages = dict.fromkeys(row["language"] for row in rows_of(asked.read_chunk(chunk, ["language"])))
        chunks[chunk] = [f"{chunk}-{language}" for language in languages]
    return RecordedChunks(asked, sample, chunks)


def _import_json(sources: Sequence[str], folder: Stage, on_bad_row: OnBadRow, own_codes: bool) -> Imported:
    """Each file holds one language: a list of records with `input`, `output` and `pred`, aligned by index."""
    parts = [part for source in sources for part in open_source(source, format="calm")]
    files: dict[str | None, Part] = {}
    for part in parts:
        first = files.setdefault(part.language, part)
        if first is not part:
            raise InputError(
                f"{part.name} and {first.name} are both {part.language}; give one file per language, all of one model, "
                "for example with the pattern 'x_csqa_*_train_sampled.json'"
            )
    codes = {part.name: own_code(part) if own_codes else str(part.language) for part in parts}
    asked, completions = (Stage(folder.storage.under(name)) for name in ("asked", "completions"))
    imported = Imported(RecordedChunks(asked, completions, {}))
    questions = _parallel_questions(parts, codes, imported)
    while rows := list(islice(questions, QUESTIONS_PER_CHUNK)):
        name = f"{len(imported.chunks.chunks):05d}"
        asked_rows = [row for asked_of_question, _ in rows for row in asked_of_question]
        # Sorted so that each language is contiguous.
        samples = sorted((row for _, written in rows for row in written), key=lambda row: row["language"])
        asked.write(name, pa.Table.from_pylist(asked_rows, ASKED), UNCOMPRESSED)
        completions.write(name, pa.Table.from_pylist(samples, COMPLETIONS), UNCOMPRESSED)
        imported.chunks.chunks[name] = [name]
    if imported.skipped and (on_bad_row == "refuse" or not imported.chunks.chunks):
        raise refusal(imported.skipped, len(imported.skipped))
    return imported


def own_code(part: Part) -> str:
    """The language code used in the file's name: `cn` for `x_csqa_cn_train_sampled.json`."""
    path = Path(part.name)
    words = [word for name in (path.parent.name, path.stem) for word in re.findall(r"[a-z]+", name.lower())]
    return next((word for word in reversed(words) if language_code(word) == part.language), str(part.language))


_Rows = list[dict[str, Any]]


def _parallel_questions(
    parts: Sequence[Part], codes: dict[str, str], imported: Imported
) -> Iterator[tuple[_Rows, _Rows]]:
    """Yields each question's rows of `ASKED` and `COMPLETIONS`; records problems and repairs in `imported`."""
    for number, records in enumerate(zip_longest(*(read_records(part.name) for part in parts))):
        index, asked, completions = Index(), list[dict[str, Any]](), list[dict[str, Any]]()
        bad: list[Problem] = []
        for part, record in zip(parts, records, strict=True):
            if record is None:
                row = next(other.row for other in records if other is not None)
                bad.append(Problem(part.name, row, "is missing, but other languages have it"))
                continue
            notes: list[str] = []
            try:
                question, texts = _question_and_texts(part, record, number, notes)
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
        imported.skipped.extend(bad)
        if not bad:
            yield asked, completions


def _question_and_texts(part: Part, record: Record, number: int, notes: list[str]) -> tuple[Question, list[str]]:
    question = question_of(part, record, number, notes)
    pred = record.value.get("pred")
    pred = [pred] if isinstance(pred, str) else pred
    if not isinstance(pred, list) or not all(isinstance(text, str | None) for text in pred) or not pred:
        raise BadRow("field 'pred' must be a non-empty list of completions")
    texts = [text or "" for text in pred]
    check_characters([record.value["input"], *texts])
    return question, texts


def _import_parquet(
    files: Sequence[Path], folder: Stage, questions: str | None, on_bad_row: OnBadRow, own_codes: bool
) -> Imported:
    """Completions may come in any order."""
    tables = {file: _read(file) for file in files}
    names = _unify_languages(tables)
    stages = [Stage(folder.storage.under(name)) for name in ("asked", "completions")]
    imported = Imported(RecordedChunks(stages[0], stages[1], {}))
    asked: pa.Table | None = None
    if questions is not None:
        intake = load_questions(questions, list(names), on_bad_row=on_bad_row)
        asked = asked_of(intake.questions)
        imported.skipped.extend(intake.skipped)
        imported.repaired.update(intake.repaired)
        tables = {file: _with_known_questions(data, asked, file, imported) for file, data in tables.items()}
    if imported.skipped and on_bad_row == "refuse":
        raise refusal(imported.skipped, len(imported.skipped))
    completions = pa.concat_tables(tables.values())
    _refuse_duplicates(completions, files)
    if asked is None:
        asked = _bare_questions(completions)
    if own_codes:
        asked, completions = (_rename_languages(data, names) for data in (asked, completions))
    ids = pc.unique(completions["question_id"])
    parts = zip(_split_chunks(asked, ids, []), _split_chunks(completions, ids, ["language", "sample"]), strict=True)
    for number, tables_of_chunk in enumerate(parts):
        name = f"{number:05d}"
        for stage, data in zip(stages, tables_of_chunk, strict=True):
            stage.write(name, data, UNCOMPRESSED)
        imported.chunks.chunks[name] = [name]
    return imported


def _split_chunks(data: pa.Table, ids: pa.Array, order: Sequence[str]) -> Iterator[pa.Table]:
    """Yields the rows of `QUESTIONS_PER_CHUNK` questions at a time: questions as in `ids`, rows sorted by `order`."""
    chunk = pc.divide(pc.index_in(data["question_id"], ids), QUESTIONS_PER_CHUNK)
    data = data.append_column("chunk", chunk).filter(chunk.is_valid())
    data = data.sort_by([(name, "ascending") for name in ("chunk", *order)]).combine_chunks()
    count = -(-len(ids) // QUESTIONS_PER_CHUNK)
    ends = np.searchsorted(data["chunk"].to_numpy(), np.arange(count + 1))
    for first, end in pairwise(ends.tolist()):
        yield data.slice(first, end - first).drop_columns("chunk")


def _read(file: Path) -> pa.Table:
    """Reads and validates a file of completions."""
    try:
        data = pq.ParquetFile(file)
        if missing := [name for name in COMPLETIONS.names if name not in data.schema_arrow.names]:
            raise InputError(
                f"{file}: field {missing[0]!r} is missing; completions need {', '.join(COMPLETIONS.names)}"
            )
        rows = data.read(columns=COMPLETIONS.names).cast(COMPLETIONS)
        rows.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: cannot be read as a Parquet file of completions: {error}") from None
    for name in ("question_id", "language", "sample"):
        if empty := pc.indices_nonzero(rows[name].is_null()).to_pylist():
            raise InputError(f"{file}, row {empty[0] + 1}: field {name!r} is missing or empty")
    for name in pc.unique(rows["language"]).to_pylist():
        if language_code(name) is None:
            row = pc.index(rows["language"], name).as_py() + 1
            raise InputError(f"{file}, row {row}: {name!r} is not a known language; known are {', '.join(LANGUAGES)}")
    return rows


def _unify_languages(tables: dict[Path, pa.Table]) -> dict[str, str]:
    """Replaces language names in `tables` by their codes; returns code -> name in the files."""
    names: dict[str, str] = {}
    for file, data in tables.items():
        codes = {name: str(language_code(name)) for name in pc.unique(data["language"]).to_pylist()}
        for name, code in codes.items():
            if names.setdefault(code, name) != name:
                raise InputError(f"{file}: {name!r} and {names[code]!r} name the same language; use one name")
        tables[file] = _rename_languages(data, codes)
    return names


def _rename_languages(data: pa.Table, names: dict[str, str]) -> pa.Table:
    """Replaces the values of the column `language`."""
    column = pa.array([names[name] for name in data["language"].to_pylist()], pa.string())
    return data.set_column(data.column_names.index("language"), "language", column)


def _refuse_duplicates(completions: pa.Table, files: Sequence[Path]) -> None:
    """Raises InputError for duplicate samples, which would vote twice; common if a folder mixes two models."""
    keys = ["question_id", "language", "sample"]
    counts = completions.group_by(keys).aggregate([("text", "count")])
    duplicates = counts.filter(pc.greater(counts["text_count"], 1))
    if len(duplicates):
        first = ", ".join(f"{name} {duplicates[name][0].as_py()}" for name in keys)
        raise InputError(f"{', '.join(map(str, files[:2]))}: {first} appears twice; give one model's completions")


def _bare_questions(completions: pa.Table) -> pa.Table:
    """`ASKED` for questions known only by id: no prompt, no gold, and letters without options."""
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


def _with_known_questions(completions: pa.Table, asked: pa.Table, file: Path, imported: Imported) -> pa.Table:
    """Keeps completions whose question is known in their language; records the others as skipped."""
    known, given = (
        pc.binary_join_element_wise(data["question_id"], data["language"], "\x1f") for data in (asked, completions)
    )
    is_known = pc.is_in(given, value_set=pc.unique(known))
    for row in pc.indices_nonzero(pc.invert(is_known)).to_pylist():
        question, language = (completions[name][row].as_py() for name in ("question_id", "language"))
        reason = f"question {question} in {language} is not in --questions"
        imported.skipped.append(Problem(str(file), row + 1, reason))
    return completions.filter(is_known)
