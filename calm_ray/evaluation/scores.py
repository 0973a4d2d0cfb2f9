"""Scored candidates as arrays: L languages, Q questions, at most K candidates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from calm_ray.run.stage import Stage

Tables = dict[str, pa.Table]
"""Rows of `Scored` by language."""
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Questions present in every language. Use `replace(scores, logps=...)` for the same under another policy."""

    questions: list[str]
    languages: list[str]
    logps: Floats
    """[L, Q, K], summed over a candidate's tokens, in nats; padded with -inf."""
    counts: Ints
    """[Q], number of candidates."""
    right: Ints
    """[Q], index of the right candidate, -1 if unknown."""
    places: Ints
    """[L, Q], each question's row in its language's table."""
    prompt_logps: Floats
    """[L, Q], added to the logps of all candidates of a question; 0 for most conventions."""
    scales: Floats
    """[L, Q, K], the convention's factor on log-probabilities."""

    @property
    def scores(self) -> Floats:
        """[L, Q, K], by which candidates are ranked; the highest wins, ties go to the lower index."""
        return np.asarray((self.logps + self.prompt_logps[:, :, None]) * self.scales)

    @property
    def answers(self) -> Ints:
        """[L, Q], index of each language's top candidate."""
        return np.asarray(self.scores.argmax(axis=2))

    def only(self, questions: Collection[str]) -> Scores:
        """Returns the scores of the given questions, in their order here."""
        kept = [row for row, question_id in enumerate(self.questions) if question_id in questions]
        by_question = ("logps", "places", "prompt_logps", "scales")
        return replace(
            self, questions=[self.questions[row] for row in kept], counts=self.counts[kept], right=self.right[kept],
            **{name: getattr(self, name)[:, kept] for name in by_question},
        )  # fmt: skip


def scores_of(scored: Tables, convention: str = "sum") -> Scores:
    """Converts the rows of `Scored` in each language to arrays.

    `convention`: `sum` is acc of lm-evaluation-harness, `per_char` its acc_norm and `per_byte` its acc_bytes
    (EleutherAI, 4e7e0d4, lm_eval/api/task.py); `mean_full` is the mean over all prompt and candidate tokens except the
    first, as in DCO's released code (Betswish/ConsistencyRL, e0e8f46, probe.py).
    """
    languages = list(scored)
    questions, places = _in_common([scored[code]["question_id"].combine_chunks() for code in languages])
    tables = [scored[code].take(pa.array(own)) for code, own in zip(languages, places, strict=True)]
    counts = pc.list_value_length(tables[0]["logps"]).to_numpy().astype(np.int64)
    logps = np.stack([_padded(one["logps"], counts, -np.inf) for one in tables])
    scales = np.stack([_scales(one, convention, counts) for one in tables])
    added = np.zeros((len(tables), len(questions)))
    if convention == "mean_full":
        added = np.stack([one["prompt_logp"].to_numpy() for one in tables])
    return Scores(
        questions=questions,
        languages=languages,
        logps=logps,
        counts=counts,
        right=np.max(
            [one["right"].fill_null(-1).to_numpy() for one in tables], axis=0
        ),  # it may be known in one language only
        places=places,
        prompt_logps=added,
        scales=scales,
    )


def columns_of_convention(convention: str) -> list[str]:
    """Returns the columns of `Scored` that `scores_of` reads."""
    extra = {
        "per_char": ["choices"],
        "per_byte": ["choices"],
        "mean_full": ["prompt_logp", "token_ids", "prompt_token_ids"],
    }
    return ["question_id", "logps", "right", *extra.get(convention, [])]


def _in_common(ids: Sequence[pa.Array]) -> tuple[list[str], Ints]:
    """Returns the questions present in every language, in the first one's order, and their rows in each language."""
    if all(one.equals(ids[0]) for one in ids):
        return ids[0].to_pylist(), np.tile(np.arange(len(ids[0])), (len(ids), 1))
    places = [{question_id: row for row, question_id in enumerate(one.to_pylist())} for one in ids]
    common = [question_id for question_id in places[0] if all(question_id in own for own in places)]
    rows = [[own[question_id] for question_id in common] for own in places]
    return common, np.array(rows, dtype=np.int64).reshape(len(ids), -1)


def _padded(lists: pa.ChunkedArray, counts: Ints, missing: float) -> Floats:
    array = lists.combine_chunks()
    width = int(counts.max(initial=1))
    padded = np.full((len(counts), width), missing)
    padded[np.arange(width) < counts[:, None]] = pc.list_flatten(array).to_numpy()
    return padded


def _scales(data: pa.Table, convention: str, counts: Ints) -> Floats:
    """Returns the convention's factors on log-probabilities [Q, K]."""
    if convention == "sum":
        return np.ones((len(counts), int(counts.max(initial=1))))
    if convention == "mean_full":
        tokens = pc.list_value_length(pc.list_flatten(data["token_ids"]))
        before = pc.list_value_length(data["prompt_token_ids"]).to_numpy() - 1
        sides = pa.ListArray.from_arrays(pa.array(np.append(0, counts.cumsum()), pa.int32()), tokens.combine_chunks())
        lengths = before[:, None] + _padded(pa.chunked_array([sides]), counts, 1.0)
        return 1.0 / lengths
    measure = pc.utf8_length if convention == "per_char" else pc.binary_length
    lengths = measure(pc.list_flatten(data["choices"])).combine_chunks()
    sides = pa.ListArray.from_arrays(pa.array(np.append(0, counts.cumsum()), pa.int32()), lengths)
    return 1.0 / _padded(pa.chunked_array([sides]), counts, 1.0)


def read_scored(stage: Stage, chunk: str, languages: Sequence[str], columns: list[str] | None = None) -> Tables:
    """Reads the rows of `Scored` of one chunk in each language."""
    return {code: stage.read_chunk(f"{chunk}-{code}", columns) for code in languages}


def chunk_names(stage: Stage) -> list[str]:
    """Returns the chunks of a stage of scores, without the language suffix."""
    return sorted({name.rpartition("-")[0] for name in stage.chunks()})
