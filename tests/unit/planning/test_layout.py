"""Placement of engines and workers, what does not fit, and proposals that do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from calm_ray.cluster.machines import DEVICES, GB, GIB, Node
from calm_ray.cluster.resources import ENGINE_SLOT, TRAIN_SLOT, shortage
from calm_ray.config import Config
from calm_ray.core.errors import InputError, ResourceError
from calm_ray.planning.hardware import identical_nodes, node_for_instance_type, nodes_from_launcher_file
from calm_ray.planning.layout import Layout, make_layout
from calm_ray.planning.model_shape import Shape, shape_of, shape_of_folder
from calm_ray.planning.needs import needs_of
from calm_ray.planning.plan import check_plan
from calm_ray.planning.proposals import changed, proposals
from calm_ray.recipes.load import load_config

LLAMA = "llama3_8b"
SEVENTY = ["model=x/Llama-3-70B", "engines={shared: 1, per_language: null, args: {max_model_len: 2048}}"]
FULL = ["train.lora=null", "engines.refresh=merged"]


def recipe(*overrides: str, name: str = LLAMA) -> Config:
    return load_config(name, list(overrides))


def layout(nodes: list[Node], *overrides: str, name: str = LLAMA) -> Layout:
    config = recipe(*overrides, name=name)
    return make_layout(config, shape_of(config.model), nodes)


def placed(found: Layout) -> list[tuple[int, int, int]]:
    """(engines, workers, GPUs) on each node."""
    return [(place.engines, place.workers, place.gpus) for place in found.places]


@pytest.mark.parametrize(
    ("nodes", "overrides", "places"),
    [
        (2, [], [(6, 2, 8), (0, 6, 6)]),
        (3, ["engines.tensor_parallel_size=4"], [(2, 0, 8), (2, 0, 8), (2, 0, 8)]),
        (4, ["engines.tensor_parallel_size=4"], [(2, 0, 8), (2, 0, 8), (2, 0, 8), (0, 8, 8)]),
        (2, ["engines={shared: 3, tensor_parallel_size: 4}", "train.workers=4"], [(2, 0, 8), (1, 4, 8)]),
        (1, ["placement=colocate", "train.workers=6"], [(6, 6, 6)]),
        (1, ["placement=colocate", "engines={per_language: null, shared: 8}"], [(8, 8, 8)]),
        (2, ["placement=colocate", "engines={per_language: null, shared: 2, tensor_parallel_size: 8}"],
         [(1, 8, 8), (1, 0, 8)]),
        (2, ["train.workers=[2, 16]"], [(6, 2, 8), (0, 8, 8)]),
        (1, ["train.workers=[2, 16]"], [(6, 2, 8)]),
    ],
)  # fmt: skip
def test_engines_are_placed_before_workers(
    nodes: int, overrides: list[str], places: list[tuple[int, int, int]]
) -> None:
    assert placed(layout(identical_nodes(nodes), *overrides)) == places


def test_engine_does_not_span_nodes() -> None:
    """With six GPUs per node, a third engine of four GPUs would need two from each."""
    nodes = identical_nodes(2, gpus=6)
    found = layout(nodes, "engines={per_language: null, shared: 3, tensor_parallel_size: 4}", "train.workers=1")
    assert [place.engines for place in found.places] == [1, 1]
    assert found.problems[0].startswith("no room for 1 of 3 engines: each needs 4 CPU, 4 GPU, 16.0 GB on one node")


def test_only_the_minimum_of_elastic_workers_must_fit() -> None:
    found = layout(identical_nodes(1), "train.workers=[2, 1000000000]")
    assert found.problems == []
    assert found.needs.count("worker") == 2
    [problem] = layout(identical_nodes(1), "train.workers=[3, 16]").problems
    assert problem.startswith("no room for 1 of 3 training workers")


def test_minimum_of_elastic_workers_must_hold_the_model() -> None:
    """A 70B model: each of two workers holds half of it, each of sixteen only a little."""
    elastic = [*SEVENTY, "engines.tensor_parallel_size=4", "train.workers=[2, 16]"]
    [problem] = layout(identical_nodes(3), *elastic).problems
    assert "a training worker needs" in problem
    assert "70.0 GB weights" in problem
    assert layout(identical_nodes(3), *elastic, "train.workers=[4, 16]").problems == []


def test_shortages_are_reported_in_numbers() -> None:
    [problem] = layout(identical_nodes(1)).problems
    assert problem == (
        "no room for 6 of 8 training workers: each needs 1 CPU, 1 GPU, 4.0 GB on one node; the run needs 14 CPU, "
        "14 GPU in total, and 1 node has 96 CPU, 8 GPU, 1,237.0 GB of host memory"
    )
    [problem] = layout(identical_nodes(2), *SEVENTY).problems
    assert problem == (
        "an engine needs 144.3 GB per GPU before any KV cache (140.0 GB weights, 2.3 GB activations, 2.0 GB for "
        "CUDA) but may use 73.6 GB: 70.7 GB short"
    )
    [problem] = layout(identical_nodes(2), "engines.tensor_parallel_size=3", "engines.per_language=null",
                       "engines.shared=2").problems  # fmt: skip
    assert problem == (
        "engines.tensor_parallel_size=3 does not divide the model's 32 heads, 8 key/value heads (nor is it a "
        "multiple), MLP of 14,336"
    )


@pytest.mark.parametrize(
    ("heads", "keys", "size", "indivisible"),
    [
        (28, 4, 14, ["4 key/value heads (nor is it a multiple)", "MLP of 960", "vocabulary of 49,152 (padded)"]),
        (24, 8, 12, ["8 key/value heads (nor is it a multiple)"]),
        (15, 5, 5, ["vocabulary of 49,152 (padded)"]),
        (15, 5, 3, ["5 key/value heads (nor is it a multiple)"]),
        (40, 8, 16, ["40 heads"]),
        (9, 3, 3, []),  # the padded vocabulary, 3 times 16,384
        (16, 2, 8, []),  # each key head on four GPUs
        (32, 8, 8, []),
    ],
)
def test_tensor_parallel_size_must_divide_the_model(heads: int, keys: int, size: int, indivisible: list[str]) -> None:
    """From the assertions in vLLM's llama.py, its linear layers and its embeddings."""
    shape = Shape(heads * 64, 2, 960, heads, keys, 64, 49_100, True, 8192, 10**8, "")
    config = recipe(f"engines={{per_language: null, shared: 1, tensor_parallel_size: {size}}}", "train.workers=1")
    problem = f"engines.tensor_parallel_size={size} does not divide the model's {', '.join(indivisible)}"
    assert make_layout(config, shape, identical_nodes(2, gpus=16)).problems == ([problem] if indivisible else [])


