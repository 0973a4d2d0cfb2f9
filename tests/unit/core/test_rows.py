import pyarrow as pa
import pytest
from factories import completion, question, scored

from calm_ray.core import rows


def test_rows_round_trip_through_arrow() -> None:
    vote = rows.Vote(
        question_id="q", counts={"A": 3}, winner=None, agreement=1.0, tied=True, by_language={"en": "A", "fr": None}
    )
    scored_row = scored([-1.5, -2.0], right=1, prompt_logp=-3.25)
    candidates = {name: value for name, value in scored_row.items() if name in rows.CandidateSet.__annotations__}
    for kind, row in [
        (rows.Vote, vote), (rows.Question, question()), (rows.Completion, completion(None)), (rows.Scored, scored_row),
        (rows.Scored, scored([])), (rows.CandidateSet, candidates), (rows.CandidateSet, {**candidates, "right": None}),
    ]:  # fmt: skip
        assert rows.rows_of(rows.table(kind, [row])) == [row]


def test_row_schemas_have_the_declared_fields_and_nullability() -> None:
    for kind in (
        rows.Question, rows.Completion, rows.Vote, rows.Pair, rows.CandidateSet, rows.Scored, rows.ReferenceLogps,
        rows.Dialogue, rows.Prediction,
    ):  # fmt: skip
        assert rows.schema(kind).names == list(kind.__annotations__)
    assert rows.schema(rows.Completion).field("answer").nullable
    assert not rows.schema(rows.Completion).field("text").nullable
    nullable = [field.name for field in rows.schema(rows.Scored) if field.nullable]
    assert nullable == ["subject", "right", "prompt_logp"]
    assert rows.schema(rows.Scored).names[: len(rows.schema(rows.CandidateSet))] == rows.schema(rows.CandidateSet).names


def test_values_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(pa.ArrowInvalid):
        rows.table(rows.Completion, [{**completion("A"), "sample": "first"}])


def test_pairs_use_the_trl_preference_format() -> None:
    assert {"prompt", "chosen", "rejected"} <= set(rows.schema(rows.Pair).names)
