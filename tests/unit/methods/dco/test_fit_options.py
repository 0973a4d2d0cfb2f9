"""Rows of `fit: options`: all candidates of a question with the optimal policy's probabilities."""

from pathlib import Path

import numpy as np
import pytest
from factories import scored_tables

from calm_ray.core.rows import rows_of
from calm_ray.methods.dco.experts import Experts
from calm_ray.methods.dco.fit_options import OptionJob
from calm_ray.methods.dco.gamma import gammas
from calm_ray.methods.dco.settings import Dco
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.training.trees import read_trees


def test_rows_hold_the_product_of_all_languages(tmp_path: Path) -> None:
    logps = {"en": [[-1.0, -2.0, -4.0], [-3.0, -1.0]], "fr": [[-2.0, -1.0, -1.0], [-1.0, -2.0]]}
    scored, options = (Stage(Storage(str(tmp_path / name))) for name in ("scored", "options"))
    for language, data in scored_tables(logps).items():
        scored.write(f"00000-{language}", data)
    job = OptionJob(scored, options, list(logps), Experts(gammas(Dco(), list(logps), 1.0), 1.0))
    assert job.make("00000") == job.count("00000") == {"options": 4}
    rows = {(row["language"], row["question_id"]): row for row in rows_of(options.read())}
    weights = np.exp([-3.0, -3.0, -5.0])
    assert rows["fr", "q0"]["probabilities"] == pytest.approx(list(weights / weights.sum()))
    assert rows["en", "q1"]["probabilities"] == pytest.approx([1 / (1 + np.e), np.e / (1 + np.e)])
    trees = {(tree.language, tree.question_id): tree for tree in read_trees(options)}
    tree = trees["fr", "q0"]
    assert tree.probabilities == tuple(rows["fr", "q0"]["probabilities"])
    assert [branch.tokens for branch in tree.branches] == rows["fr", "q0"]["token_ids"]
    assert tree.first(None) is tree