def test_sequence_must_fit_in_the_cache() -> None:
    """40 GB hold the weights and a cache of 125,919 tokens of 128 KiB."""
    [problem] = layout(identical_nodes(2, gpu_memory=40), "engines.args.max_model_len=131072").problems
    assert problem.endswith("125,919 tokens, but one sequence may have 131,072: 5,153 tokens short")
    assert layout(identical_nodes(2, gpu_memory=40), "engines.args.max_model_len=-1").problems == []


def test_host_memory_is_checked_per_node() -> None:
    """Six engines and two workers of 4 GB each, on nodes filled to at most 95%."""
    enough, short = (identical_nodes(2, memory=memory) for memory in (32 / 0.95 + 0.01, 32 / 0.95 - 0.01))
    assert placed(layout(enough)) == [(6, 2, 8), (0, 6, 6)]
    assert placed(layout(short)) == [(6, 1, 7), (0, 7, 7)]


@pytest.mark.parametrize(
    ("train", "engine", "overrides", "places"),
    [
        ((0, 8), (None, None), [], [(6, 0, 6), (0, 8, 8)]),
        ((8, 0), (None, None), [], [(0, 8, 8), (6, 0, 6)]),  # engines leave these GPUs to the workers
        ((None, None), (2, 4), [], [(2, 6, 8), (4, 2, 6)]),
        ((8, 0), (0, 6), [], [(0, 8, 8), (6, 0, 6)]),
        ((4, 4), (None, None), [], [(4, 4, 8), (2, 4, 6)]),
        ((8, 8), (None, None), [], [(6, 2, 8), (0, 6, 6)]),
        ((8, 0), (None, None), ["device=cpu", "engines.cpus=16", "train.cpus_per_worker=12"], [(0, 8, 0), (6, 0, 0)]),
        ((8, 0), (None, None), ["engines.refresh=merged"], [(0, 8, 8), (6, 0, 6)]),
        ((0, 8), (8, 8), ["placement=colocate", "train.workers=6"], [(0, 0, 0), (6, 6, 6)]),
        ((0, 5), (None, None), ["train.workers=[2, 16]"], [(6, 0, 6), (0, 5, 5)]),
        ((0, 8), (1, 1), ["engines={shared: 2, per_language: null, tensor_parallel_size: 4}", "train.workers=4"],
         [(1, 0, 4), (1, 4, 8)]),
    ],
)  # fmt: skip
def test_slots_restrict_placement(
    train: tuple[int | None, ...],
    engine: tuple[int | None, ...],
    overrides: list[str],
    places: list[tuple[int, int, int]],
) -> None:
    nodes = [
        replace(node, train_slots=train[i], engine_slots=engine[i])
        for i, node in enumerate(identical_nodes(len(train)))
    ]
    found = layout(nodes, *overrides)
    assert placed(found) == places
    assert found.problems == []


