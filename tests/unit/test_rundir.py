import pickle
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from calm_ray.core.errors import CalmRayError, InputError
from calm_ray.recipes import load_config
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import earliest, invalid_stages
from calm_ray.run.policies import Policy, RunModel, fetch, publish, require_safetensors
from calm_ray.run.repair import mend
from calm_ray.run.storage import Storage, hash_folder

CONFIG = {"name": "run", "train": {"epochs": 3, "beta": 0.1}}


def started(folder: Path) -> RunDirectory:
    run = RunDirectory(str(folder), "run")
    run.check(CONFIG, overwrite=False)
    run.begin(CONFIG, {"python": "3"}, overwrite=False)
    return run


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.stage(1, "sample").finish({"rows": 3})
    again = started(tmp_path)
    assert again.stage(1, "sample").is_finished
    assert again.stage(1, "sample").record == {"rows": 3}
    assert not again.stage(1, "pairs").is_finished


def test_another_configuration_is_refused_with_its_differences_and_what_it_would_undo(tmp_path: Path) -> None:
    run = started(tmp_path)
    changed = {"name": "run", "train": {"epochs": 2, "beta": 0.1}}
    run.stage(1, "pairs").finish({})
    run.check(changed, overwrite=False)  # there is nothing yet that depends on it
    for name in ("train", "evaluate"):
        run.stage(1, name).finish({})
    with pytest.raises(InputError) as refused:
        run.check(changed, overwrite=False)
    assert "train.epochs: 3 there, 2 here" in str(refused.value)
    assert "beta" not in str(refused.value)
    assert "done again: rounds/1/train, rounds/1/evaluate." in str(refused.value)
    assert "--redo" in str(refused.value)
    assert "--overwrite" in str(refused.value)


def test_what_a_changed_configuration_makes_invalid_is_done_again_when_told(tmp_path: Path) -> None:
    run = started(tmp_path)
    for number, name in [(0, "evaluate"), (1, "sample"), (1, "votes"), (1, "pairs"), (1, "train"), (2, "sample")]:
        run.stage(number, name).finish({})
    changed = CONFIG | {"preferences": {"ties": "drop"}}
    run.check(changed, overwrite=False, redo=True)
    said = run.begin(changed, {}, overwrite=False)
    assert said[0] == "changed: preferences: None there, {'ties': 'drop'} here"
    assert run.stages() == [(0, "evaluate"), (1, "sample")]
    run.check(changed, overwrite=False)
    assert run.begin(changed, {}, overwrite=False) == []


@pytest.mark.parametrize(
    ("keys", "method", "step"),
    [
        (["train.workers", "engines.cpus", "rounds"], "calm", "nothing"),
        (["engines.args.gpu_memory_utilization", "engines.args.max_num_seqs"], "calm", "nothing"),
        (["engines.args.max_model_len"], "calm", "evaluate"),
        (["train.workers", "train.learning_rate"], "calm", "train"),
        (["train.beta"], "calm", "train"),
        (["train.beta"], "dco", "pairs"),
        (["preferences.ties", "train.epochs"], "calm", "pairs"),
        (["sampling.temperature"], "calm", "sample"),
        (["engines.dtype", "method"], "calm", "evaluate"),
        (["languages", "train.epochs"], "calm", "questions"),
        (["a_key_that_comes_later"], "calm", "questions"),
        ([], "calm", "nothing"),
    ],
)
def test_a_change_has_its_first_effect_somewhere(keys: list[str], method: str, step: str) -> None:
    assert earliest(keys, method) == step


def test_more_rounds_go_on_with_a_finished_run(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path), "run")
    run.begin({"rounds": 1}, {}, overwrite=False)
    run.stage(1, "train").finish({})
    run.finish({})
    assert run.is_complete({"rounds": 1})
    assert not run.is_complete({"rounds": 2})
    run.check({"rounds": 2}, overwrite=False)
    run.begin({"rounds": 2}, {}, overwrite=False)
    assert not run.is_finished
    assert run.stage(1, "train").is_finished


