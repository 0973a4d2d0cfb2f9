"""Which question `calm-ray show` prints."""

from pathlib import Path

import pytest
from factories import question

from calm_ray.commands.show import _find
from calm_ray.core.errors import InputError
from calm_ray.core.rows import Pair, Question, schema, table
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage


def test_without_pairs_it_is_the_first_question(tmp_path: Path) -> None:
    questions, pairs = (Stage(Storage(str(tmp_path / name))) for name in ("questions", "pairs"))
    for chunk, question_id in (("00000", "q1"), ("00001", "q2")):
        questions.write(chunk, table(Question, [question(question_id)]))
        pairs.write(chunk, schema(Pair).empty_table())
    assert _find(pairs, questions, None) == ("00000", "q1")
    assert _find(pairs, questions, "q2") == ("00001", "q2")
    with pytest.raises(InputError, match="question 'q3' is not in this run"):
        _find(pairs, questions, "q3")
