"""How candidates are scored, decided without vLLM."""

from calm_ray.engines.vllm import MAX_LABELS, _are_labels


def test_only_single_tokens_are_scored_in_one_request() -> None:
    assert _are_labels([[5], [6]])
    assert not _are_labels([[5], [6, 7]])
    assert not _are_labels([[number] for number in range(MAX_LABELS + 1)])