def test_a_finished_run_is_left_alone_and_overwritten_when_told(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.stage(1, "sample").finish({})
    run.finish({})
    run.check(CONFIG, overwrite=False)
    assert run.is_complete(CONFIG)
    assert not run.is_complete(CONFIG | {"sampling": {"temperature": 0.5}})
    run.check(CONFIG, overwrite=True)
    assert run.stage(1, "sample").is_finished  # checking deletes nothing
    run.begin(CONFIG, {}, overwrite=True)
    assert not run.stage(1, "sample").is_finished


def test_a_finished_run_that_lost_a_stage_is_not_complete(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.stage(1, "sample").write("00000-en", pa.table({"n": [1]}))
    run.stage(1, "sample").finish({})
    run.finish({})
    Path(run.storage.path("rounds/1/sample/00000-en.parquet")).write_bytes(b"rotten")
    mend(run)
    assert not run.is_complete(CONFIG)


def test_a_run_that_was_moved_finds_its_policies(tmp_path: Path) -> None:
    run = started(tmp_path / "before")
    first = run.share_model(RunModel("world-0", sha256="abc"), adapter(tmp_path / "model"))
    train = run.stage(1, "train")
    policy = publish(adapter(tmp_path / "policy"), train.storage, "policy", 1, "adapter")
    train.finish({"policy": policy.as_json()})
    run.stage(2, "train").finish({"policy": policy.as_json()})  # without pairs the policy stays what it was
    (tmp_path / "before").rename(tmp_path / "after")
    moved = RunDirectory(str(tmp_path / "after"), "run")
    assert moved.model == replace(first, location=str(tmp_path / "after/run/model"))
    for number in (1, 2):
        assert moved.policy(number) == replace(policy, location=str(tmp_path / "after/run/rounds/1/train/policy"))
    run.stage(1, "train").finish({"policy": Policy().as_json()})
    assert run.policy(1) == Policy()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds thesis\.tex and is not a run"):
            RunDirectory(str(tmp_path), "run").check(CONFIG, overwrite=overwrite)


def test_what_an_interrupted_overwrite_left_is_never_gone_on_with(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.stage(1, "sample").finish({})
    (tmp_path / "run" / "config.json.tmp-12345678").write_text("{")  # killed while writing it
    run.storage.write_json("deleting.json", {})  # what an overwrite does first
    run.storage.delete("config.json")
    assert not started(tmp_path).stage(1, "sample").is_finished


def test_a_run_without_its_configuration_is_not_deleted_by_the_way(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.stage(1, "sample").finish({})
    run.storage.delete("config.json")  # by hand, or a copy that broke off
    with pytest.raises(InputError, match=r"without its config\.json"):
        run.check(CONFIG, overwrite=False)
    run.check(CONFIG, overwrite=True)


def test_what_was_found_out_under_the_old_configuration_is_forgotten(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path), "run")
    run.begin({"engines": {"dtype": "bfloat16"}}, {}, overwrite=False)
    run.storage.write("bad_prompts.parquet", b"")
    run.stage(0, "evaluate").finish({})
    run.begin({"engines": {"dtype": "float32"}}, {}, overwrite=False)
    assert not run.storage.exists("bad_prompts.parquet")
    assert run.stages() == []


def test_the_optimal_policy_of_the_start_depends_on_gamma() -> None:
    there = [(0, "evaluate"), (0, "optimal"), (1, "pairs")]
    assert invalid_stages("pairs", there) == [(0, "optimal"), (1, "pairs")]
    assert invalid_stages("train", there) == []


def test_a_run_keeps_the_model_it_started_from(tmp_path: Path) -> None:
    run = started(tmp_path)
    assert not run.storage.exists("model.json")
    first = run.share_model(RunModel("world-0", sha256="abc"), adapter(tmp_path / "model"))
    assert run.model == first
    assert first.location == run.storage.uri("model")
    assert run.storage.names() == ["config.json", "model", "model.json"]
    # Pretrained anew elsewhere, it may have come out otherwise.
    assert run.share_model(RunModel("world-0", sha256="def"), adapter(tmp_path / "other")) == first


def test_object_stores_are_given_no_empty_names(tmp_path: Path) -> None:
    storage = Storage("mock:///bucket/policy")
    storage.filesystem.create_dir(storage.path())
    storage.write("adapter_config.json", b"{}")
    storage.download("", tmp_path / "copy")
    assert (tmp_path / "copy" / "adapter_config.json").read_bytes() == b"{}"
    with pytest.raises(InputError, match="AWS_ENDPOINT_URL"):
        Storage("s3://bucket/runs?region=eu-west-1")


def test_chunks_are_written_whole(tmp_path: Path) -> None:
    stage = RunDirectory(str(tmp_path), "run").stage(2, "sample")
    assert stage.chunks() == set()
    stage.write("00001-fr", pa.table({"n": [1, 2]}))
    stage.write("00000-en", pa.table({"n": [3]}))
    (tmp_path / "run/rounds/2/sample/00002-fr.parquet.tmp-1234").write_bytes(b"torn")
    assert stage.chunks() == {"00000-en", "00001-fr"}
    assert stage.read().column("n").to_pylist() == [3, 1, 2]
    assert pickle.loads(pickle.dumps(stage)).chunks() == stage.chunks()


def test_storage_is_an_absolute_path_or_a_uri(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither an absolute path nor a URI"):
        Storage("runs")
    with pytest.raises(InputError, match="cannot be used"):
        Storage("nonsense://x").write("a", b"")
    by_path, by_uri = Storage(str(tmp_path)), Storage(f"file://{tmp_path}")
    by_uri.write("a/b.txt", b"content")
    assert by_path.read("a/b.txt") == b"content"
    assert by_path.files("a") == ["b.txt"]
    assert by_path.files("nothing") == []


def adapter(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_policies_are_named_after_round_and_content(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    first = publish(adapter(tmp_path / "a"), storage, "rounds/1/policy", 1, "adapter")
    second = publish(adapter(tmp_path / "b", b"others"), storage, "rounds/2/policy", 2, "adapter")
    assert first.name.startswith("r0001-")
    assert second.name.startswith("r0002-")
    assert first.sha256 == hash_folder(tmp_path / "a") != second.sha256
    assert Policy(**first.as_json()) == first


def test_a_node_fetches_a_policy_once_and_notices_what_is_not_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    policy = publish(adapter(tmp_path / "a"), Storage(str(tmp_path / "run")), "policy", 1, "adapter")
    folder = policy.local_folder()
    assert folder == tmp_path / "cache" / "policies" / policy.name
    assert hash_folder(folder) == policy.sha256
    (folder / "adapter_model.safetensors").write_bytes(b"tampered")
    with pytest.raises(CalmRayError, match="delete the folder"):
        fetch(policy.location, policy.sha256, folder)


def test_only_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"no \*.safetensors weights \(pytorch_model.bin\)"):
        require_safetensors(tmp_path)


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(InputError("rounds: is 0")))
    assert (str(error), error.exit_code) == ("rounds: is 0", 2)


def test_a_run_from_before_a_key_was_there_goes_on(tmp_path: Path) -> None:
    settings = load_config().model_dump(mode="json")
    older = {**settings, "preferences": {"translator": settings["preferences"]["translator"]}}
    run = RunDirectory(str(tmp_path), "old")
    run.begin(older, {}, overwrite=False)
    run.check(settings, overwrite=False)
    run.stage(1, "pairs").finish({})
    with pytest.raises(InputError, match=r"preferences\.ties: 'drop' there, 'smallest' here"):
        run.check(load_config(None, ["preferences.ties=smallest"]).model_dump(mode="json"), overwrite=False)
