"""What fits into the engines' context, to the token."""

from pathlib import Path

import pytest
from factories import question, tiny_model
from transformers import AutoTokenizer

from calm_ray.config import Config
from calm_ray.core.errors import BadRow
from calm_ray.core.rows import Question
from calm_ray.job.prompt_limits import candidate_check, too_long
from calm_ray.methods.candidates import candidate_form
from calm_ray.prompts.questions import prompt_text
from calm_ray.prompts.rendering import encode_prompt
from calm_ray.recipes.load import load_config

ROW: Question = {**question(), "choices": ["w1 w2", "w3"]}


def config_with(context: int) -> Config:
    return load_config(None, [f"engines.args.max_model_len={context}", "candidates={form: choices}"])


def test_a_prompt_must_leave_room_for_a_token(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    config = config_with(512)
    length = len(encode_prompt(AutoTokenizer.from_pretrained(model), prompt_text(ROW, config.sampling.prompt)))
    assert list(too_long(model, [ROW], config_with(length))) == [(ROW, length, length)]
    assert not list(too_long(model, [ROW], config_with(length + 1)))


def test_a_candidate_must_leave_room_for_a_token(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    config = config_with(512)
    assert config.candidates is not None
    form = candidate_form(config.candidates, config.world.seed)
    assert form is not None
    candidates = form.of(ROW, AutoTokenizer.from_pretrained(model))
    longest = len(candidates["prompt_token_ids"]) + max(map(len, candidates["token_ids"]))
    exact, roomy = (candidate_check(model, config_with(context)) for context in (longest, longest + 1))
    assert exact is not None
    assert roomy is not None
    with pytest.raises(BadRow, match="does not fit"):
        exact(ROW)
    roomy(ROW)