def test_missing_slots_are_reported() -> None:
    nodes = [replace(node, train_slots=5, engine_slots=2) for node in identical_nodes(2)]
    for_engines, for_workers = layout(nodes, "train.workers=11").problems
    assert for_engines.startswith(f"no room for 2 of 6 engines: each needs 1 CPU, 1 GPU, 4.0 GB, 1 {ENGINE_SLOT} on")
    assert for_engines.endswith(f"16 GPU, 2,473.9 GB of host memory, 4 {ENGINE_SLOT}")
    assert f"no room for 1 of 11 training workers: each needs 1 CPU, 1 GPU, 4.0 GB, 1 {TRAIN_SLOT}" in for_workers
    assert for_workers.endswith(f"10 {TRAIN_SLOT}")


def test_gpu_memory_counts_only_where_it_may_be_used() -> None:
    """Engines go on GPUs of 40 GB, workers that need 70 GB or more on larger ones."""
    small, large = identical_nodes(1, gpu="A100-40"), identical_nodes(1, gpu="A100-80")
    full = [*FULL, "train.workers=4", "train.activation_checkpointing=true"]
    assert "a GPU has 40.0 GB" in layout(small + large, *full).problems[0]
    separated = [replace(small[0], train_slots=0, engine_slots=8), replace(large[0], train_slots=8, engine_slots=0)]
    found = layout(separated, *full)
    assert found.problems == []
    assert found.engine.limit == int(0.9 * 40 * GB)


def test_unknown_memory_is_not_checked() -> None:
    nodes = [Node("a", cpus=64, gpus=8), Node("b", cpus=64, gpus=8)]
    assert layout(nodes, *SEVENTY).problems == []


