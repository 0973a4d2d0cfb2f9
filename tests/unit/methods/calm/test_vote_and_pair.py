"""Why a round of CALM has nothing to train on."""

from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.vote_and_pair import VoteAndPair
from calm_ray.recipes.load import load_config


def test_unreadable_answers_are_named_as_the_reason() -> None:
    step = VoteAndPair(load_config(), Preferences())
    assert "95% of the completions have no answer" in step.empty_reason({"vote": {"unparseable_samples": 0.95}})
    assert "unanimous" in step.empty_reason({"vote": {"unparseable_samples": 0.05}})
