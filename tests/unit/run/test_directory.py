import pickle
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from calm_ray.config import Config
from calm_ray.core.errors import CalmRayError, InputError
from calm_ray.job.changes import changes_of
from calm_ray.job.open_run import open_run
from calm_ray.recipes.load import load_config
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import Policy, RunModel, fetch, publish, require_safetensors
from calm_ray.run.repair import repair
from calm_ray.run.storage import Storage, hash_folder


def make_config(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"storage={folder}", "name=run", *overrides])


def launch(config: Config, *, overwrite: bool = False, redo: bool = False) -> RunDirectory:
    """Starts or resumes a run as a launch does; raises InputError if the existing directory conflicts."""
    run = RunDirectory(config.storage, config.name)
    changes = None if overwrite else changes_of(run, config)
    run.check(changes, overwrite=overwrite, redo=redo)
    run.begin(config.as_record(), {"python": "3"}, changes, overwrite=overwrite)
    return run


def launch_with(folder: Path, *stages: tuple[int, str]) -> RunDirectory:
    """Launches a run and marks these stages as finished."""
    run = launch(make_config(folder))
    for number, name in stages:
        run.stage(number, name).finish({})
    return run


def is_complete(run: RunDirectory, config: Config) -> bool:
    return run.is_complete(config.rounds, changes_of(run, config))


def test_rerunning_the_same_command_resumes_the_run(tmp_path: Path) -> None:
    launch_with(tmp_path).stage(1, "sample").finish({"rows": 3})
    again = launch_with(tmp_path)
    assert again.stage(1, "sample").is_finished
    assert again.stage(1, "sample").record == {"rows": 3}
    assert not again.stage(1, "pairs").is_finished


def test_changed_config_is_refused_listing_invalidated_stages(tmp_path: Path) -> None:
    run, changed = launch_with(tmp_path, (1, "pairs")), make_config(tmp_path, "train.epochs=5")
    run.check(changes_of(run, changed))  # nothing depends on it yet
    for name in ("train", "evaluate"):
        run.stage(1, name).finish({})
    with pytest.raises(InputError) as refused:
        launch(changed)
    assert "train.epochs: 2 in the run, 5 in the recipe" in str(refused.value)
    assert "beta" not in str(refused.value)
    assert "invalidates: rounds/1/train, rounds/1/evaluate." in str(refused.value)
    assert "--redo" in str(refused.value)
    assert "--overwrite" in str(refused.value)


def test_redo_discards_only_invalidated_stages(tmp_path: Path) -> None:
    finished = [(0, "evaluate"), (1, "sample"), (1, "votes"), (1, "pairs"), (1, "train"), (2, "sample")]
    run, changed = launch_with(tmp_path, *finished), make_config(tmp_path, "preferences.ties=smallest")
    changes = changes_of(run, changed)
    run.check(changes, redo=True)
    messages = run.begin(changed.as_record(), {}, changes)
    assert messages[0] == "changed: preferences.ties: 'drop' in the run, 'smallest' in the recipe"
    assert run.folders() == [(0, "evaluate"), (1, "sample")]
    changes = changes_of(run, changed)
    run.check(changes)
    assert run.begin(changed.as_record(), {}, changes) == []


def test_adding_rounds_resumes_a_finished_run(tmp_path: Path) -> None:
    run = launch_with(tmp_path, (1, "train"))
    run.finish({})
    assert is_complete(run, make_config(tmp_path))
    more = make_config(tmp_path, "rounds=3")
    assert not is_complete(run, more)
    launch(more)
    assert not run.is_finished
    assert run.stage(1, "train").is_finished


def test_finished_run_is_only_deleted_with_overwrite(tmp_path: Path) -> None:
    run = launch_with(tmp_path, (1, "sample"))
    run.finish({})
    assert is_complete(run, make_config(tmp_path))
    assert not is_complete(run, make_config(tmp_path, "sampling.temperature=0.5"))
    run.check(None, overwrite=True)
    assert run.stage(1, "sample").is_finished  # checking deletes nothing
    launch(make_config(tmp_path), overwrite=True)
    assert not run.stage(1, "sample").is_finished


def test_finished_run_with_a_corrupt_stage_is_not_complete(tmp_path: Path) -> None:
    run = launch_with(tmp_path)
    run.stage(1, "sample").write("00000-en", pa.table({"n": [1]}))
    run.stage(1, "sample").finish({})
    run.finish({})
    Path(run.storage.path("rounds/1/sample/00000-en.parquet")).write_bytes(b"corrupt")
    repair(run, make_config(tmp_path).graph)
    assert not is_complete(run, make_config(tmp_path))


def test_incompatible_run_format_is_refused_in_one_line(tmp_path: Path) -> None:
    run = launch_with(tmp_path)
    recorded = run.storage.read_json("config.json")
    del recorded["format"]  # as in older versions
    run.storage.write_json("config.json", recorded)
    with pytest.raises(InputError, match="incompatible version of calm_ray") as refused:
        launch(make_config(tmp_path))
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(InputError, match="incompatible version of calm_ray"):
        open_run(run.uri)
    launch(make_config(tmp_path), overwrite=True)


def test_moved_run_finds_its_policies(tmp_path: Path) -> None:
    run = launch_with(tmp_path / "before")
    first = run.record_model(RunModel("world-0", sha256="abc"), write_adapter(tmp_path / "model"))
    train = run.stage(1, "train")
    policy = publish(write_adapter(tmp_path / "policy"), train.storage, "policy", 1, "adapter")
    train.finish({"policy": policy.as_json()})
    run.stage(2, "train").finish({"policy": policy.as_json()})  # no pairs: the policy is unchanged
    (tmp_path / "before").rename(tmp_path / "after")
    moved = RunDirectory(str(tmp_path / "after"), "run")
    assert moved.model == replace(first, location=str(tmp_path / "after/run/model"))
    for number in (1, 2):
        assert moved.policy(number) == replace(policy, location=str(tmp_path / "after/run/rounds/1/train/policy"))
    run.stage(1, "train").finish({"policy": Policy().as_json()})
    assert run.policy(1) == Policy()