@pytest.mark.parametrize(
    ("nodes", "overrides", "expected"),
    [
        (identical_nodes(1), [], ["placement=colocate train.workers=6", "train.workers=2"]),
        (identical_nodes(1, gpus=4), ["train.workers=1"], ["engines.per_language=null engines.shared=3"]),
        (identical_nodes(2), [*SEVENTY, "train.workers=4"], ["engines.tensor_parallel_size=4"]),
        (identical_nodes(2), [*FULL, "train.workers=2"], ["train.workers=4"]),
        (identical_nodes(2, gpu_memory=30), ["train.activation_checkpointing=false"],
         ["train.activation_checkpointing=true"]),
        (identical_nodes(2, gpu_memory=24), ["train.activation_checkpointing=false", "engines.args.max_model_len=1024"],
         ["train.activation_checkpointing=true"]),
        (identical_nodes(1), [*SEVENTY], ["engines.tensor_parallel_size=4 train.workers=4"]),
        (identical_nodes(1, gpus=0, cpus=8, memory=1000), ["device=cpu", "engines.cpus=4", "train.cpus_per_worker=0.2"],
         ["engines.per_language=null engines.shared=1", "engines.cpus=0.5"]),
    ],
)  # fmt: skip
def test_every_proposal_fits(nodes: list[Node], overrides: list[str], expected: list[str]) -> None:
    config = recipe(*overrides)
    shape = shape_of(config.model)
    assert make_layout(config, shape, nodes).problems
    found = proposals(config, shape, nodes)
    assert [" ".join(change) for change in found][: len(expected)] == expected
    for change in found:
        after = changed(config, change)
        assert after is not None
        assert make_layout(after, shape, nodes).problems == []


def test_rejected_job_lists_changes_that_fit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 128256}
        )
    )  # fmt: skip
    check_plan(recipe(), shape_of_folder(tmp_path), identical_nodes(2))
    with pytest.raises(ResourceError, match=r"(?s)6 of 8 training workers.*fits on these nodes with:\n  placement=col"):
        check_plan(recipe(), shape_of_folder(tmp_path), identical_nodes(1))
    with pytest.raises(ResourceError, match="no change of one or two keys makes it fit"):
        check_plan(recipe(), shape_of_folder(tmp_path), [Node("laptop", cpus=8)])
    assert ResourceError.exit_code == 3


def test_resources_requested_from_ray() -> None:
    """As `calm_ray.cluster.connection` counts them: workers next to sleeping engines need no GPUs of their own."""
    assert needs_of(recipe()).total == {"CPU": 14.0, "GPU": 14.0}
    assert needs_of(recipe("placement=colocate", "train.workers=6")).total == {"CPU": 12.0, "GPU": 6.0}
    assert needs_of(recipe("train.workers=[2, 8]"), workers=2).total == {"CPU": 8.0, "GPU": 8.0}
    node = {"CPU": 96.0, "GPU": 8.0}
    assert shortage(needs_of(recipe()), {"CPU": 192.0, "GPU": 16.0}, [node]) is None
    problem = shortage(needs_of(recipe()), {"CPU": 96.0, "GPU": 8.0}, [node])
    assert problem is not None
    assert "14 GPU (the cluster has at most 8)" in problem


def test_launcher_file_lists_its_nodes(tmp_path: Path) -> None:
    nodes = nodes_from_launcher_file(Path(__file__).parents[3] / "cluster.yaml")
    assert [node.name for node in nodes] == ["head", *(f"a100x8 {number}" for number in range(1, 9))]
    assert nodes[0] == Node("head", cpus=8, memory=32 * GIB)  # an m5.2xlarge
    assert nodes[1] == Node("a100x8 1", 96, 8, 40 * GB, 1152 * GIB, "A100-40")


def write_launcher_file(tmp_path: Path, **worker: object) -> Path:
    path = tmp_path / "cluster.yaml"
    node_types = {"head": {"resources": {"CPU": 4}}, "worker": {"max_workers": 3, **worker}}
    text = {"head_node_type": "head", "max_workers": 2, "available_node_types": node_types}
    path.write_text(yaml.safe_dump(text))
    return path


def test_resources_of_the_launcher_file_take_precedence(tmp_path: Path) -> None:
    path = write_launcher_file(
        tmp_path, resources={"CPU": 64, "GPU": 4, "memory": 500 * GB}, node_config={"vmSize": "x"}
    )
    worker = nodes_from_launcher_file(path, gpu_memory=80)[1]
    assert worker == Node("worker 1", 64, 4, 80 * GB, 500 * GB)
    assert len(nodes_from_launcher_file(path)) == 3  # the head and two workers, by the smaller max_workers
    assert nodes_from_launcher_file(path)[1].gpu_memory is None


