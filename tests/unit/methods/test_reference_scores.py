"""Where the reference policy's scores come from."""

from pathlib import Path

import pytest

from calm_ray.methods.shared.scores import ReferenceScores
from calm_ray.recipes.load import load_config
from calm_ray.run.directory import RunDirectory


@pytest.mark.parametrize(("form", "reused"), [("world", "0/score"), ("samples", "2/reference_score")])
def test_scores_of_the_same_policy_are_reused_unless_candidates_are_samples(
    form: str, reused: str, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path), "run")
    run.stage(0, "score").finish({"policy": "base"})
    run.stage(1, "score").finish({"policy": "round-1"})
    scores = ReferenceScores(load_config(None, ["method=dco", f"candidates={{form: {form}}}", "train.sft_weight=0"]))
    assert scores.found(run, 2, "base").storage.uri() == run.storage.under(f"rounds/{reused}").uri()


def test_scores_of_another_policy_are_not_reused(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path), "run")
    run.stage(0, "score").finish({"policy": "base"})
    scores = ReferenceScores(load_config(None, ["method=dco", "candidates={form: world}", "train.sft_weight=0"]))
    assert scores.found(run, 1, "round-1").storage.uri() == run.stage(1, "reference_score").storage.uri()
