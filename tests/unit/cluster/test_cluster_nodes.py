"""How the planner sees a cluster's nodes."""

from typing import Any

import pytest

from calm_ray.cluster.machines import GB
from calm_ray.cluster.nodes import GROUP_LABEL, Kind, Memory, planned
from calm_ray.core.errors import ResourceError
from calm_ray.job.cluster_check import check_slots
from calm_ray.recipes.load import load_config

A100 = {"CPU": 96.0, "GPU": 8.0, "accelerator_type:A100": 1.0}


def ray_node(name: str, resources: dict[str, float] | None = None, group: str = "") -> dict[str, Any]:
    return {"NodeID": name, "Resources": resources or {"CPU": 4.0}, "Labels": {GROUP_LABEL: group} if group else {}}


def test_measured_memory_overrides_the_node_label() -> None:
    nodes = [ray_node(name, A100 | {"accelerator_type:A100-40G": 1.0}) for name in ("measured", "unknown")]
    measured, unknown = planned(nodes, [], {"measured": Memory(512 * GB, 79 * GB)})
    assert (measured.gpu_memory, measured.memory, measured.gpu) == (79 * GB, 512 * GB, "A100-40")
    assert (unknown.gpu_memory, unknown.memory) == (40 * GB, None)


def test_a100_without_a_size_is_identified_by_measured_memory() -> None:
    (unknown,) = planned([ray_node("one", A100)], [], {})
    (measured,) = planned([ray_node("one", A100)], [], {"one": Memory(512 * GB, 42 * GB)})
    assert (unknown.gpu_memory, measured.gpu_memory) == (None, 42 * GB)
    assert measured.device.name == "A100-40"


def test_existing_nodes_are_not_counted_again_as_future_nodes() -> None:
    existing = [ray_node("head"), *(ray_node(f"gpu-{number}", A100, "a100x8") for number in range(3))]
    nodes = planned(existing, [Kind("a100x8", A100, 8), Kind("head", {"CPU": 4.0}, 0)], {"gpu-0": Memory(GB, 42 * GB)})
    assert len(nodes) == 1 + 8
    assert sum(node.gpus for node in nodes) == 64
    # Future nodes are assumed to match existing ones of their kind.
    assert [node.gpu_memory for node in nodes[4:]] == [42 * GB] * 5


@pytest.mark.parametrize("group", ["", "removed"])
def test_nodes_of_unknown_kinds_are_counted_separately(group: str) -> None:
    assert len(planned([ray_node("one", group=group)], [Kind("a100x8", A100, 2)], {})) == 3


def test_slots_are_counted_only_if_some_node_declares_them() -> None:
    nodes = planned([ray_node("a", {"calm_ray_train": 8.0}), ray_node("b")], [], {})
    assert [node.train_slots for node in nodes] == [8, 0]
    assert [node.engine_slots for node in nodes] == [None, None]


@pytest.mark.parametrize(
    ("nodes", "placement", "missing"),
    [
        ([{}], "split", "calm_ray_train"),
        ([{}, {"calm_ray_train": 8}], "split", "calm_ray_engine"),
        ([{"calm_ray_engine": 8}, {"calm_ray_train": 8}], "split", None),
        ([{}, {"calm_ray_train": 8}], "colocate", None),
        ([{"calm_ray_train": 8}], "split", None),
    ],
)
def test_elastic_workers_need_slots_that_engines_cannot_take(
    nodes: list[dict[str, float]], placement: str, missing: str | None
) -> None:
    config = load_config(None, ["train.workers=[1, 2]", f"placement={placement}"])
    if missing is None:
        check_slots(config, nodes)
    else:
        with pytest.raises(ResourceError, match=missing):
            check_slots(config, nodes)


def test_warns_if_engines_may_fill_the_training_slots(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, ["train.workers=2"])
    train, engines = {"calm_ray_train": 8.0}, {"calm_ray_engine": 8.0}
    identical: list[dict[str, float]] = [{}, {}]
    for nodes in (identical, [train, train], [train, engines]):
        check_slots(config, nodes)
        assert capsys.readouterr().out == ""
    check_slots(config, [{}, train])
    assert "engines may fill" in capsys.readouterr().out