@pytest.mark.parametrize(
    ("resources", "head", "worker"),
    [
        ({TRAIN_SLOT: 4}, (0, None), (4, None)),
        ({ENGINE_SLOT: 2}, (None, 0), (None, 2)),
        ({TRAIN_SLOT: 4, ENGINE_SLOT: 2}, (0, 0), (4, 2)),
        ({TRAIN_SLOT: 0}, (None, None), (None, None)),
    ],
)
def test_slots_of_the_launcher_file_restrict_placement(
    tmp_path: Path, resources: dict[str, int], head: tuple[int | None, ...], worker: tuple[int | None, ...]
) -> None:
    nodes = nodes_from_launcher_file(write_launcher_file(tmp_path, resources={"CPU": 64, "GPU": 4, **resources}))
    assert [(node.train_slots, node.engine_slots) for node in nodes] == [head, worker, worker]


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ({"node_config": {"InstanceType": "p9.99xlarge"}}, r"worker\.node_config\.InstanceType: 'p9.99xlarge' is not"),
        ({"node_config": {}}, r"worker: set resources\.CPU or node_config\.InstanceType"),
        ({"resources": {"CPU": -1}}, r"worker\.resources\.CPU: must be a non-negative number \(got -1\)"),
        ({"resources": [1]}, "worker: resources and node_config must be mappings"),
        ({"max_workers": "many", "resources": {"CPU": 1}}, r"worker\.max_workers: must be an integer"),
    ],
)
def test_bad_node_types_are_reported(tmp_path: Path, worker: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nodes_from_launcher_file(write_launcher_file(tmp_path, **worker))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "file not found"),
        ("- 1", "is not a mapping"),
        ("a: [", "is not valid YAML"),
        ("head_node_type: a", "available_node_types: missing or empty"),
        ("{head_node_type: b, available_node_types: {a: {}}}", "head_node_type: 'b' is not one of a"),
    ],
)
def test_bad_launcher_files_are_rejected(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        nodes_from_launcher_file(tmp_path / "cluster.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, r"nodes: must be an integer from 1 to 4096 \(got 0\)"),
        ({"gpus": -1}, "gpus-per-node: must be an integer"),
        ({"gpu_memory": -80}, r"gpu-memory: must be above 0 and at most 1,000,000 \(got -80\)"),
        ({"gpu_memory": 1e300}, r"gpu-memory: must be above 0 and at most 1,000,000 \(got 1e\+300\)"),
        ({"memory": 1e300}, "host-memory: must be above 0 and at most 1,000,000"),
        ({"cpus": 1e300}, "cpus-per-node: must be above 0 and at most 1,000,000"),
        ({"gpu_memory": float("nan")}, "gpu-memory: must be above 0"),
        ({"cpus": 0}, "cpus-per-node: must be above 0"),
        ({"memory": float("inf")}, "host-memory: must be above 0"),
        ({"gpu": "A1000"}, "gpu: unknown GPU 'A1000'; known: A100-40"),
        ({"gpu": "A1000", "gpu_memory": 80}, "gpu: unknown GPU 'A1000'"),
    ],
)
def test_bad_node_options_are_reported(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        identical_nodes(**{"count": 1, **values})  # type: ignore[arg-type]


def test_gpu_name_implies_its_memory() -> None:
    assert [identical_nodes(1, gpu=gpu)[0].gpu_memory for gpu in DEVICES] == [40 * GB, 80 * GB, 80 * GB, 141 * GB]
    assert identical_nodes(1, gpu="H200", gpu_memory=100)[0].gpu_memory == 100 * GB


def test_aws_instance_types() -> None:
    assert node_for_instance_type("m5.large", "a", "x") == Node("a", 2, memory=8 * GIB)
    assert node_for_instance_type("r6i.4xlarge", "a", "x") == Node("a", 16, memory=128 * GIB)
    p5 = node_for_instance_type("p5.48xlarge", "a", "x")
    assert (p5.cpus, p5.gpus, p5.device) == (192, 8, DEVICES["H100"])
    guessed = [Node("a", 1, 1, memory * GB).device.name for memory in (40, 80, 141)]
    assert guessed == ["A100-40", "A100-80", "H200"]
