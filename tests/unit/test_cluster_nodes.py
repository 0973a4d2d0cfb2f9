"""What a plan is told of a cluster's nodes."""

from typing import Any

import pytest

from calm_ray.cluster.machines import GB
from calm_ray.cluster.nodes import GROUP_LABEL, Kind, Memory, planned
from calm_ray.core.errors import ResourceError
from calm_ray.job.cluster_check import check_slots
from calm_ray.recipes import load_config

A100 = {"CPU": 96.0, "GPU": 8.0, "accelerator_type:A100": 1.0}


def alive(name: str, resources: dict[str, float] | None = None, group: str = "") -> dict[str, Any]:
    return {"NodeID": name, "Resources": resources or {"CPU": 4.0}, "Labels": {GROUP_LABEL: group} if group else {}}


def test_what_a_node_says_of_itself_counts_before_its_label() -> None:
    nodes = [alive(name, A100 | {"accelerator_type:A100-40G": 1.0}) for name in ("asked", "silent")]
    asked, silent = planned(nodes, [], {"asked": Memory(512 * GB, 79 * GB)})
    assert (asked.gpu_memory, asked.memory, asked.gpu) == (79 * GB, 512 * GB, "A100-40")
    assert (silent.gpu_memory, silent.memory) == (40 * GB, None)


def test_an_a100_without_a_size_is_known_when_it_is_asked() -> None:
    (silent,) = planned([alive("one", A100)], [], {})
    (asked,) = planned([alive("one", A100)], [], {"one": Memory(512 * GB, 42 * GB)})
    assert (silent.gpu_memory, asked.gpu_memory) == (None, 42 * GB)
    assert asked.device.name == "A100-40"


def test_nodes_that_are_there_are_not_counted_again_among_those_that_may_come() -> None:
    there = [alive("head"), *(alive(f"gpu-{number}", A100, "a100x8") for number in range(3))]
    nodes = planned(there, [Kind("a100x8", A100, 8), Kind("head", {"CPU": 4.0}, 0)], {"gpu-0": Memory(GB, 42 * GB)})
    assert len(nodes) == 1 + 8
    assert sum(node.gpus for node in nodes) == 64
    # One that comes is taken to be like those of its kind.
    assert [node.gpu_memory for node in nodes[4:]] == [42 * GB] * 5


@pytest.mark.parametrize("group", ["", "gone"])
def test_nodes_of_no_kind_are_counted_beside_the_kinds(group: str) -> None:
    assert len(planned([alive("one", group=group)], [Kind("a100x8", A100, 2)], {})) == 3


def test_places_count_where_any_node_has_them() -> None:
    nodes = planned([alive("a", {"calm_ray_train": 8.0}), alive("b")], [], {})
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
def test_elastic_workers_need_places_that_engines_do_not_take(
    nodes: list[dict[str, float]], placement: str, missing: str | None
) -> None:
    config = load_config(None, ["train.workers=[1, 2]", f"placement={placement}"])
    if missing is None:
        check_slots(config, nodes)
    else:
        with pytest.raises(ResourceError, match=missing):
            check_slots(config, nodes)


def test_engines_that_may_fill_the_places_to_train_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, ["train.workers=2"])
    train, engines = {"calm_ray_train": 8.0}, {"calm_ray_engine": 8.0}
    alike: list[dict[str, float]] = [{}, {}]
    for nodes in (alike, [train, train], [train, engines]):
        check_slots(config, nodes)
        assert capsys.readouterr().out == ""
    check_slots(config, [{}, train])
    assert "engines may fill" in capsys.readouterr().out