def test_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"contains thesis\.tex and is not a run"):
            RunDirectory(str(tmp_path), "run").check(None, overwrite=overwrite)


def test_interrupted_overwrite_is_not_resumed(tmp_path: Path) -> None:
    run = launch_with(tmp_path)
    run.stage(1, "sample").finish({})
    (tmp_path / "run" / "config.json.tmp-12345678").write_text("{")  # killed while writing it
    run.storage.write_json("deleting.json", {})  # the first step of an overwrite
    run.storage.delete("config.json")
    assert not launch_with(tmp_path).stage(1, "sample").is_finished


def test_run_without_config_is_only_deleted_with_overwrite(tmp_path: Path) -> None:
    run = launch_with(tmp_path)
    run.stage(1, "sample").finish({})
    run.storage.delete("config.json")  # by hand, or by an incomplete copy
    with pytest.raises(InputError, match=r"without its config\.json"):
        run.check(None)
    run.check(None, overwrite=True)


def test_bad_prompts_are_forgotten_when_generation_changes(tmp_path: Path) -> None:
    run = launch_with(tmp_path, (0, "evaluate"))
    run.storage.write("bad_prompts.parquet", b"")
    launch(make_config(tmp_path, "engines.dtype=float32"), redo=True)
    assert not run.storage.exists("bad_prompts.parquet")
    assert run.folders() == []


def test_bad_prompts_are_kept_when_only_training_changes(tmp_path: Path) -> None:
    run = launch_with(tmp_path, (0, "evaluate"), (1, "train"))
    run.storage.write("bad_prompts.parquet", b"")
    launch(make_config(tmp_path, "train.epochs=5"), redo=True)
    assert run.storage.exists("bad_prompts.parquet")
    assert run.folders() == [(0, "evaluate")]


def test_run_keeps_its_initial_model(tmp_path: Path) -> None:
    run = launch_with(tmp_path)
    assert not run.storage.exists("model.json")
    first = run.record_model(RunModel("world-0", sha256="abc"), write_adapter(tmp_path / "model"))
    assert run.model == first
    assert first.location == run.storage.uri("model")
    assert run.storage.names() == ["config.json", "model", "model.json"]
    # Pretrained again elsewhere, the demo model may differ.
    assert run.record_model(RunModel("world-0", sha256="def"), write_adapter(tmp_path / "other")) == first


def test_object_store_keys_are_never_empty(tmp_path: Path) -> None:
    storage = Storage("mock:///bucket/policy")
    storage.filesystem.create_dir(storage.path())
    storage.write("adapter_config.json", b"{}")
    storage.download("", tmp_path / "copy")
    assert (tmp_path / "copy" / "adapter_config.json").read_bytes() == b"{}"
    with pytest.raises(InputError, match="AWS_ENDPOINT_URL"):
        Storage("s3://bucket/runs?region=eu-west-1")


def test_partially_written_chunks_are_ignored(tmp_path: Path) -> None:
    stage = RunDirectory(str(tmp_path), "run").stage(2, "sample")
    assert stage.chunks() == set()
    stage.write("00001-fr", pa.table({"n": [1, 2]}))
    stage.write("00000-en", pa.table({"n": [3]}))
    (tmp_path / "run/rounds/2/sample/00002-fr.parquet.tmp-1234").write_bytes(b"partial")
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


def write_adapter(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_policy_names_reflect_round_and_content(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    first = publish(write_adapter(tmp_path / "a"), storage, "rounds/1/policy", 1, "adapter")
    second = publish(write_adapter(tmp_path / "b", b"others"), storage, "rounds/2/policy", 2, "adapter")
    assert first.name.startswith("r0001-")
    assert second.name.startswith("r0002-")
    assert first.sha256 == hash_folder(tmp_path / "a") != second.sha256
    assert Policy(**first.as_json()) == first


def test_policy_is_cached_and_tampering_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    policy = publish(write_adapter(tmp_path / "a"), Storage(str(tmp_path / "run")), "policy", 1, "adapter")
    folder = policy.local_folder()
    assert folder == tmp_path / "cache" / "policies" / policy.name
    assert hash_folder(folder) == policy.sha256
    (folder / "adapter_model.safetensors").write_bytes(b"tampered")
    with pytest.raises(CalmRayError, match="has changed; delete it and start again"):
        fetch(policy.location, policy.sha256, folder)


def test_weights_must_be_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"no \*.safetensors weights \(pytorch_model.bin\)"):
        require_safetensors(tmp_path)


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(InputError("rounds: is 0")))
    assert (str(error), error.exit_code) == ("rounds: is 0", 2)


def test_run_recorded_before_a_key_existed_is_resumed(tmp_path: Path) -> None:
    run = launch_with(tmp_path, (1, "pairs"))
    recorded = run.storage.read_json("config.json")
    recorded["config"]["preferences"] = {"translator": recorded["config"]["preferences"]["translator"]}
    run.storage.write_json("config.json", recorded)
    launch(make_config(tmp_path))
    with pytest.raises(InputError, match=r"preferences\.ties: 'drop' in the run, 'smallest' in the recipe"):
        launch(make_config(tmp_path, "preferences.ties=smallest"))
